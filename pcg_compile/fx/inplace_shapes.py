"""Ops that change a tensor's shape in place become views; ops that give their argument itself are left out.

``t.unsqueeze_(0)`` changes the object ``t``, which a replay could not do to a static buffer, and from then on every
name of the object has the new shape. In a graph the same is said by a view that all later readers of the object get.
Dropout that drops nothing gives its argument, and what is written to its result is written to the argument; torch's
fake tensors, and its decompositions, show a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from .node_facts import NodeFacts, tensors_in

#: What changes a shape in place and has a view that gives the same.
_VIEWS = {f"{name}_": name for name in ("as_strided", "squeeze", "swapaxes", "swapdims", "t", "transpose", "unsqueeze")}


def without_idle_dropout(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph, with a dropout's argument in place of its result where it drops nothing."""
    idle = [
        node
        for node in gm.graph.find_nodes(op="call_function", target=F.dropout)
        if _drops_nothing(*node.args, **node.kwargs)
    ]
    for node in idle:
        (argument,) = node.all_input_nodes
        node.replace_all_uses_with(argument)
        gm.graph.erase_node(node)
    if idle:
        gm.recompile()
    return gm


def _drops_nothing(input: fx.Node, p: Any = 0.5, training: Any = True, inplace: Any = False) -> bool:
    return training is False or (type(p) in (int, float) and p == 0)


def shape_by_views(gm: fx.GraphModule, facts: Mapping[fx.Node, NodeFacts]) -> bool:
    """Replaces ops that change a shape in place; an argument of the call keeps them, since its caller sees them.

    Returns whether the graph changed.
    """
    arguments = {
        id(tensor) for node in gm.graph.find_nodes(op="placeholder") for tensor in tensors_in(facts[node].value)
    }
    changed = False
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    #: The nodes whose value is one tensor object.
    names: dict[int, list[fx.Node]] = {}
    for node in list(gm.graph.nodes):
        if node not in facts:
            continue
        value = facts[node].value
        view, changes = _view_of(node), node.args[0] if node.args else None
        if view is not None and isinstance(changes, fx.Node) and id(facts[changes].value) not in arguments:
            node.target = view
            known = names[id(facts[changes].value)]
            for name in known:
                for user in [user for user in name.users if order[user] > order[node]]:
                    user.replace_input_with(name, node)
            known.append(node)
            names[id(value)] = known
            changed = True
        elif isinstance(value, torch.Tensor):
            names.setdefault(id(value), []).append(node)
    if changed:
        gm.recompile()
    return changed


def _view_of(node: fx.Node) -> str | Callable[..., Any] | None:
    """What gives the same as a view, for a node that changes a shape in place."""
    target: Any = node.target
    if node.op == "call_method":
        return _VIEWS.get(target)
    if node.op != "call_function":
        return None
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        full = target.name() if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        namespace, _, name = full.partition(".")[0].partition("::")
        return getattr(torch.ops.aten, _VIEWS[name]) if namespace == "aten" and name in _VIEWS else None
    for name, view in _VIEWS.items():
        if target in (getattr(torch, name, None), getattr(torch.Tensor, name)):
            function: Callable[..., Any] = getattr(torch.Tensor, view)
            return function
    return None
