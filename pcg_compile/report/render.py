"""A report, as text and as HTML: a summary, then tables in which repeated layers are one row."""

from __future__ import annotations

import html
import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..cures import cure_of
from ..errors import Hazard
from ..stats import COUNTS, Stats, bucket_table, percent, print_table
from .items import ItemReport, number_range, without_numbers
from .timeline import Timeline

__all__ = ["GraphReport", "PassReport", "Report", "fold", "short", "summary"]

#: Kinds of ops that a row names.
_MOST_OPS = 4
#: Items of a repeated layer, at most.
_LONGEST_LAYER = 16
#: Findings and fallbacks that a summary lists; the rest is counted.
_MOST_LINES = 8


@dataclass(frozen=True)
class PassReport:
    """One pass: what it made of the graph; each finding with its reason and the user's line."""

    name: str
    verdict: str
    findings: tuple[str, ...]


@dataclass(frozen=True)
class GraphReport:
    """One of Dynamo's graphs.

    Attributes:
        sizes: its dynamic sizes, such as ``ids.shape[0]``.
        items: its pieces and split ops, in order.
        notes, hazards, passes: what passes did and found.
        refusal: why no step of it is replayed, or None.
        timeline: of one step with the arguments that ``explain`` was given; None without arguments.
        entry_seconds, entry: of the first graph, host time from the call to the graph, and the way it took.
    """

    sizes: tuple[str, ...]
    items: tuple[ItemReport, ...]
    notes: tuple[str, ...]
    hazards: tuple[Hazard, ...]
    refusal: str | None
    passes: tuple[PassReport, ...] = ()
    timeline: Timeline | None = None
    entry_seconds: float | None = None
    entry: str = ""


@dataclass(frozen=True)
class Report:
    """The graphs of a model and the figures so far. Prints as text: a summary, then tables."""

    graphs: tuple[GraphReport, ...]
    stats: Stats

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def to_json(self) -> str:
        """All of it as JSON; times in seconds."""
        figures = {name: getattr(self.stats, name) for name in COUNTS}
        buckets = {str(size): {**asdict(use), "padding": use.padding} for size, use in self.stats.buckets.items()}
        falls = [asdict(f) for f in self.stats.fallbacks]
        sizes = {str(size): steps for size, steps in self.stats.sizes.items()}
        graphs = [asdict(graph) for graph in self.graphs]
        everything = {**figures, "buckets": buckets, "fallbacks": falls, "sizes": sizes}
        return json.dumps({"graphs": graphs, "stats": everything}, indent=1)

    def plot(self) -> Any:
        """Returns a matplotlib ``Figure`` of two axes: where one step's time goes, and the padding of each bucket.

        There are times only if ``explain`` was given a call's arguments.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .plots import plot_report

        return plot_report([graph.timeline for graph in self.graphs if graph.timeline is not None], self.stats)


@dataclass(frozen=True)
class Section:
    """One table: its title, its columns, and its rows of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def summary(report: Report) -> Iterator[str]:
    """Whether the model is captured, why not and what to do, and how it was used: one line each."""
    pieces = [item for graph in report.graphs for item in graph.items if item.distinct is not None]
    exact = [item for item in pieces if item.verdict == "exact size, not captured"]
    refusals = [graph.refusal for graph in report.graphs if graph.refusal is not None]
    yield _headline(report, pieces, exact, refusals)
    told = [*refusals, *(item.reason for item in exact)]
    problems = [("every step", reason, "") for reason in refusals]
    for (reason, where), names in _grouped(((item.reason, item.where), item.name) for item in exact).items():
        problems.append((number_range(names[0], names[-1]), reason, where))
    for fall in report.stats.fallbacks:
        if not any(reason in fall.reason for reason in told):
            problems.append((_count(fall.count, "time"), fall.reason, fall.where))
    for who, reason, where in problems[:_MOST_LINES]:
        yield f"  {who}: {short(reason)}" + (f" (at {short(where)})" if where else "")
        cure = cure_of(f"{reason} {where}")
        if cure is not None:
            yield f"    to do: {cure}"
    if len(problems) > _MOST_LINES:
        yield f"  and {len(problems) - _MOST_LINES} more: print(pcg.stats(model))"
    yield f"  {_use(report)}"
    for graph in report.graphs:
        if graph.timeline is not None:
            yield f"  {graph.timeline.describe()}"
        if graph.entry_seconds is not None:
            yield f"  {1e6 * graph.entry_seconds:.0f} us from the call to the graph, {graph.entry}"


def _headline(report: Report, pieces: Sequence[Any], exact: Sequence[Any], refusals: Sequence[str]) -> str:
    if not report.graphs:
        if report.stats.fallbacks:
            return "NOT CAPTURED: no graph of it can be captured"
        return "not compiled yet: call the model, or pass a call's arguments to pcg.explain()"
    if not pieces:
        return "nothing to capture: the graphs hold no work on the device"
    splits = sum(item.kind == "split op" for graph in report.graphs for item in graph.items)
    what = _count(len(pieces), "piece")
    if len(pieces) > 1:
        distinct = sum(len({item.distinct for item in graph.items} - {None}) for graph in report.graphs)
        what += f" ({distinct} different)"
    what += f", {_count(splits, 'split op')} between them" if splits else ""
    if len(refusals) == len(report.graphs) or len(exact) == len(pieces):
        return f"NOT CAPTURED: no step is replayed; {what}"
    if exact or refusals:
        return f"PARTLY CAPTURED: {len(pieces) - len(exact)} of {what}"
    return f"{'captured' if report.stats.captured else 'can be captured'}: {what}"


def _use(report: Report) -> str:
    stats = report.stats
    if not stats.steps:
        return "no step has run yet"
    figures = [_count(stats.steps, "step"), _count(stats.captured, "captured graph"), f"{stats.replays} replays"]
    figures += [f"{percent(stats.padding)} padding"] if stats.padding is not None else []
    return f"so far: {', '.join(figures)}" + ("" if stats.fallbacks else ", no fallbacks")


def sections(report: Report) -> Iterator[Section]:
    """The tables of a report, in order; empty ones are left out."""
    for i, graph in enumerate(report.graphs):
        title = (f"graph {i}" if len(report.graphs) > 1 else "graph") + ", dynamic sizes: "
        rows = list(_rows(graph))
        columns = ("item", "times", "module", "ops", "verdict")
        yield Section(title + (", ".join(graph.sizes) or "none"), columns, rows)
        # What padding safety found is in the summary.
        passes = [one for one in graph.passes if one.name != "padding_safety"]
        found = [(one.name, one.verdict, text) for one in passes for text in _counted(one.findings)]
        if found:
            yield Section("what passes did", ("pass", "verdict", "finding"), found)
    if report.stats.buckets:
        yield Section("buckets", *bucket_table(report.stats))


def _counted(findings: Sequence[str]) -> Iterator[str]:
    """Findings, those that differ in numbers alone as one."""
    groups = list(_grouped((without_numbers(finding), finding) for finding in findings).values())
    for group in groups[:_MOST_LINES]:
        yield short(number_range(group[0], group[-1])) + (f" (x{len(group)})" if len(group) > 1 else "")
    if len(groups) > _MOST_LINES:
        yield f"and {len(groups) - _MOST_LINES} more: report.graphs[...].passes"


def _rows(graph: GraphReport) -> Iterator[tuple[str, ...]]:
    items = graph.items
    # Of a library's code the line says no more than the module.
    keys = [
        (i.kind, without_numbers(i.name), i.distinct, without_numbers(i.module), i.ops, i.verdict, i.reason)
        for i in items
    ]
    for start, length, times in fold(keys):
        for first, last in zip(items[start : start + length], items[start + length * (times - 1) :], strict=False):
            yield (
                number_range(first.name, last.name),
                f"x{times}" if times > 1 else "",
                _place(first, last),
                _ops(first.ops),
                # The summary says why a piece is not captured.
                f"{first.verdict}, {short(first.reason)}" if first.verdict == "captured" else first.verdict,
            )


def fold(keys: Sequence[Hashable]) -> Iterator[tuple[int, int, int]]:
    """Finds what repeats, such as the items of a layer: yields (start, length, times) for each run of keys."""
    start = 0
    while start < len(keys):
        length, times = 1, 1
        for n in range(1, min(_LONGEST_LAYER, (len(keys) - start) // 2) + 1):
            repeats = 1
            while keys[start + repeats * n : start + (repeats + 1) * n] == keys[start : start + n]:
                repeats += 1
            if repeats > 1 and repeats * n > length * times:
                length, times = n, repeats
        yield start, length, times
        start += length * times


def _place(first: ItemReport, last: ItemReport) -> str:
    """The modules, and the user's own line."""
    line = "" if "-packages/" in first.where else short(first.where).partition(" in ")[0]
    modules = number_range(first.module, last.module)
    return f"{modules} ({line})" if modules and line else modules or line or short(first.where)


def _ops(ops: Sequence[str]) -> str:
    common = Counter(op for op in ops if op != "getitem" or len(ops) == 1).most_common()
    rest = sum(n for _, n in common[_MOST_OPS:])
    named = [f"{n} {op}" if n > 1 else op for op, n in common[:_MOST_OPS]]
    return ", ".join(named) + (f", {rest} more" if rest else "")


def short(text: str) -> str:
    """A text whose paths begin at the working directory, or at the installed package."""
    text = text.replace(os.getcwd() + os.sep, "")
    return re.sub(r"[^\s(]*/(?:site|dist)-packages/", "", text)


def _grouped(pairs: Iterable[tuple[Any, str]]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def as_text(report: Report) -> str:
    """A report for a terminal."""
    tables = (f"{section.title}\n{print_table(section.columns, section.rows)}" for section in sections(report))
    return "\n\n".join(("\n".join(summary(report)), *tables))


def as_html(report: Report) -> str:
    """A report for a notebook; everything that comes from the model is escaped."""
    lines = html.escape("\n".join(summary(report)))
    return f"<pre>{lines}</pre>" + "".join(map(_html, sections(report)))


def _html(section: Section) -> str:
    def row(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    rows = "".join(row("td", cells) for cells in section.rows)
    return f"<p><b>{html.escape(section.title)}</b></p><table>{row('th', section.columns)}{rows}</table>"
