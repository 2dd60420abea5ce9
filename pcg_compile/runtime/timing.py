"""How long a step takes, for the choices that warm-up makes by measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["seconds_of"]


def seconds_of(step: Any, run: Callable[[], Any], device: torch.device, runs: int = 10) -> float:
    """Seconds of a step, its metadata included, until the device has done it: the least of several runs.

    Args:
        step: the running :class:`StepState`, or None. run: one step. runs: how many.
    """
    best = float("inf")
    for _ in range(runs):
        if step is not None:
            step.prepared = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
