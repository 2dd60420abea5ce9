"""Where the time of recorded steps went: what ``pcg.trace`` or ``torch.profiler`` wrote, read back."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cures import cure_of
from ..errors import PCGError, message
from ..stats import percent, print_table
from .items import number_range, without_numbers
from .render import short

__all__ = ["Range", "Step", "TraceFile", "read_trace"]

_STEP = re.compile(
    r"pcg step: (?P<size>.+?) (?P<how>in bucket .+?|at its exact size|builds its program)(?P<full>, full.*)?$"
)
_RANGE = re.compile(r"pcg (?P<kind>replay|piece|split op|metadata|fallback): (?P<name>.*)$")
#: Kineto's categories: work of the device, and calls that launch it.
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = ("cuda_runtime", "cuda_driver")
#: What a step does, by the names of its ranges; the rest of its time is that of loads, outputs and Python.
_KINDS = {"replay": "replays", "split op": "split ops", "piece": "uncaptured", "metadata": "metadata"}
_MOST_ITEMS = 12
_EXACT, _FIRST = "exact size", "first of a size"
_BUCKETS = {"at its exact size": _EXACT, "builds its program": _FIRST}


@dataclass
class Range:
    """One replay, split op, uncaptured piece or preparation of metadata; microseconds of the host and of the device."""

    kind: str
    name: str
    host: float
    device: float = 0.0


@dataclass
class Step:
    """One step; times in microseconds.

    Attributes:
        size, bucket: as its range says; the bucket such as "8", "8, full graph", "exact size" or "first of a size".
        begin, host: when it began, and how long the call took.
        device: (begin, end) of what the device did for it.
    """

    size: str
    bucket: str
    begin: float
    host: float
    ranges: list[Range] = field(default_factory=list)
    device: list[tuple[float, float]] = field(default_factory=list)

    def of(self, kind: str) -> float:
        """Host time of one kind of ranges."""
        return sum(r.host for r in self.ranges if r.kind == kind)

    @property
    def busy(self) -> float:
        """Time in which the device worked for the step."""
        return _covered(self.device)

    @property
    def waited(self) -> float:
        """Time between the step's first and last work on the device in which the device did nothing for it."""
        return max(e for _, e in self.device) - min(b for b, _ in self.device) - self.busy if self.device else 0.0


@dataclass
class TraceFile:
    """The steps of a trace, and its fallbacks by their text. Prints as text: a summary, then tables."""

    steps: list[Step]
    fallbacks: Counter[str]

    def __str__(self) -> str:
        if not self.steps:
            return "\n".join(["no step of pcg is in this trace", *self._not_replayed()])
        tables = [print_table(*self._buckets()), print_table(*self._items())]
        titles = ("milliseconds a step", "where the time goes, milliseconds a step")
        parts = (f"{title}\n{table}" for title, table in zip(titles, tables, strict=True))
        return "\n\n".join(["\n".join(self._summary()), *parts])

    def _summary(self) -> Iterator[str]:
        steps, whole = self.steps, sum("full" in s.bucket for s in self.steps)
        exact, first = (sum(s.bucket == bucket for s in steps) for bucket in (_EXACT, _FIRST))
        wall = max(s.begin + s.host for s in steps) - min(s.begin for s in steps)
        told = [f"{len(steps) - exact - whole - first} replayed piece by piece", f"{whole} replayed as one full graph",
                f"{exact} not captured", f"{first} the first of a size, which builds its program"]  # fmt: skip
        told = [text for text in told if not text.startswith("0 ")]
        yield f"{len(steps)} steps in {_ms(wall)} ms: {', '.join(told)}"
        host, device = sum(s.host for s in steps), sum(s.busy for s in steps)
        shares = [f"{percent(sum(s.of(kind) for s in steps) / host)} {name}" for kind, name in _KINDS.items()]
        rest = percent(sum(_rest(s) for s in steps) / host)
        shares = [share for share in shares if not share.startswith("0%")]
        yield f"  host: {_ms(host / len(steps))} ms a step, of it {', '.join(shares)}, {rest} loads, outputs and gaps"
        if device:
            busy = _covered(span for s in steps for span in s.device) / wall
            limit = "the device is the limit" if busy > 0.9 else "the device waits for the host"
            yield f"  device: {_ms(device / len(steps))} ms a step, busy {percent(busy)} of the time: {limit}"
        yield from self._not_replayed()

    def _not_replayed(self) -> Iterator[str]:
        for text, times in self.fallbacks.most_common():
            yield f"  {times} {'time' if times == 1 else 'times'}: {short(text)}"
            cure = cure_of(text)
            if cure is not None:
                yield f"    to do: {cure}"

    def _buckets(self) -> tuple[Sequence[str], list[list[str]]]:
        groups: dict[str, list[Step]] = defaultdict(list)
        for step in self.steps:
            groups[step.bucket].append(step)
        on_gpu = any(step.device for step in self.steps)
        columns = ("bucket", "steps", "host", "longest", *_KINDS.values(), "gaps")
        rows = []
        for bucket, steps in groups.items():
            figures = [_mean(s.host for s in steps), _ms(max(s.host for s in steps))]
            figures += [_mean(s.of(kind) for s in steps) for kind in _KINDS]
            figures += [_mean(map(_rest, steps))]
            figures += [_mean(s.busy for s in steps), _mean(s.waited for s in steps)] if on_gpu else []
            rows.append([bucket, str(len(steps)), *figures])
        return (*columns, *(("device", "device idle") if on_gpu else ())), rows

    def _items(self) -> tuple[Sequence[str], list[list[str]]]:
        """Replays, split ops and so on, those that differ in numbers alone as one, the longest first."""
        groups: dict[tuple[str, str], list[Range]] = defaultdict(list)
        for step in self.steps:
            for r in step.ranges:
                groups[r.kind, without_numbers(r.name)].append(r)
        on_gpu = any(step.device for step in self.steps)
        rows, times = [], 1e3 * len(self.steps)
        for (kind, _), found in groups.items():
            names = sorted({r.name for r in found}, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
            host, device = sum(r.host for r in found) / times, sum(r.device for r in found) / times
            cells = [_KINDS[kind], number_range(names[0], names[-1]), f"{len(found) / len(self.steps):.3g}"]
            rows.append((max(host, device), [*cells, f"{host:.3f}", *([f"{device:.3f}"] if on_gpu else [])]))
        rows.sort(key=lambda row: -row[0])
        columns = ("kind", "what", "times a step", "host", *(("device",) if on_gpu else ()))
        return columns, [cells for _, cells in rows[:_MOST_ITEMS]]


def read_trace(path: str | Path) -> TraceFile:
    """Reads a trace, ``.json`` or ``.json.gz``, that ``pcg.trace`` or a profiler's ``export_chrome_trace`` wrote.

    Raises:
        OSError: it cannot be read.
        PCGError: it is no such file.
    """
    raw = Path(path).read_bytes()
    try:
        found = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
        events = [e for e in (found["traceEvents"] if isinstance(found, dict) else found) if e.get("ph") == "X"]
    except (ValueError, KeyError, AttributeError, EOFError, gzip.BadGzipFile):
        cure = 'Record one: with pcg.trace("trace.json"): model(x)'
        raise PCGError(message(f"{path} is no trace of torch's profiler", cure=cure)) from None
    device: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        category = event.get("cat", "")
        if category in _DEVICE:
            device[event.get("args", {}).get("correlation")].append(event)
        elif category in _LAUNCH or (category == "user_annotation" and event["name"].startswith("pcg ")):
            threads[event.get("pid"), event.get("tid")].append(event)
    result = TraceFile([], Counter())
    for thread in threads.values():
        _read_thread(sorted(thread, key=lambda e: (e["ts"], -e["dur"])), device, result)
    result.steps.sort(key=lambda step: step.begin)
    return result


def _read_thread(events: Iterable[Mapping[str, Any]], device: Mapping[Any, Any], result: TraceFile) -> None:
    """Puts each range and launch of a thread into the step around it."""
    # What is open: (its end, its step, and its range, None where it is the step itself).
    around: list[tuple[float, Step, Range | None]] = []
    for event in events:
        name, begin, host = event["name"], event["ts"], event["dur"]
        while around and around[-1][0] <= begin:
            around.pop()
        step, inside = around[-1][1:] if around else (None, None)
        if event["cat"] in _LAUNCH:
            work = device.get(event.get("args", {}).get("correlation"), ())
            if step is not None and work:
                if inside is None and "GraphLaunch" in name:
                    inside = Range("replay", "full CUDA graph", host)
                    step.ranges.append(inside)
                step.device += [(e["ts"], e["ts"] + e["dur"]) for e in work]
                if inside is not None:
                    inside.device += sum(e["dur"] for e in work)
        elif (found := _STEP.match(name)) is not None:
            bucket = _BUCKETS.get(found["how"]) or found["how"].removeprefix("in bucket ")
            new = Step(found["size"], bucket + (", full graph" if found["full"] else ""), begin, host)
            result.steps.append(new)
            around.append((begin + host, new, None))
        elif (found := _RANGE.match(name)) is not None and found["kind"] == "fallback":
            result.fallbacks[found["name"]] += 1
        elif found is not None and step is not None:
            inside = Range(found["kind"], found["name"], host)
            step.ranges.append(inside)
            around.append((begin + host, step, inside))


def _rest(step: Step) -> float:
    return max(0.0, step.host - sum(map(step.of, _KINDS)))


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3g}"


def _mean(microseconds: Iterable[float]) -> str:
    found = list(microseconds)
    return _ms(sum(found) / len(found))
