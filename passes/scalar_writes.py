"""Refuses, or rewrites, Python numbers that are copied from the host into a tensor on the capture device.

``t[0] = 0`` leaves no dimension of ``t``: torch 2.11 to 2.14 make a scalar tensor of the 0 on the host and copy it,
which no CUDA graph can capture; with a dimension left, and on torch 2.15, it is a fill. The verdict follows what the
statement dispatched when the graph's facts were traced, so it is that of the running torch, on a CPU as on a GPU.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from pcg_compile.errors import GraphBreakingScalarWrite
from pcg_compile.fx.facts import NodeFacts, bodies_of, storage_of
from pcg_compile.fx.places import place_of

from .context import PassContext
from .hazard_rules import MADE_FROM_DATA, Finding, hazard_at
from .host_tensors import data_of
from .statements import assignment_of

_Number = (bool, int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool)


@functools.cache
def host_scalar_write() -> Literal["copies", "fills"]:
    """What ``t[0] = 0`` does on the running torch, a copy of a host scalar or a fill. Dispatched once; needs no GPU."""
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            seen.append(func.name().partition(".")[0])
            return func(*args, **(kwargs or {}))

    tensor = torch.ones(1, device="cpu")
    with Watch():
        tensor[0] = 0
    return "copies" if "aten::copy_" in seen else "fills"


def scalar_writes(gm: fx.GraphModule, context: PassContext) -> fx.GraphModule:
    """Refuses host scalar writes (``scalar_writes="reject"``), or makes device fills of them (``"rewrite"``).

    A tensor made of one Python number on the device (``torch.tensor(0.5, device=x.device)``) becomes a device fill in
    either case: it has the same value and dtype, and is reported as a hazard of the eager code. A CPU tensor beside a
    CUDA capture may be written to as one likes. The caller traces the facts anew, as the graph may have changed.

    Raises:
        GraphBreakingScalarWrite: the first such write, unless ``context.collect``: then each is a Hazard, and isolated.
    """
    changed = _visit(gm, context, context.facts)
    if changed:
        gm.graph.lint()
        gm.recompile()
    return gm


def _visit(gm: fx.GraphModule, context: PassContext, facts: Mapping[fx.Node, NodeFacts]) -> bool:
    changed = False
    for node in list(gm.graph.nodes):
        if node not in facts or node.op not in ("call_function", "call_method"):
            continue
        for body, inner in bodies_of(gm, node, facts, context.notes):
            if _visit(body, context, inner):
                body.graph.lint()
                body.recompile()
                changed = True
        number = _device_scalar(node, context, facts)
        if number is not None:
            _fill_instead_of_copy(gm, node, number, context, facts)
            changed = True
        elif _copies_host_scalar(node, context, facts):
            if context.options.scalar_writes == "rewrite":
                _rewrite(gm, node, context, facts, _fill_view)
                changed = True
            else:
                _reject(node, context, facts)
        elif context.options.scalar_writes == "rewrite" and _indexes_with_tensors(node, context, facts):
            _rewrite(gm, node, context, facts, _put_device_value)
            changed = True
    return changed


def _target(node: fx.Node, context: PassContext, facts: Mapping[fx.Node, NodeFacts]) -> torch.Tensor | None:
    """The tensor on the capture device that a node assigns a Python number to."""
    if node.op != "call_function" or node.target is not operator.setitem or len(node.args) != 3:
        return None
    target, _, value = node.args
    tensor = facts[target].value if isinstance(target, fx.Node) and target in facts else None
    number = facts[value].value if isinstance(value, fx.Node) and value in facts else value
    if not isinstance(tensor, torch.Tensor) or not isinstance(number, _Number):
        return None
    return tensor if tensor.device.type == context.device.type else None


def _copies_host_scalar(node: fx.Node, context: PassContext, facts: Mapping[fx.Node, NodeFacts]) -> bool:
    tensor = _target(node, context, facts)
    if tensor is None:
        return False
    return any(
        call.op is torch.ops.aten.copy_.default
        and call.args[1].dim() == 0
        and storage_of(call.args[0]) == storage_of(tensor) != storage_of(call.args[1])
        for call in facts[node].ops
    )


def _indexes_with_tensors(node: fx.Node, context: PassContext, facts: Mapping[fx.Node, NodeFacts]) -> bool:
    """``t[index] = 4`` with integer tensors on the device: the 4 is copied to it."""
    if _target(node, context, facts) is None:
        return False
    index = node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    tensors = [facts[p].value for p in parts if isinstance(p, fx.Node) and isinstance(facts[p].value, torch.Tensor)]
    return (
        not any(isinstance(p, list) for p in parts)
        and any(t.dim() > 0 for t in tensors)
        and all(t.dtype not in (torch.bool, torch.uint8) and t.device.type == context.device.type for t in tensors)
    )


def _reject(node: fx.Node, context: PassContext, facts: Mapping[fx.Node, NodeFacts]) -> None:
    place = place_of(node)
    statement = assignment_of(node, place)
    what, why, cure = statement.refusal(facts[node.args[0]].value.device)  # type: ignore[index]
    cure += '   (or options={"scalar_writes": "rewrite"})'
    if not context.collect:
        raise GraphBreakingScalarWrite(what, str(place), why, cure)
    context.hazards.append(hazard_at(place, Finding("scalar write", f"{what}. {why}", cure), "setitem"))
    context.splits[node] = what


def _rewrite(
    gm: fx.GraphModule,
    node: fx.Node,
    context: PassContext,
    facts: Mapping[fx.Node, NodeFacts],
    write: Callable[[fx.Graph, fx.Node, torch.Tensor], str],
) -> None:
    place = place_of(node)
    statement = assignment_of(node, place)
    tensor = facts[node.args[0]].value  # type: ignore[index]
    with gm.graph.inserting_before(node):
        earlier = node.prev
        how = write(gm.graph, node, tensor)
        _inherit(earlier.next, node)
    gm.graph.erase_node(node)
    context.notes.append(f"`{statement}` at {place}: rewritten to {how}")


def _fill_view(graph: fx.Graph, node: fx.Node, tensor: torch.Tensor) -> str:
    target, index, value = node.args
    if _has_nodes(index):
        # Reading t[n] of a dynamic size n would fix the size.
        return _put_device_value(graph, node, tensor)
    view = graph.call_function(operator.getitem, (target, index))
    graph.call_method("fill_", (view, value))
    return "a fill on the device"


def _has_nodes(index: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(index, found.append)
    return bool(found)


def _put_device_value(graph: fx.Graph, node: fx.Node, tensor: torch.Tensor) -> str:
    target, index, value = node.args
    made = graph.call_function(torch.full, ((), value), {"dtype": tensor.dtype, "device": tensor.device})
    graph.call_function(operator.setitem, (target, index, made))
    return "a write of a value made on the device"


def _inherit(first: fx.Node, node: fx.Node) -> None:
    """Gives the new nodes before ``node`` its origin, so that messages and figures name the user's line."""
    current = first
    while current is not node:
        current.meta.update({k: v for k, v in node.meta.items() if k != "example_value"})
        current = current.next


def _device_scalar(
    node: fx.Node, context: PassContext, facts: Mapping[fx.Node, NodeFacts]
) -> bool | int | float | complex | None:
    """The number that a node puts on the capture device: ``torch.tensor(5, device=d)``, ``torch.tensor(5).to(d)``."""
    value = facts[node].value
    if not isinstance(value, torch.Tensor) or value.device.type != context.device.type or value.dim() != 0:
        return None
    source = node
    if node.op == "call_method" and node.target == "to" and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        moves = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, torch.device)]
        if not moves or source.kwargs.get("device") is not None:
            return None
    elif node.kwargs.get("device") is None:
        return None
    data = data_of(source, facts)
    if not isinstance(data, (bool, int, float, complex)) or any(
        source.kwargs.get(k) for k in ("requires_grad", "pin_memory")
    ):
        return None
    # Through the dtypes that the statement names, so that 0.1 as float32 stays that when it becomes float64.
    return torch.tensor(data, dtype=facts[source].value.dtype, device="cpu").to(value.dtype).item()


def _fill_instead_of_copy(
    gm: fx.GraphModule, node: fx.Node, number: Any, context: PassContext, facts: Mapping[fx.Node, NodeFacts]
) -> None:
    value, place = facts[node].value, place_of(node)
    with gm.graph.inserting_before(node):
        full = gm.graph.call_function(torch.full, ((), number), {"dtype": value.dtype, "device": value.device})
    _inherit(full, node)
    node.replace_all_uses_with(full)
    sources = node.all_input_nodes
    gm.graph.erase_node(node)
    for source in sources:
        if not source.users:
            gm.graph.erase_node(source)
    cure = f"Write: torch.full((), {number!r}, dtype={value.dtype}, device=x.device)"
    context.hazards.append(hazard_at(place, replace(MADE_FROM_DATA, cure=cure), "torch.tensor"))
    context.notes.append(f"torch.tensor({number!r}) on {value.device} at {place}: rewritten to a fill on the device")
