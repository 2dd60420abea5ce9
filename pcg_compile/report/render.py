"""A report as tables, for a terminal and for a notebook."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from .explain import GraphReport, ItemReport, Report

__all__ = ["Section", "as_html", "as_rich", "longest_path", "sections"]

#: Of a item's ops, as many as a line holds.
_MOST_OPS = 6


@dataclass(frozen=True)
class Section:
    """One table: its title, its columns, its rows of text, and a line below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    below: str = ""


def sections(report: Report) -> Iterator[Section]:
    """The tables of a report, in order; empty ones are left out."""
    for i, graph in enumerate(report.graphs):
        title = f"graph {i}, dynamic sizes: {', '.join(graph.sizes) or 'none'}"
        rows = tuple(_item_cells(item) for item in graph.items)
        yield Section(title, ("", "where", "ops", "verdict", "why"), rows, _below(graph))
        found = tuple((p.name, p.verdict, _nearer("\n".join(p.findings))) for p in graph.passes)
        yield Section(f"graph {i}, passes", ("pass", "verdict", "found"), found)
    stats = report.stats
    buckets = tuple(
        (
            str(size),
            str(use.hits),
            f"{use.mean_padding:.0%}" if use.mean_padding is not None else "",
            f"{use.bytes / 2**20:.1f}",
            f"{use.seconds:.3f}",
            use.attention,
        )
        for size, use in stats.buckets.items()
    )
    if buckets:
        columns = ("bucket", "steps", "mean padding", "MiB", "seconds to capture", "attention")
        yield Section("buckets", columns, buckets, f"{stats.captured} captured graphs, {stats.replays} replays")
    falls = tuple((str(fall.count), fall.reason, _nearer(fall.where)) for fall in stats.fallbacks)
    if falls:
        yield Section("fallbacks: what ran otherwise than captured", ("times", "why", "where"), falls)


def longest_path(report: Report) -> int:
    """How many characters the longest path of a report has."""
    places = [item.where for graph in report.graphs for item in graph.items] + [f.where for f in report.stats.fallbacks]
    return max((len(word) for place in places for word in _nearer(place).split()), default=0)


def as_rich(report: Report, min_places: int = 0) -> Iterator[Any]:
    """Rich tables; columns of paths have at least ``min_places`` characters, so that a path can stay in one piece."""
    for section in sections(report):
        table = Table(title=escape(section.title), caption=escape(section.below) or None)
        for name in section.columns:
            # Cut off, a path would lose its line.
            table.add_column(name, overflow="fold", min_width=min_places if name == "where" else None)
        for row in section.rows:
            table.add_row(*map(escape, row))
        yield table


def as_html(report: Report) -> str:
    """HTML tables; everything that comes from the model is escaped."""
    return "".join(_html(section) for section in sections(report))


def _html(section: Section) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in section.columns)
    rows = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in section.rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    below = f"<p><i>{_text(section.below)}</i></p>" if section.below else ""
    return f"<p><b>{_text(section.title)}</b></p>{table}{below}"


def _text(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def _below(graph: GraphReport) -> str:
    pieces = [item for item in graph.items if item.distinct is not None]
    distinct = len({item.distinct for item in pieces})
    parts = [f"{len(pieces)} pieces, {distinct} distinct ones compiled"]
    if graph.refusal is not None:
        parts.append(f"no step can use captured graphs: {graph.refusal}")
    if graph.timeline is not None:
        how = "without captured graphs" if graph.timeline.bucket is None else "from captured graphs"
        gaps = 1e3 * graph.timeline.gap_seconds()
        parts.append(f"a step {how}: {1e3 * graph.timeline.seconds:.3g} ms, {gaps:.2g} ms of it between calls")
    if graph.entry_seconds is not None:
        parts.append(f"{1e6 * graph.entry_seconds:.0f} us from the call to the graph, {graph.entry}")
    return "; ".join(parts)


def _item_cells(item: ItemReport) -> tuple[str, ...]:
    common = Counter(item.ops).most_common()
    counted = ", ".join(f"{n} {op}" if n > 1 else op for op, n in common[:_MOST_OPS])
    if len(common) > _MOST_OPS:
        counted += f", {sum(n for _, n in common[_MOST_OPS:])} more"
    name = item.name if item.distinct is None else f"{item.name} (distinct {item.distinct})"
    return (name, _nearer(item.where), counted, item.verdict, item.reason)


def _nearer(text: str) -> str:
    """Paths below the working directory, as seen from there."""
    return text.replace(os.getcwd() + os.sep, "")
