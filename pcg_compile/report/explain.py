"""What pcg did to a model, and why it did not do more."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..errors import Hazard
from ..fx.places import name_of_input
from ..fx.plan import PieceItem, Plan
from ..registry import forget, is_compiled, runtimes, stats
from ..runtime.ahead_of_time import WarmUp, warm_up_context
from ..torch_compat.dynamo_graphs import graph_breaks
from ..torch_compat.dynamo_traces import compile_for_all_sizes
from ..warmup import mark_sizes
from .items import items_of
from .render import GraphReport, PassReport, Report
from .timeline import Timeline, time_step
from .trial_compile import CheckBackend, ReportBackend, compile_apart, hazards_of_breaks

__all__ = ["Hazards", "Report", "check", "explain"]


class Hazards(list[Hazard]):
    """A list of :class:`pcg_compile.errors.Hazard` that prints for people."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) if self else "nothing found"

    __repr__ = __str__


def explain(model: Any, *args: Any, **kwargs: Any) -> Report:
    """Returns the report on a model for one call's arguments; nothing is captured and nothing has effects.

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
            try:
                compiled(*args, **kwargs)
            except Exception:
                # It was called on a guess, and may raise anything without arguments: the report says "not compiled".
                if args or kwargs:
                    raise
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
    passes = [_pass(name, notes, hazards) for name, notes, hazards in context.outcomes]
    return GraphReport(
        tuple(_size_names(plan)),
        tuple(items_of(plan)),
        tuple(context.notes),
        tuple(context.hazards),
        plan.refusal,
        (*passes, _padding_safety(plan)),
        timeline,
    )


def _size_names(plan: Plan) -> Iterator[str]:
    """What the user calls each dynamic size: ``ids.shape[0]``."""
    inputs = {spec.position: spec.node for spec in plan.inputs}
    for position, dim in plan.sizes:
        name = re.sub(r"^(?:kw)?args\['(\w+)'\]", r"\1", name_of_input(inputs[position]))
        yield name.replace(".size()[", ".shape[") + (f".shape[{dim}]" if dim >= 0 else "")


def _pass(name: str, notes: list[str], hazards: list[Hazard]) -> PassReport:
    found = [f"{h.kind}: {h.op}: {h.reason} ({h.file or 'an unknown file'}:{h.line}); {h.cure}" for h in hazards]
    verdicts = [f"{len(hazards)} found"] if hazards else []
    if any("real rows only" not in note for note in notes):
        verdicts.append("rewrote the graph")
    return PassReport(name, ", ".join(verdicts) or "nothing to do", (*found, *notes))


def _padding_safety(plan: Plan) -> PassReport:
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


def check(model: Any, *args: Any, **kwargs: Any) -> Hazards:
    """Returns what cannot be captured, and where padding would change results; empty if all of it can be captured.

    Nothing is compiled or captured; the model runs once, eagerly. Graph breaks that depend on data (``x.item()``,
    ``if x.any():``) are listed too: what breaks there runs eagerly between two graphs, and waits for the device. Other
    graph breaks are not listed.

    Args:
        model: a module or function, compiled or not.
        args, kwargs: one call's; inside ``pcg.step()`` if the model uses paged attention.
    """
    backend = CheckBackend({})
    plain = getattr(model, "_orig_mod", None) or getattr(model, "__wrapped__", None) or model
    compiled = compile_apart(plain, backend)
    with graph_breaks() as breaks, compile_for_all_sizes(lambda: mark_sizes(args, kwargs)), torch.no_grad():
        compiled(*args, **kwargs)
    return Hazards([*backend.hazards, *hazards_of_breaks(breaks)])
