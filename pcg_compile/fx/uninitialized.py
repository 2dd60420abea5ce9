"""Results that a piece allocates and leaves as they come, for an op behind it to fill: they hold anything."""

from __future__ import annotations

from .facts import alias_of, storage_of
from .plan import PieceItem, Plan, SplitOpItem

_UNINITIALIZED = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
#: What a trace shows beside them, and computes nothing.
_QUERIES = frozenset({"prim::device"})


def uninitialized_results(plan: Plan, item: PieceItem) -> frozenset[int]:
    """Positions of a piece's results that nothing has written when the piece ends."""
    behind = next((s.node for s in plan.items[item.index + 1 :] if isinstance(s, SplitOpItem)), None)
    made: dict[int, bool] = {}
    for node in plan.gm.graph.nodes:
        if node is behind:
            break
        facts = plan.facts.get(node)
        if facts is None or node.op in ("placeholder", "output"):
            continue
        names = {call.op.name().partition(".")[0] for call in facts.ops if hasattr(call.op, "name")} - _QUERIES
        # Some ops allocate memory for a use of their own, beside the results that they compute.
        uninitialized = bool(names) and names <= _UNINITIALIZED
        for storage in alias_of(facts.value):
            made.setdefault(storage, uninitialized)
        made.update(dict.fromkeys(facts.writes, False))
    return frozenset(i for i, node in enumerate(item.outputs) if made.get(storage_of(plan.value(node)), False))
