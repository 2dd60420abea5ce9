"""Refuses, or rewrites, Python numbers that are copied from the host into a tensor on the capture device.

``t[0] = 0`` leaves no dimension of ``t``: torch 2.11 to 2.14 make a scalar tensor of the 0 on the host and copy it,
which no CUDA graph can capture; with a dimension left, and on torch 2.15, it is a fill. The verdict follows what the
statement dispatched when the graph's facts were traced, so it is that of the running torch, on a CPU as on a GPU.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.node import map_arg

from pcg_compile.errors import GraphBreakingScalarWrite, message
from pcg_compile.fx.facts import NodeFacts, OpCall, OpCalls, bodies_of, storage_of
from pcg_compile.fx.places import place_of

from .context import PassContext
from .hazard_rules import MADE_FROM_DATA, Finding, hazard_at
from .host_tensors import data_of
from .statements import assignment_of

_PLAIN_NUMBERS = (bool, int, float, complex)
_NUMBERS = (*_PLAIN_NUMBERS, torch.SymInt, torch.SymFloat, torch.SymBool)


@functools.cache
def host_scalar_write() -> Literal["copies", "fills"]:
    """What ``t[0] = 0`` does on the running torch, a copy of a host scalar or a fill. Dispatched once; needs no GPU."""
    calls: list[OpCall] = []
    tensor = torch.ones(1, device="cpu")
    with OpCalls(calls):
        tensor[0] = 0
    return "copies" if any(call.op is torch.ops.aten.copy_.default for call in calls) else "fills"


def scalar_writes(gm: fx.GraphModule, context: PassContext) -> fx.GraphModule:
    """Refuses host scalar writes (``scalar_writes="reject"``), or makes device fills of them (``"rewrite"``).

    A tensor made of one Python number on the device (``torch.tensor(0.5, device=x.device)``) becomes a device fill in
    either case: it has the same value and dtype, and is reported as a hazard of the eager code. A CPU tensor beside a
    CUDA capture may be written freely. The caller traces the facts again, as the graph may have changed.

    Raises:
        GraphBreakingScalarWrite: the first such write, unless ``context.collect``: then each is a Hazard, and isolated.
    """
    _Writes(gm, context, context.facts).visit()
    return gm


@dataclass
class _Writes:
    """The writes of one graph, which may be the body of an op of a higher order."""

    gm: fx.GraphModule
    context: PassContext
    facts: Mapping[fx.Node, NodeFacts]

    def visit(self) -> bool:
        """Whether the graph, or one inside it, was changed."""
        rewrites, changed = self.context.options.scalar_writes == "rewrite", False
        for node in list(self.gm.graph.nodes):
            if node not in self.facts or node.op not in ("call_function", "call_method"):
                continue
            for body, inner in bodies_of(self.gm, node, self.facts, self.context.notes):
                changed |= _Writes(body, self.context, inner).visit()
            number, target = self._device_scalar(node), self._target(node)
            if number is not None:
                self._fill_instead_of_copy(node, number)
            elif target is not None and self._copies_host_scalar(node, target):
                if not rewrites:
                    self._reject(node, target)
                    continue
                self._rewrite(node, target, view=True)
            elif target is not None and rewrites and self._indexes_with_tensors(node):
                self._rewrite(node, target, view=False)
            else:
                continue
            changed = True
        if changed:
            self.gm.graph.lint()
            self.gm.recompile()
        return changed

    def _target(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor on the capture device that a node assigns a Python number to."""
        if node.op != "call_function" or node.target is not operator.setitem or len(node.args) != 3:
            return None
        tensor, _, number = (self.facts[a].value if isinstance(a, fx.Node) else a for a in node.args)
        if not isinstance(tensor, torch.Tensor) or not isinstance(number, _NUMBERS):
            return None
        return tensor if tensor.device.type == self.context.device.type else None

    def _copies_host_scalar(self, node: fx.Node, tensor: torch.Tensor) -> bool:
        return any(
            call.op is torch.ops.aten.copy_.default
            and call.args[1].dim() == 0
            and storage_of(call.args[0]) == storage_of(tensor) != storage_of(call.args[1])
            for call in self.facts[node].ops
        )

    def _indexes_with_tensors(self, node: fx.Node) -> bool:
        """``t[index] = 4`` with integer tensors on the device: the 4 is copied to it."""
        parts = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        values = [self.facts[p].value for p in parts if isinstance(p, fx.Node)]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        device = self.context.device.type
        return (
            not any(isinstance(p, list) for p in parts)
            and any(t.dim() > 0 for t in tensors)
            and all(t.dtype not in (torch.bool, torch.uint8) and t.device.type == device for t in tensors)
        )

    def _reject(self, node: fx.Node, tensor: torch.Tensor) -> None:
        place = place_of(node)
        what, why, cure = assignment_of(node, place).refusal(tensor.device)
        cure += '   (or options={"scalar_writes": "rewrite"})'
        if not self.context.collect:
            raise GraphBreakingScalarWrite(message(what, str(place), why, cure))
        self.context.hazards.append(hazard_at(place, Finding("scalar write", f"{what}. {why}", cure), "setitem"))
        self.context.splits[node] = what

    def _rewrite(self, node: fx.Node, tensor: torch.Tensor, *, view: bool) -> None:
        place, graph = place_of(node), self.gm.graph
        target, index, value = node.args
        statement, parts = assignment_of(node, place), list[fx.Node]()
        map_arg(index, parts.append)
        with self._in_place_of(node):
            # Reading t[n] of a dynamic size n would fix the size.
            if view and not parts:
                graph.call_method("fill_", (graph.call_function(operator.getitem, (target, index)), value))
                how = "a fill on the device"
            else:
                made = graph.call_function(torch.full, ((), value), {"dtype": tensor.dtype, "device": tensor.device})
                graph.call_function(operator.setitem, (target, index, made))
                how = "a write of a value made on the device"
        graph.erase_node(node)
        self.context.notes.append(f"`{statement}` at {place}: rewritten to {how}")

    @contextmanager
    def _in_place_of(self, node: fx.Node) -> Iterator[None]:
        """New nodes go ahead of ``node`` and get its origin, so messages and figures name the user's line."""
        before = node.prev
        with self.gm.graph.inserting_before(node):
            yield
        while before.next is not node:
            before = before.next
            before.meta.update({k: v for k, v in node.meta.items() if k != "example_value"})

    def _device_scalar(self, node: fx.Node) -> bool | int | float | complex | None:
        """The number put on the capture device by ``torch.tensor(5, device=d)`` or ``torch.tensor(5).to(d)``."""
        value = self.facts[node].value
        if not isinstance(value, torch.Tensor) or value.device.type != self.context.device.type or value.dim() != 0:
            return None
        source = node
        if node.op == "call_method" and node.target == "to" and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            moves = any(isinstance(a, torch.device) for a in (*node.args[1:], *node.kwargs.values()))
            if not moves or source.kwargs.get("device") is not None:
                return None
        elif node.kwargs.get("device") is None:
            return None
        data = data_of(source, self.facts)
        if not isinstance(data, _PLAIN_NUMBERS) or any(map(source.kwargs.get, ("requires_grad", "pin_memory"))):
            return None
        # Through the dtypes that the statement names, so 0.1 as float32 stays that when it becomes float64.
        return torch.tensor(data, dtype=self.facts[source].value.dtype, device="cpu").to(value.dtype).item()

    def _fill_instead_of_copy(self, node: fx.Node, number: Any) -> None:
        value, place, graph = self.facts[node].value, place_of(node), self.gm.graph
        with self._in_place_of(node):
            full = graph.call_function(torch.full, ((), number), {"dtype": value.dtype, "device": value.device})
        node.replace_all_uses_with(full)
        sources = node.all_input_nodes
        graph.erase_node(node)
        for source in sources:
            if not source.users:
                graph.erase_node(source)
        cure = f"Write: torch.full((), {number!r}, dtype={value.dtype}, device=x.device)"
        self.context.hazards.append(hazard_at(place, replace(MADE_FROM_DATA, cure=cure), "torch.tensor"))
        note = f"torch.tensor({number!r}) on {value.device} at {place}: rewritten to a fill on the device"
        self.context.notes.append(note)
