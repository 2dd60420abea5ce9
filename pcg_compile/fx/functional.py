"""A piece in functional aten form: the ops that it dispatches once nothing writes in place.

``make_fx`` traces all arithmetic on sizes as well, which takes three times as long as the ops. Here sizes stay numbers.
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
from ..torch_compat.functionalize import is_decomposed, run_functionally
from .sizes import SymType


def functional_form(
    gm: fx.GraphModule, inputs: Sequence[Any], decompositions: Mapping[Any, Callable[..., Any]]
) -> fx.GraphModule:
    """``gm`` in functional aten form, on fake ``inputs``; nodes have their fake values and the lines they come from.

    Its results are the graph's, a tuple, and the inputs that it writes.

    Args:
        decompositions: by overload, what custom ops are made of.
    """
    fresh = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    tracer = _Tracer(fresh)
    with fake_mode_of(fresh), python_dispatcher(), torch.no_grad(), tracer:
        results = run_functionally(gm, fresh, decompositions, tracer.come_to)
    return tracer.graph_of(results)


class _Tracer(TorchDispatchMode):
    """Records each op that arrives below functionalization."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = {}
        self.place: fx.Node | None = None
        #: The node of each tensor, by identity, and the tensor, which keeps its identity from being reused.
        self.nodes: dict[int, tuple[torch.Tensor, fx.Node]] = {}
        for position, value in enumerate(inputs):
            self._name(self.graph.placeholder(f"arg_{position}"), value)

    def come_to(self, node: fx.Node) -> None:
        """Says which node of the piece runs next."""
        self.place = node

    def graph_of(self, results: Any) -> fx.GraphModule:
        """The graph, once all has run."""
        self.graph.output(tree_map_only((torch.Tensor, *SymType), self._node, results))
        return fx.GraphModule(self.constants, self.graph)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if is_decomposed(func, tree_leaves((args, kwargs))):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        nodes = tree_map_only((torch.Tensor, *SymType), self._node, (args, kwargs))
        result = func(*args, **kwargs)
        gives_tensors = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result))
        if gives_tensors or torch.Tag.data_dependent_output in func.tags:
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
        if id(value) not in self.nodes:
            if isinstance(value, FakeTensor):
                raise RuntimeError(f"{self.place} reads a tensor that no op gave")
            name = f"_constant_{len(self.constants)}"
            self.constants[name] = value
            self._name(self.graph.create_node("get_attr", name), value)
        return self.nodes[id(value)][1]


def _number() -> Any:
    """Stands for a number that follows from sizes; its node has it as its value."""
    raise NotImplementedError
