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
    from .explain import GraphReport, Report, SiteReport

__all__ = ["Section", "as_html", "as_rich", "longest_path", "sections"]

#: Of a site's ops, as many as a line holds.
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
        rows = tuple(_site_cells(site) for site in graph.sites)
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
        columns = ("bucket", "steps", "mean padding", "MiB", "seconds to record", "attention")
        yield Section("buckets", columns, buckets, f"{stats.captured} recordings, {stats.replays} replays")
    falls = tuple((str(fall.count), fall.reason, _nearer(fall.where)) for fall in stats.fallbacks)
    if falls:
        yield Section("fallbacks: what ran otherwise than recorded", ("times", "why", "where"), falls)


def longest_path(report: Report) -> int:
    """How many characters the longest path of a report has."""
    places = [site.where for graph in report.graphs for site in graph.sites] + [f.where for f in report.stats.fallbacks]
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
    pieces = [site for site in graph.sites if site.distinct is not None]
    distinct = len({site.distinct for site in pieces})
    parts = [f"{len(pieces)} pieces, {distinct} distinct ones compiled"]
    if graph.refusal is not None:
        parts.append(f"no step can use recordings: {graph.refusal}")
    if graph.timeline is not None:
        how = "without recordings" if graph.timeline.bucket is None else "from recordings"
        gaps = 1e3 * graph.timeline.gap_seconds()
        parts.append(f"a step {how}: {1e3 * graph.timeline.seconds:.3g} ms, {gaps:.2g} ms of it between calls")
    return "; ".join(parts)


def _site_cells(site: SiteReport) -> tuple[str, ...]:
    common = Counter(site.ops).most_common()
    counted = ", ".join(f"{n} {op}" if n > 1 else op for op, n in common[:_MOST_OPS])
    if len(common) > _MOST_OPS:
        counted += f", {sum(n for _, n in common[_MOST_OPS:])} more"
    name = site.name if site.distinct is None else f"{site.name} (distinct {site.distinct})"
    return (name, _nearer(site.where), counted, site.verdict, site.reason)


def _nearer(text: str) -> str:
    """Paths below the working directory, as seen from there."""
    return text.replace(os.getcwd() + os.sep, "")
