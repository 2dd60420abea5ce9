"""Where the time of one step goes: each call of its program, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

import torch

from ..runtime.program import Program
from ..step import RUNNING, DoesNotFit, StepState
from .items import CallKind, CallName, name_calls

__all__ = ["Span", "Timeline", "time_step"]

_Calls = list[tuple[CallName, Callable[[], Any]]]

#: The first runs of a program touch cold memory; the fastest of the others is the one without an interruption.
_WARM_UPS, _RUNS = 2, 5


@dataclass(frozen=True)
class Span:
    """One call in a step.

    Attributes:
        lane: "host": from entering the call to its return, which on a CPU is all of its work and on a GPU its launch;
            "device": from when the stream was free and the host had begun the call, to the end of its work.
        kind, name, where: what it is, and the line of the user's code.
        start, seconds: since the step's begin.
    """

    lane: Literal["host", "device"]
    kind: CallKind
    name: str
    where: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """The fastest of a few runs of a step.

    Attributes:
        sizes: the call's real dynamic sizes. bucket: those that it ran at, None without captured graphs.
        spans: in order, those of the host first. seconds: of the full CUDA graph, until the device is done.
    """

    sizes: tuple[int, ...]
    bucket: tuple[int, ...] | None
    spans: tuple[Span, ...]
    seconds: float

    def gap_seconds(self) -> float:
        """Seconds in which nothing of the step ran: between the device's calls, or the host's where there is none."""
        lane = "device" if any(span.lane == "device" for span in self.spans) else "host"
        spans = [span for span in self.spans if span.lane == lane]
        return max((span.start + span.seconds for span in spans), default=0.0) - sum(span.seconds for span in spans)


def time_step(runtime: Any, args: Sequence[Any], step: StepState | None) -> Timeline:
    """Runs a step of a :class:`GraphRuntime` a few times and times its calls.

    It replays where its bucket has captures, else at its exact sizes. Nothing is captured. Written cache
    slots and the figures are as before; the caller puts back arguments and random numbers.

    Args:
        args: of the graph's call. step: the running :class:`StepState`, or None.
    """
    counters, device = runtime.shared.counters, runtime.shared.device
    replays = counters.replays
    try:
        with _slots_unchanged(step):
            sizes, program = runtime.program_for(args, step)
            calls = _calls(runtime, program, args)
            seconds, spans = _fastest(_run_on_host, calls, program, device, step)
            if device.type == "cuda":
                spans = spans + _fastest(_run_on_device, calls, program, device, step)[1]
            return Timeline(tuple(sizes), program.bucket, tuple(spans), seconds)
    finally:
        counters.replays = replays


def _fastest(
    run: Callable[[_Calls, torch.device], tuple[float, list[Span]]],
    calls: _Calls,
    program: Program,
    device: torch.device,
    step: StepState | None,
) -> tuple[float, list[Span]]:
    runs = []
    for _ in range(_WARM_UPS + _RUNS):
        with _once_more(step):
            try:
                runs.append(run(calls, device))
            finally:
                program.frame[:] = [None] * len(program.frame)
    return min(runs[_WARM_UPS:], key=lambda one: one[0])


def _calls(runtime: Any, program: Program, args: Sequence[Any]) -> _Calls:
    calls: _Calls = [(CallName("inputs", "copy inputs", ""), lambda: program.start(args))]
    full_graph = program.full_graph
    captured = None
    if full_graph is not None and full_graph.wanted:
        try:
            captured = full_graph.captured_graphs.get(full_graph.prepare())
        except DoesNotFit:
            captured = None
    if full_graph is not None and captured is not None:
        calls.append((CallName("metadata", "prepare the step", ""), full_graph.prepare))
        calls.append((CallName("replay", "full CUDA graph", ""), captured.replay))
    else:
        named = zip(program.op_items, name_calls(runtime.plan, program), program.ops, strict=True)
        # With what goes before and after it, such as zeroing the rows behind the real ones, a split op is one call.
        for _, group in groupby(named, itemgetter(0)):
            _, names, ops = zip(*group, strict=True)
            calls.append((names[0], ops[0] if len(ops) == 1 else partial(_run_each, ops)))
    calls.append((CallName("outputs", "copy outputs", ""), lambda: program.emit(args)))
    return calls


def _run_each(ops: Sequence[Callable[[], Any]]) -> None:
    for op in ops:
        op()


def _run_on_host(calls: _Calls, device: torch.device) -> tuple[float, list[Span]]:
    clock = time.perf_counter
    _synchronize(device)
    times = []
    begin = clock()
    for _, call in calls:
        entered = clock()
        call()
        times.append((entered, clock()))
    _synchronize(device)
    seconds = clock() - begin
    spans = [
        Span("host", what.kind, what.name, what.where, entered - begin, left - entered)
        for (what, _), (entered, left) in zip(calls, times, strict=True)
    ]
    return seconds, spans


def _run_on_device(calls: _Calls, device: torch.device) -> tuple[float, list[Span]]:
    clock = time.perf_counter
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        _synchronize(device)
        entered = []
        events[0].record()
        begin = clock()
        for (_, call), event in zip(calls, events[1:], strict=True):
            entered.append(clock() - begin)
            call()
            event.record()
        _synchronize(device)
        seconds = clock() - begin
    spans = []
    free = 0.0
    for (what, _), host, event in zip(calls, entered, events[1:], strict=True):
        end = events[0].elapsed_time(event) / 1e3
        start = min(max(free, host), end)
        spans.append(Span("device", what.kind, what.name, what.where, start, end - start))
        free = max(free, end)
    return seconds, spans


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _slots_unchanged(step: StepState | None) -> Iterator[None]:
    """Puts back the cache slots of the step's tokens, which a run writes."""
    if step is None or step.cache is None:
        yield
        return
    cache = step.cache
    slots = torch.as_tensor(step.batch.tables(cache.page_size).slots, dtype=torch.int64).to(cache.device)
    layers = (*cache.flat_k, *cache.flat_v)
    before = [layer[slots] for layer in layers]
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer[slots] = old


@contextmanager
def _once_more(step: StepState | None) -> Iterator[None]:
    """A step of the same batch, which has prepared nothing yet: a step prepares its metadata once."""
    if step is None:
        yield
        return
    again = StepState(step.batch, step.cache, step.outer)
    token = RUNNING.set(again)
    try:
        yield
    finally:
        RUNNING.reset(token)
        again.close()
