"""What pcg did to a model, and why it did not do more."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from io import StringIO
from typing import Any

import torch
from rich.console import Console

from ..errors import Hazard
from ..fx.plan import PieceItem
from ..registry import forget, is_compiled, runtimes, stats
from ..runtime.ahead_of_time import WarmUp, warm_up_context
from ..stats import COUNTS, Stats
from ..torch_compat.dynamo_graphs import graph_breaks
from ..torch_compat.dynamo_traces import compile_for_all_sizes
from ..warmup import mark_sizes
from .render import as_html, as_rich, longest_path
from .timeline import Timeline, time_step
from .trial_compile import CheckBackend, ReportBackend, compile_apart, hazards_of_breaks

__all__ = ["GraphReport", "ItemReport", "PassReport", "Report", "check", "explain"]


@dataclass(frozen=True)
class ItemReport:
    """One piece or split op: its place in the graph, the user's line, and the verdict on it.

    ``distinct`` numbers what was compiled: pieces with the same number share it. None for what is no piece.
    """

    kind: str
    name: str
    ops: tuple[str, ...]
    where: str
    verdict: str
    reason: str
    distinct: int | None


@dataclass(frozen=True)
class PassReport:
    """One pass: what it made of the graph; each finding with its reason and the user's line."""

    name: str
    verdict: str
    findings: tuple[str, ...]


@dataclass(frozen=True)
class GraphReport:
    """One graph of Dynamo's: its dynamic sizes, its items in order, what the passes noted and found.

    ``timeline`` is of one step with the arguments that ``explain`` was given; None where it was given none.
    """

    sizes: tuple[str, ...]
    items: tuple[ItemReport, ...]
    notes: tuple[str, ...]
    hazards: tuple[Hazard, ...]
    refusal: str | None
    passes: tuple[PassReport, ...] = ()
    timeline: Timeline | None = None
    #: Host time from the call to the graph, of the first graph: Dynamo's share and that of pcg's wrapper; and the way.
    entry_seconds: float | None = None
    entry: str = ""


#: Of a printed report, in characters, its longest path left aside.
_WIDTH = 120


@dataclass(frozen=True)
class Report:
    """The graphs of a model and the figures so far. Prints as tables, draws in a notebook."""

    graphs: tuple[GraphReport, ...]
    stats: Stats

    def __str__(self) -> str:
        out = StringIO()
        paths = longest_path(self)
        Console(file=out, width=_WIDTH + paths).print(*as_rich(self, min_places=paths), sep="\n")
        return out.getvalue()

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from as_rich(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def to_json(self) -> str:
        """All of it as JSON; times in seconds."""
        figures = {name: getattr(self.stats, name) for name in COUNTS}
        buckets = {
            str(size): {**asdict(use), "mean_padding": use.mean_padding} for size, use in self.stats.buckets.items()
        }
        falls = [asdict(f) for f in self.stats.fallbacks]
        sizes = {str(size): steps for size, steps in self.stats.sizes.items()}
        graphs = [asdict(graph) for graph in self.graphs]
        everything = {**figures, "buckets": buckets, "fallbacks": falls, "sizes": sizes}
        return json.dumps({"graphs": graphs, "stats": everything}, indent=1)

    def plot(self) -> Any:
        """A matplotlib ``Figure`` of two axes: the timeline of one step, and padding by bucket.

        The step's calls (replays, split ops, the copies around them) are bars as long as they took, gaps are what the
        host spent between them. There is a timeline where ``explain`` was given a call's arguments.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .plots import plot_report

        return plot_report(self)


def explain(model: Any, *args: Any, **kwargs: Any) -> Report:
    """The report on a model for one call's arguments; nothing is captured and nothing has effects.

    The call runs a few times to time it: from captured graphs where its bucket has them by now, else without.

    Args:
        model: what ``torch.compile(model, backend="pcg")`` or ``@pcg.piecewise`` gave; a module that has it as its
            forward or among its children; or a plain module or function, which is then compiled for the report alone.
        args, kwargs: one call's; inside ``pcg.step()`` where the model uses paged attention.
    """
    if is_compiled(model):
        return _report(model, model, args, kwargs)
    backend = ReportBackend({})
    try:
        return _report(compile_apart(model, backend), _Owned(backend), args, kwargs)
    finally:
        forget(backend)


def _report(compiled: Any, owner: Any, args: Any, kwargs: Any) -> Report:
    timelines: dict[int, Timeline] = {}

    def observe(runtime: Any, call: Any, step: Any) -> None:
        timelines[id(runtime)] = time_step(runtime, call, step)

    if args or kwargs or not runtimes(owner):
        request = WarmUp(buckets=[], observe=observe)
        with warm_up_context(request), compile_for_all_sizes(lambda: mark_sizes(args, kwargs)), torch.no_grad():
            compiled(*args, **kwargs)
    found = [_graph(runtime, timelines.get(id(runtime))) for runtime in runtimes(owner)]
    if timelines and found:
        function = getattr(compiled, "__pcg_function__", None)
        found[0] = replace(found[0], entry_seconds=_entry_seconds(compiled, args, kwargs), entry=_way(function))
    return Report(tuple(found), stats(owner))


def _entry_seconds(compiled: Any, args: Any, kwargs: Any) -> float:
    """Host time from a call to the first graph's first line, the shortest of three; nothing has effects."""
    found = []
    for _ in range(3):
        request = WarmUp(buckets=[])
        with warm_up_context(request), torch.no_grad():
            began = time.perf_counter()
            compiled(*args, **kwargs)
        found.append(request.began - began)
    return min(found)


def _way(function: Any) -> str:
    if function is None or function.guards != "inputs":
        return "through Dynamo, which evaluates its guards"
    return "without Dynamo" if function.fast else f"through Dynamo: {function.slow}"


class _Owned:
    """Stands for what a private backend compiled."""

    def __init__(self, owner: object) -> None:
        self.__pcg_owner__ = owner


def _graph(runtime: Any, timeline: Timeline | None) -> GraphReport:
    plan, context = runtime.plan, runtime.context
    distinct: dict[int, int] = {}
    items: list[ItemReport] = []
    for item in plan.items:
        if not isinstance(item, PieceItem):
            name = f"split op, {item.mode}"
            items.append(
                ItemReport("split op", name, (_op(item.node),), item.where, "between pieces", item.reason, None)
            )
            continue
        ops = tuple(_op(n) for n in item.piece.gm.graph.nodes if n.op.startswith("call_"))
        if item.split_reason is not None:
            name = item.name
            items.append(ItemReport("split op", name, ops, item.where, "between pieces", item.split_reason, None))
            continue
        number = distinct.setdefault(id(item.compiled), len(distinct)) if not item.trivial else None
        verdict, reason = _verdict(item)
        items.append(ItemReport("piece", item.name, ops, item.where, verdict, reason, number))
    passes = [_pass(name, notes, hazards) for name, notes, hazards in context.outcomes]
    return GraphReport(
        tuple(map(str, plan.symbols)),
        tuple(items),
        tuple(context.notes),
        tuple(context.hazards),
        plan.refusal,
        (*passes, _padding_safety(plan)),
        timeline,
    )


def _pass(name: str, notes: list[str], hazards: list[Hazard]) -> PassReport:
    found = [f"{h.kind}: {h.op}: {h.reason} ({h.file or 'an unknown file'}:{h.line}); {h.cure}" for h in hazards]
    verdicts = [f"{len(hazards)} found"] if hazards else []
    if any("real rows only" not in note for note in notes):
        verdicts.append("rewrote the graph")
    return PassReport(name, ", ".join(verdicts) or "nothing to do", (*found, *notes))


def _padding_safety(plan: Any) -> PassReport:
    """The verdict on padding rows: of each kind how many pieces, and why those that are not simply row-wise."""
    pieces = [item for item in plan.items if isinstance(item, PieceItem) and item.is_piece]
    kinds: dict[str, int] = {}
    findings = []
    for item in pieces:
        if item.safety is None:
            continue
        kinds[item.safety.kind] = kinds.get(item.safety.kind, 0) + 1
        if item.safety.kind != "row-wise":
            findings.append(f"{item.name}: {item.safety.kind}: {item.safety.reason} ({item.safety.where})")
    return PassReport("padding_safety", ", ".join(f"{n} {kind}" for kind, n in kinds.items()), tuple(findings))


def _verdict(item: PieceItem) -> tuple[str, str]:
    if item.trivial:
        return "nothing to capture", ""
    if item.refusal is not None:
        return "exact size, not captured", item.refusal
    if not item.needs_probe:
        return "captured", item.safety.kind if item.safety is not None else ""
    if item.probed is None:
        return "to be probed", item.safety.reason
    return ("probed", item.safety.reason) if item.probed == "" else ("exact size, not captured", item.probed)


def _op(node: Any) -> str:
    return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")


def check(model: Any, *args: Any, **kwargs: Any) -> list[Hazard]:
    """What a capture of the model could not hold, and where padding would change a number.

    Nothing is compiled or captured; the model runs once, eagerly. An empty list means that all of it can be captured.
    What Dynamo breaks the graph at because it depends on data (``x.item()``, ``if x.any():``) is listed too: it runs
    eagerly between two graphs, and waits for the device. Other breaks are not.
    """
    backend = CheckBackend({})
    plain = getattr(model, "_orig_mod", None) or getattr(model, "__wrapped__", None) or model
    compiled = compile_apart(plain, backend)
    with graph_breaks() as breaks, compile_for_all_sizes(lambda: mark_sizes(args, kwargs)), torch.no_grad():
        compiled(*args, **kwargs)
    return [*backend.hazards, *hazards_of_breaks(breaks)]
