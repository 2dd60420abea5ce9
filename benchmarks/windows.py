"""Profiles of windows of a run of generate_batch: how busy the GPU is, what takes its time, and the host's."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from .common import synchronize

__all__ = ["profile_of"]

_SHOWN = 12


class _Windows:
    """Watches a session's steps, and profiles some that follow each other, again and again."""

    def __init__(self, every: int, length: int, device: torch.device) -> None:
        self.every, self.length, self.device = every, length, device
        self.steps = self.profiled = 0
        self.busy = self.wall = 0.0
        self.host: list[float] = []
        self.kernels: Counter[str] = Counter()
        self.ops: Counter[str] = Counter()
        self.profile: Any = None

    def watch(self, session: Any) -> None:
        """Wraps what launches the session's steps."""
        launch = session._launch_next

        def launch_next() -> Any:
            self.steps += 1
            at = self.steps % self.every
            if at == self.every - self.length:
                self.begin()
            started = time.perf_counter()
            found = launch()
            if self.profile is None:
                self.host.append(1e6 * (time.perf_counter() - started))
            elif at == 0:
                self.end()
            return found

        session._launch_next = launch_next

    def begin(self) -> None:
        """Begins a window, with an idle device."""
        from torch.profiler import ProfilerActivity, profile

        synchronize(self.device)
        self.profile = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]).__enter__()

    def end(self) -> None:
        """Ends it."""
        synchronize(self.device)
        found, self.profile = self.profile, None
        found.__exit__(None, None, None)
        # Named ranges of pcg's steps are events of the device too, and no kernels.
        kernels = [e for e in found.events() if e.device_type.name == "CUDA" and not e.is_user_annotation]
        spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
        # From the first kernel on: a window begins with an idle device, which waits for its first step's launch.
        last = spans[0][0] if spans else 0.0
        self.wall -= last * 1e-6
        for start, stop in spans:
            self.busy += max(0.0, stop - max(start, last)) * 1e-6
            last = max(last, stop)
        self.wall += last * 1e-6
        self.profiled += self.length
        for e in kernels:
            self.kernels[e.name[:60]] += e.time_range.end - e.time_range.start
        for e in found.key_averages():
            if e.device_type.name != "CUDA":
                self.ops[e.key[:60]] += e.self_cpu_time_total


def profile_of(run: Callable[[Any], Any], steps: int, device: torch.device, windows: int = 6) -> dict[str, Any]:
    """Columns of a row.

    Args:
        run: called with what is to be called with the session before it begins. steps: about as many as it takes.
    """
    every = max(4, steps // windows)
    found = _Windows(every, min(32, every // 2), device)
    run(found.watch)
    if found.profile is not None:
        found.end()
    if not found.profiled:
        return {}
    host = sorted(found.host)

    def shown(of: Counter[str]) -> dict[str, float]:
        return {name: round(value / found.profiled, 1) for name, value in of.most_common(_SHOWN)}

    return {
        "busy": round(found.busy / found.wall, 3), "steps": found.steps,
        "host_us": [round(host[len(host) // 2], 1), round(host[int(0.9 * len(host))], 1)],
        "kernels_us": shown(found.kernels), "host_ops_us": shown(found.ops),
    }  # fmt: skip
