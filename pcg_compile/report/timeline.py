"""Where the time of one step goes: each call of its program, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch

from ..running import RUNNING
from ..runtime.program import Kind, Operation, PrepareMetadata, Program, Replay, RunPiece, RunSplitOp
from ..step_state import StepState

__all__ = ["Span", "Timeline", "time_step"]

#: What an item's operations are shown as.
_SHOWN = (PrepareMetadata, Replay, RunPiece, RunSplitOp)
#: What a program does, each item's operations together: the one that is shown, and what is timed.
_Calls = list[tuple[Operation, Callable[[], Any]]]

#: The first runs of a program touch cold memory; the fastest of the others is the one without an interruption.
_WARM_UPS, _RUNS = 2, 5


@dataclass(frozen=True)
class Span:
    """One call in a step.

    Attributes:
        lane: "host": from entering the call to its return, which on a CPU is all of its work and on a GPU its launch;
            "device": from when the stream was free and the host had begun the call, to the end of its work.
        kind, name, module, where: what it is, the path of its module, and the line of the user's code.
        start, seconds: since the step's begin.
    """

    lane: Literal["host", "device"]
    kind: Kind
    name: str
    module: str
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

    def lane(self) -> list[Span]:
        """The device's spans; on a CPU the host's."""
        return [span for span in self.spans if span.lane == "device"] or list(self.spans)

    def gap_seconds(self) -> float:
        """Seconds in which nothing of the step ran: between the device's calls, or on a CPU the host's."""
        spans = self.lane()
        return max((span.start + span.seconds for span in spans), default=0.0) - sum(span.seconds for span in spans)

    def describe(self) -> str:
        """One line: the step's size, its bucket and its time."""
        size = "x".join(map(str, self.sizes)) or "fixed size"
        bucket = "x".join(map(str, self.bucket or ()))
        how = "without captured graphs" if self.bucket is None else f"in bucket {bucket}" if bucket else "captured"
        share = self.gap_seconds() / self.seconds if self.seconds else 0.0
        return f"a step of {size} {how}: {1e3 * self.seconds:.3g} ms, {share:.0%} of it between calls"


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
            calls = _calls(program)
            seconds, spans = _fastest(_run_on_host, calls, program, args, device, step)
            if device.type == "cuda":
                spans = spans + _fastest(_run_on_device, calls, program, args, device, step)[1]
            return Timeline(tuple(sizes), program.bucket, tuple(spans), seconds)
    finally:
        counters.replays = replays


def _fastest(
    run: Callable[[_Calls, torch.device], tuple[float, list[Span]]],
    calls: _Calls,
    program: Program,
    args: Sequence[Any],
    device: torch.device,
    step: StepState | None,
) -> tuple[float, list[Span]]:
    runs = []
    for _ in range(_WARM_UPS + _RUNS):
        with _once_more(step):
            program.frame.args = args
            try:
                runs.append(run(calls, device))
            finally:
                program.frame.clear()
    return min(runs[_WARM_UPS:], key=lambda one: one[0])


def _calls(program: Program) -> _Calls:
    """With what goes before and after it, such as padding what it wrote, a split op is one call; so are all loads."""
    groups = groupby(program.operations_of_step(), lambda op: op.index if op.index >= 0 else op.kind)
    calls: _Calls = []
    for _, group in groups:
        operations = list(group)
        shown = next((op for op in operations if isinstance(op, _SHOWN)), operations[0])
        calls.append((shown, partial(_run_each, [op.call for op in operations])))
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
        Span("host", what.kind, what.name, what.module, what.where, entered - begin, left - entered)
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
        spans.append(Span("device", what.kind, what.name, what.module, what.where, start, end - start))
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
