"""The names of a graph's items and of a program's calls, as reports show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..fx.plan import Item, PieceItem, Plan, SplitOpItem
from ..runtime.program import Program

__all__ = ["CallKind", "CallName", "name_calls", "name_items"]

CallKind = Literal["inputs", "replay", "piece", "split op", "metadata", "outputs"]

#: Ops that passes insert for a step's metadata.
_METADATA = ("pcg::prepare_", "pcg::pad_")


@dataclass(frozen=True)
class CallName:
    """What one call of a program is: a replay, a piece without a captured graph, a split op, or a step's metadata."""

    kind: CallKind
    name: str
    where: str


def name_items(plan: Plan) -> dict[int, str]:
    """The name of each item by its index; pieces are counted from 0, split ops have their op's name."""
    names: dict[int, str] = {}
    pieces = 0
    for item in plan.items:
        if isinstance(item, SplitOpItem):
            names[item.index] = item.op.name
        elif item.trivial:
            names[item.index] = "allocation or view"
        elif item.split_reason is not None:
            names[item.index] = "split op, compiled"
        else:
            names[item.index] = f"piece {pieces}"
            pieces += 1
    return names


def name_calls(plan: Plan, program: Program) -> list[CallName]:
    """What each of a program's calls is, in their order."""
    captured = {index for index, _ in program.capture_keys}
    names = name_items(plan)
    items = {item.index: item for item in plan.items}
    return [
        CallName(_kind(items[index], index in captured), names[index], items[index].where) for index in program.op_items
    ]


def _kind(item: Item, captured: bool) -> CallKind:
    if isinstance(item, PieceItem):
        return "replay" if captured else "split op" if item.split_reason is not None else "piece"
    return "metadata" if item.op.name.startswith(_METADATA) else "split op"
