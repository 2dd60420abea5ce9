"""A piece in functional aten form: the ops that it dispatches once nothing writes in place.

torch's own tracer follows all arithmetic on sizes into the graph, which costs more than the ops. Here sizes stay
numbers; what is unusual is left to torch's tracer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..torch_compat.fake_tensors import FakeTensor, fake_mode_of, python_dispatcher
from ..torch_compat.functionalize import functional_aten, is_decomposed, run_functionally
from .sizes import SymType

__all__ = ["functional_form"]

_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


def functional_form(
    gm: fx.GraphModule, inputs: Sequence[Any], decompositions: Mapping[Any, Callable[..., Any]]
) -> fx.GraphModule:
    """``gm`` in functional aten form, on fake ``inputs``; nodes have their fake values and the lines they come from.

    Its results are the graph's, a tuple, and the inputs that it writes. ``decompositions`` are what custom ops are
    made of.
    """
    try:
        return _captured(gm, inputs, decompositions)
    except _Unusual:
        return functional_aten(gm, inputs, decompositions)


class _Unusual(Exception):
    """Something that only torch's tracer has a way for."""


def _captured(
    gm: fx.GraphModule, inputs: Sequence[Any], decompositions: Mapping[Any, Callable[..., Any]]
) -> fx.GraphModule:
    fresh = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    tracer = _Tracer(fresh)
    with fake_mode_of(fresh), python_dispatcher(), torch.no_grad(), tracer:
        results = run_functionally(gm, fresh, decompositions, tracer.come_to)
    return tracer.graph_of(results)


class _Tracer(TorchDispatchMode):
    """Writes down each op that arrives below functionalization."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.place: fx.Node | None = None
        #: The node of each tensor, which is kept so that its identity stays its own.
        self.nodes: dict[int, tuple[torch.Tensor, fx.Node]] = {}
        for position, value in enumerate(inputs):
            self._name(self.graph.placeholder(f"arg_{position}"), value)

    def come_to(self, node: fx.Node) -> None:
        """The node of the piece that runs next."""
        self.place = node

    def graph_of(self, results: Any) -> fx.GraphModule:
        """The graph, once all has run."""
        self.graph.output(tree_map_only((torch.Tensor, *SymType), self._node, results))
        return fx.GraphModule(torch.nn.Module(), self.graph)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags or func in _LIFTS:
            raise _Unusual
        if is_decomposed(func, leaves):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        nodes = tree_map_only((torch.Tensor, *SymType), self._node, (args, kwargs))
        result = func(*args, **kwargs)
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            node = self.graph.call_function(func, *nodes)
            if self.place is not None:
                node.stack_trace = self.place.stack_trace
            self._name(node, result)
        return result

    def _name(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        if isinstance(value, torch.Tensor):
            self.nodes[id(value)] = value, node
        elif isinstance(value, (tuple, list)):
            for position, one in enumerate(value):
                if isinstance(one, torch.Tensor):
                    element = self.graph.call_function(operator.getitem, (node, position))
                    element.stack_trace = node.stack_trace
                    self._name(element, one)

    def _node(self, value: Any) -> fx.Node:
        if not isinstance(value, torch.Tensor):
            number = self.graph.call_function(_number)
            number.meta["val"] = value
            return number
        known = self.nodes.get(id(value))
        if known is None or type(value) is not FakeTensor:
            raise _Unusual
        return known[1]


def _number() -> Any:
    """Stands for a number that follows from sizes; its node has it as its value."""
    raise NotImplementedError
