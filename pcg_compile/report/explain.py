"""What pcg did to a model, and why it did not do more."""

from __future__ import annotations

import html
import json
from collections import Counter
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..errors import Hazard
from ..graph.plan import PieceSite
from ..registry import runtimes, stats
from ..runtime.graph import WarmUp, warming_up
from ..torch_internals import compile_for_all_sizes
from ..warmup import mark_sizes
from .private import CheckBackend, ReportBackend, is_compiled
from .stats import Stats

__all__ = ["GraphReport", "Report", "SiteReport", "check", "explain"]


@dataclass(frozen=True)
class SiteReport:
    """One piece or split op: its place in the graph, the user's line, and the verdict on it."""

    kind: str
    name: str
    ops: tuple[str, ...]
    where: str
    verdict: str
    reason: str
    distinct: int | None


@dataclass(frozen=True)
class GraphReport:
    """One graph of Dynamo's: its dynamic sizes, its sites in order, what the passes noted and found."""

    sizes: tuple[str, ...]
    sites: tuple[SiteReport, ...]
    notes: tuple[str, ...]
    hazards: tuple[Hazard, ...]
    refusal: str | None


@dataclass(frozen=True)
class Report:
    """The graphs of a model and the figures so far. Prints as a table, draws in a notebook."""

    graphs: tuple[GraphReport, ...]
    stats: Stats

    def __str__(self) -> str:
        out = StringIO()
        self._render(Console(file=out, width=140))
        return out.getvalue()

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from self._tables()

    def _repr_html_(self) -> str:
        """For notebooks; everything that comes from the model is escaped."""
        rows = [
            "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in (i, *_cells(site))) + "</tr>"
            for i, graph in enumerate(self.graphs)
            for site in graph.sites
        ]
        head = "".join(f"<th>{name}</th>" for name in ("graph", *_COLUMNS))
        notes = "".join(f"<li>{html.escape(note)}</li>" for graph in self.graphs for note in graph.notes)
        falls = "".join(f"<li>{html.escape(f'{f.count} x {f.reason} {f.where}')}</li>" for f in self.stats.fallbacks)
        return f"<table><tr>{head}</tr>{''.join(rows)}</table><ul>{notes}</ul><b>Fallbacks</b><ul>{falls}</ul>"

    def to_json(self) -> str:
        """All of it as JSON."""
        figures = {
            k: getattr(self.stats, k)
            for k in ("steps", "graphs", "pieces", "capturable", "compiled", "captured", "replays")
        }
        buckets = {str(size): asdict(use) for size, use in self.stats.buckets.items()}
        falls = [asdict(f) for f in self.stats.fallbacks]
        graphs = [asdict(graph) for graph in self.graphs]
        return json.dumps({"graphs": graphs, "stats": {**figures, "buckets": buckets, "fallbacks": falls}}, indent=1)

    def _render(self, console: Console) -> None:
        for table in self._tables():
            console.print(table)

    def _tables(self) -> Any:
        for i, graph in enumerate(self.graphs):
            sizes = ", ".join(graph.sizes) or "none"
            table = Table(*_COLUMNS, title=f"graph {i}, dynamic sizes: {sizes}", caption=graph.refusal)
            for site in graph.sites:
                table.add_row(*map(_escaped, _cells(site)))
            yield table
            for note in graph.notes:
                yield _escaped(f"  {note}")
            for hazard in graph.hazards:
                yield _escaped(f"  hazard: {hazard.kind}: {hazard.reason} ({hazard.file}:{hazard.line}); {hazard.cure}")
        if self.stats.buckets:
            table = Table("bucket", "steps", "mean padding", "seconds", "MiB", title="buckets")
            for size, use in self.stats.buckets.items():
                waste = f"{use.padded_tokens / use.tokens - 1:.0%}" if use.tokens else ""
                table.add_row(str(size), str(use.hits), waste, f"{use.seconds:.3f}", f"{use.bytes / 2**20:.1f}")
            yield table
        for fall in self.stats.fallbacks:
            yield _escaped(f"  fallback, {fall.count} times: {fall.reason} {fall.where}")

    def plot(self) -> Any:
        """Padding waste by bucket, as a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3))
        axes = figure.add_subplot()
        sizes = list(self.stats.buckets)
        tokens = [self.stats.buckets[s].tokens for s in sizes]
        padding = [self.stats.buckets[s].padded_tokens - t for s, t in zip(sizes, tokens, strict=True)]
        axes.bar(range(len(sizes)), tokens, label="tokens")
        axes.bar(range(len(sizes)), padding, bottom=tokens, label="padding")
        axes.set_xticks(range(len(sizes)), [str(s) for s in sizes])
        axes.set_xlabel("bucket")
        axes.legend()
        return figure


_COLUMNS = ("", "where", "ops", "verdict", "why")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _cells(site: SiteReport) -> tuple[str, ...]:
    counted = ", ".join(f"{n} {op}" if n > 1 else op for op, n in Counter(site.ops).most_common(6))
    name = site.name if site.distinct is None else f"{site.name} (distinct {site.distinct})"
    return (name, site.where, counted, site.verdict, site.reason)


def explain(model: Any, *args: Any, **kwargs: Any) -> Report:
    """The report on a model for one call's arguments; nothing is recorded and nothing has effects.

    Args:
        model: what ``torch.compile(model, backend="pcg")`` or ``@pcg.piecewise`` gave, or a plain module or function,
            which is then compiled for the report alone. args, kwargs: one call's; inside ``pcg.step()`` where the
            model uses paged attention.
    """
    compiled, owner = model, model
    if not is_compiled(model):
        backend = ReportBackend({})
        compiled = torch.compile(model, backend=backend)
        owner = _Owned(backend)
    if args or kwargs or not runtimes(owner):
        with warming_up(WarmUp(buckets=[])), compile_for_all_sizes(lambda: mark_sizes(args, kwargs)), torch.no_grad():
            compiled(*args, **kwargs)
    return Report(tuple(_graph(runtime) for runtime in runtimes(owner)), stats(owner))


class _Owned:
    """Stands for what a private backend compiled."""

    def __init__(self, owner: object) -> None:
        self.__pcg_owner__ = owner


def _graph(runtime: Any) -> GraphReport:
    plan, context = runtime.plan, runtime.context
    distinct: dict[int, int] = {}
    sites: list[SiteReport] = []
    pieces = 0
    for site in plan.sites:
        if isinstance(site, PieceSite):
            ops = tuple(_op(n) for n in site.piece.gm.graph.nodes if n.op.startswith("call_"))
            if site.split_reason is not None:
                sites.append(
                    SiteReport(
                        "split op", "split op, compiled", ops, site.where, "between pieces", site.split_reason, None
                    )
                )
                continue
            number = distinct.setdefault(id(site.compiled), len(distinct)) if not site.trivial else None
            name = "allocation or view" if site.trivial else f"piece {pieces}"
            pieces += not site.trivial
            verdict, reason = _verdict(site)
            sites.append(SiteReport("piece", name, ops, site.where, verdict, reason, number))
        else:
            sites.append(
                SiteReport(
                    "split op",
                    f"split op, {site.mode}",
                    (_op(site.node),),
                    site.where,
                    "between pieces",
                    site.reason,
                    None,
                )
            )
    return GraphReport(
        tuple(map(str, plan.symbols)), tuple(sites), tuple(context.notes), tuple(context.hazards), plan.refusal
    )


def _verdict(site: PieceSite) -> tuple[str, str]:
    if site.trivial:
        return "nothing to record", ""
    if site.refusal is not None:
        return "exact size, not recorded", site.refusal
    if site.needs_probe:
        return (
            ("to be probed", site.safety.reason)
            if site.probed is None
            else (("probed", site.safety.reason) if site.probed == "" else ("exact size, not recorded", site.probed))
        )
    return "recorded", site.safety.kind if site.safety is not None else ""


def _op(node: Any) -> str:
    return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")


def check(model: Any, *args: Any, **kwargs: Any) -> list[Hazard]:
    """What a recording of the model could not hold, and where padding would change a number.

    Nothing is compiled or recorded; the model runs once, eagerly. An empty list means that all of it can be recorded.
    """
    backend = CheckBackend({})
    plain = getattr(model, "_orig_mod", None) or getattr(model, "__wrapped__", None) or model
    compiled = torch.compile(plain, backend=backend)
    with compile_for_all_sizes(lambda: mark_sizes(args, kwargs)), torch.no_grad():
        compiled(*args, **kwargs)
    return backend.hazards
