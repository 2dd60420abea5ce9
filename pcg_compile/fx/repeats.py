"""Calls that a graph repeats, as one layer after the other does: traced once, then copied.

Two calls are equal where they call the same with equal arguments under the same modes. Tensors are equal where their
sizes, strides and types are, and where the same of them are one tensor or share memory. Then they dispatch the same
ops, and what they give differs in nothing but its memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType, FunctionType
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map_only

from ..torch_compat.fake_tensors import FakeTensor, holds_data, modes_of_trace
from .fake_storages import Storage, look_alike_of, storage_behind, storage_of
from .node_facts import CopiedCall, NodeFacts, tensors_in
from .sizes import SymType, expr_of, symbols_of

_CONSTANTS = (int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, EllipsisType)
#: Fake implementations of other ops may read more than their arguments.
_NAMESPACES = ("aten", "prim", "prims", "pcg")
_DATA = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


@dataclass
class Call:
    """A call as others are compared with it, and the distinct tensors among its arguments."""

    key: Any
    tensors: list[torch.Tensor]
    #: Of the sizes among its arguments.
    symbols: frozenset[sympy.Symbol]


@dataclass
class _Known:
    tensors: list[torch.Tensor]
    storages: list[int]
    traced: NodeFacts


class _Unlike(Exception):
    pass


class Repeats:
    """The calls of one graph. Nothing changes sizes in place; see :meth:`Repeats.stop`."""

    def __init__(self) -> None:
        self._known: dict[Any, _Known] = {}
        self._looks: dict[tuple[Any, ...], int] = {}
        #: The look of each tensor that was seen, which is kept so its identity stays its own.
        self._seen: dict[int, tuple[torch.Tensor, int]] = {}
        self._era = 0
        self._stopped = False

    def new_era(self) -> None:
        """A state outside the graph may have changed: what follows is like nothing before."""
        self._era += 1

    def stop(self) -> None:
        """A tensor may have been given other sizes: from here on all is traced."""
        self._stopped = True

    def call_of(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Call | None:
        """A node's call, where calls like it can be copied."""
        if self._stopped or node.op not in ("call_function", "call_method") or not _is_plain_target(node.target):
            return None
        call = Call(None, [], frozenset())
        places: dict[int, int] = {}
        memory: dict[int, int] = {}

        def of(value: Any) -> Any:
            kind = type(value)
            if kind is fx.Node:
                return of(values[value])
            if kind is FakeTensor:
                place = places.get(id(value))
                if place is not None:
                    return place
                places[id(value)] = len(places)
                call.tensors.append(value)
                return ("tensor", self._look(value), memory.setdefault(storage_of(value), len(memory)))
            if kind in _CONSTANTS:
                return (kind, value)
            if kind in SymType:
                call.symbols |= symbols_of(value)
                return (kind, expr_of(value))
            if kind is float:
                # As text: 0.0 equals -0.0, and nan does not equal itself.
                return (kind, repr(value))
            if isinstance(value, (tuple, list)):
                return (kind, *map(of, value))
            if isinstance(value, dict):
                return (kind, *((name, of(one)) for name, one in value.items()))
            if kind is slice:
                return (kind, of(value.start), of(value.stop), of(value.step))
            raise _Unlike

        try:
            call.key = (self._era, modes_of_trace(), node.op, node.target, of(node.args), of(node.kwargs))
            hash(call.key)
        except (_Unlike, TypeError):
            return None
        return call if call.tensors else None

    def recall(self, call: Call) -> NodeFacts | None:
        """What a call gives that equals one traced before."""
        known = self._known.get(call.key)
        return None if known is None else _Copy(self, known, call.tensors).traced()

    def remember(self, call: Call, traced: NodeFacts) -> None:
        """Keeps what was traced, where another call's tensors can take the place of this one's."""
        if self._stopped or not traced.ops or not _is_copyable(call, traced):
            return
        self._known[call.key] = _Known(call.tensors, [storage_of(t) for t in call.tensors], traced)

    def _look(self, tensor: torch.Tensor) -> int:
        seen = self._seen.get(id(tensor))
        if seen is None:
            assert isinstance(tensor, FakeTensor)
            if holds_data(tensor) or tensor.layout != torch.strided:
                raise _Unlike
            numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset(), tensor.untyped_storage().nbytes())
            look = (
                tensor.dtype, tensor.device, tensor.dim(), tensor.requires_grad, tensor.is_conj(), tensor.is_neg(),
                tensor.is_inference(), *map(expr_of, numbers),
            )  # fmt: skip
            seen = self._seen[id(tensor)] = tensor, self._looks.setdefault(look, len(self._looks))
        return seen[1]

    def looks_like(self, tensor: torch.Tensor, other: torch.Tensor) -> None:
        """Says that a tensor looks as another one does."""
        self._seen[id(tensor)] = tensor, self._look(other)


class _Copy:
    """What a known call gave, with other tensors for its arguments."""

    def __init__(self, repeats: Repeats, known: _Known, tensors: Sequence[torch.Tensor]) -> None:
        self.repeats, self.known = repeats, known
        self.put = {id(old): new for old, new in zip(known.tensors, tensors, strict=True)}
        self.memory: dict[int, Storage] = {}
        for old, tensor in zip(known.storages, tensors, strict=True):
            if old not in self.memory:
                self.memory[old] = storage_behind(tensor)

    def traced(self) -> NodeFacts:
        traced = self.known.traced
        value = self.all(traced.value)
        ops = tuple(CopiedCall(call, self.all) for call in traced.ops)
        return NodeFacts(value, ops, frozenset(self._memory(one).identity for one in traced.writes))

    def all(self, value: Any) -> Any:
        """A nested value with this call's tensors, or look-alikes in memory of its own."""
        if isinstance(value, torch.Tensor):
            return self._one(value)
        return None if value is None else tree_map_only(torch.Tensor, self._one, value)

    def _one(self, tensor: torch.Tensor) -> torch.Tensor:
        put = self.put.get(id(tensor))
        if put is None:
            assert isinstance(tensor, FakeTensor)
            put = self.put[id(tensor)] = look_alike_of(tensor, self._memory(storage_of(tensor)))
            self.repeats.looks_like(put, tensor)
        return put

    def _memory(self, old: int) -> Storage:
        found = self.memory.get(old)
        if found is None:
            found = self.memory[old] = Storage()
        return found


def _is_plain_target(target: Any) -> bool:
    """Whether the ops that a target dispatches follow from its arguments and modes."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return True
    return not isinstance(target, FunctionType) or target.__module__.partition(".")[0] in ("torch", "operator")


def _is_copyable(call: Call, traced: NodeFacts) -> bool:
    """Whether tensors of the same look can take the place of those that a call was traced with."""
    for one in traced.ops:
        if not isinstance(one.op, torch._ops.OpOverload) or one.op.namespace not in _NAMESPACES:
            return False
        if any(tag in _DATA for tag in one.op.tags):
            return False
    if not all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in tree_leaves(traced.value)):
        return False
    made = list(tensors_in((traced.value, [(one.args, dict(one.kwargs)) for one in traced.ops])))
    if not all(type(t) is FakeTensor and t.layout == torch.strided and not holds_data(t) for t in made):
        return False
    # A size that the call gave its result is another one each time.
    return symbols_of(made) <= symbols_of(call.tensors) | call.symbols
