"""Which LoRA layers can be served by one call: those that read the same x, such as q, k and v, or gate and up.

The call stands where the first of them stood, behind what the others write, which moves up. That is the same
computation where nothing in between is written, looks at what the group writes, or has an effect that cannot be seen.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from pcg_compile.fx.facts import NodeFacts, alias_of
from pcg_compile.fx.sizes import is_scalar, leaves_of
from pcg_compile.lora.packed import MOST_SLICES

#: Nodes that move up for one layer: a linear layer in one op or two, and views.
_MOST_MOVED = 4


@dataclass(frozen=True)
class LoRACall:
    """One ``pcg::lora``: arguments by name, pool and routing, slices, and what else calls of a group share."""

    node: fx.Node
    given: Mapping[str, Any]
    routing: tuple[int, tuple[Hashable, ...]]
    slices: int
    shared: tuple[Hashable, ...]


@dataclass
class _Group:
    calls: list[LoRACall]
    #: Nodes behind the first call, with the storages that each touches.
    behind: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    moved: list[fx.Node] = field(default_factory=list)


def group_calls(
    graph: fx.Graph, calls: Sequence[LoRACall], facts: Mapping[fx.Node, NodeFacts], apart: Collection[fx.Node]
) -> list[tuple[list[LoRACall], list[fx.Node]]]:
    """The calls in groups, each with the nodes that move ahead of its first call, in order.

    Args:
        apart: nodes that run between pieces.
    """
    by_node = {call.node: call for call in calls}
    groups: list[_Group] = []
    group: _Group | None = None
    for node in graph.nodes:
        call = by_node.get(node)
        if call is not None:
            if group is None or not _join(group, call, facts):
                group = _Group([call])
                groups.append(group)
        elif group is not None:
            if node in apart or not _is_plain(node, facts[node]):
                group = None
            else:
                group.behind[node] = _touched(node, facts)
    return [(group.calls, group.moved) for group in groups]


def _join(group: _Group, call: LoRACall, facts: Mapping[fx.Node, NodeFacts]) -> bool:
    """Adds a call to a group if it may run where the group's first does."""
    first = group.calls[0]
    if (call.routing, call.shared) != (first.routing, first.shared):
        return False
    if sum(one.slices for one in (*group.calls, call)) > MOST_SLICES:
        return False
    written = frozenset[int]().union(*(alias_of(facts[one.given["y"]].value) for one in group.calls))
    mine = alias_of(facts[call.given["y"]].value)
    read = [one.given[name] for one in (*group.calls, call) for name in ("x", "factors")]
    if mine & written or any((mine | written) & alias_of(facts[node].value) for node in read):
        return False
    moved = _needed(call.node, group.behind, set(group.moved))
    if moved is None or any(_random(facts[node]) for node in moved):
        return False
    for node, touched in group.behind.items():
        # What moves must not look at what the group writes; what stays must not look at what it would write sooner.
        if touched & (written if node in moved else mine):
            return False
    group.calls.append(call)
    group.moved.extend(moved)
    return True


def _needed(call: fx.Node, behind: Mapping[fx.Node, Any], moved: Collection[fx.Node]) -> list[fx.Node] | None:
    """The nodes behind the group's first call that a call needs, in order; None if they are many."""
    needed: set[fx.Node] = set()
    open_nodes = list(call.all_input_nodes)
    while open_nodes:
        node = open_nodes.pop()
        if node in behind and node not in moved and node not in needed:
            needed.add(node)
            open_nodes.extend(node.all_input_nodes)
            if len(needed) > _MOST_MOVED:
                return None
    return [node for node in behind if node in needed]


def _touched(node: fx.Node, facts: Mapping[fx.Node, NodeFacts]) -> frozenset[int]:
    return alias_of([facts[n].value for n in (node, *node.all_input_nodes)])


def _is_plain(node: fx.Node, facts: NodeFacts) -> bool:
    """Whether a node only computes a value, by ops of PyTorch's own, other than attention."""
    if node.op not in ("call_function", "call_method", "get_attr") or facts.writes:
        return False
    names = [str(call.op) for call in facts.ops]
    if names:
        return all(name.startswith(("aten.", "prim.device")) and "attention" not in name for name in names)
    # Numbers, and what comes out of tuples; what sets a state gives nothing, or an object of its own.
    leaves = list(leaves_of(facts.value))
    return all(leaf is not None and (isinstance(leaf, torch.Tensor) or is_scalar(leaf)) for leaf in leaves)


def _random(facts: NodeFacts) -> bool:
    return any(torch.Tag.nondeterministic_seeded in getattr(call.op, "tags", ()) for call in facts.ops)
