"""The pieces and split ops of a graph, as reports show them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..fx.places import module_of
from ..fx.plan import Item, PieceItem, Plan
from ..torch_compat.structured_trace import add_artifact

__all__ = ["ItemReport", "add_plan", "items_of"]


@dataclass(frozen=True)
class ItemReport:
    """One piece or split op of a graph.

    Attributes:
        kind: "piece" or "split op".
        name: ``piece 3``, counted alike in all reports, or the op's name.
        module: the path of its module; of a piece that spans several, the first and the last.
        ops: what it runs, in order.
        where: the line of the user's code.
        verdict, reason: what became of it, and why.
        distinct: pieces with the same number share their compiled code; None for what is no piece.
    """

    kind: str
    name: str
    module: str
    ops: tuple[str, ...]
    where: str
    verdict: str
    reason: str
    distinct: int | None

    def __str__(self) -> str:
        return f"{self.name:24}  {self.verdict} ({self.reason})  {self.module}  {self.where}"


def add_plan(plan: Plan, number: Any) -> None:
    """Adds a graph after the passes, and its pieces, to the log of ``TORCH_TRACE``."""
    add_artifact("pcg_graph", lambda: plan.gm.print_readable(print_output=False), number)
    add_artifact("pcg_pieces", lambda: "\n".join(map(str, items_of(plan))), number)


def items_of(plan: Plan) -> Iterator[ItemReport]:
    """The pieces and split ops of a plan, in order."""
    distinct: dict[int, int] = {}
    ops: tuple[str, ...]
    for item in plan.items:
        number = None
        if not isinstance(item, PieceItem):
            rows = "padding request" if item.mode == "request" else "real rows only"
            kind, ops, verdict, reason = "split op", (_op(item.node),), f"between pieces, {rows}", item.reason
        else:
            ops = tuple(_op(node) for node in item.piece.gm.graph.nodes if node.op.startswith("call_"))
            kind, (verdict, reason) = "piece", _verdict(item)
            if item.split_reason is not None:
                kind, verdict, reason = "split op", "between pieces, compiled", item.split_reason
            elif not item.trivial:
                number = distinct.setdefault(id(item.compiled), len(distinct))
        yield ItemReport(kind, item.name, _modules(item), ops, item.where, verdict, reason, number)


def _modules(item: Item) -> str:
    if not isinstance(item, PieceItem):
        return item.module
    last = next((node for node in reversed(item.piece.graph.nodes) if node.op.startswith("call_")), None)
    end = module_of(last) if last is not None else ""
    return f"{item.module} .. {end}" if item.module and end not in ("", item.module) else item.module or end


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
