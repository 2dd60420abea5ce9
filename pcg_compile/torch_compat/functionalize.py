"""Graphs in functional aten form, and what ops are made of (torch 2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .probe import deferred, private

_READ = "2.11 to 2.13"
_parse_schema = private("torch._C.parse_schema", _READ)
_is_functional_tensor = private("torch._is_functional_tensor", _READ)
_to_functional_tensor = private("torch._to_functional_tensor", _READ)
_from_functional_tensor = private("torch._from_functional_tensor", _READ)
_sync = private("torch._sync", _READ)
_enable_functionalization = private("torch._enable_functionalization", _READ)
_disable_functionalization = private("torch._disable_functionalization", _READ)
_has_data_mutation = private("torch._functionalize_has_data_mutation", _READ)
_would_decompose = deferred("torch.fx.experimental.proxy_tensor.autograd_would_have_decomposed", _READ)


def types_of_arguments(schema: Any) -> dict[str, str]:
    """The type of each argument by name, of an op's schema or of its text ``name(Tensor x) -> ()`` (2.11 to 2.13)."""
    parsed = _parse_schema(schema) if isinstance(schema, str) else schema
    return {argument.name: str(argument.type) for argument in parsed.arguments}


class _Decomposing(fx.Interpreter):
    """Runs a graph with custom ops replaced by what they are made of: functionalization does not look into them."""

    def __init__(
        self,
        gm: fx.GraphModule,
        decompositions: Mapping[Any, Callable[..., Any]],
        at: Callable[[fx.Node], None],
    ) -> None:
        super().__init__(gm)
        self.decompositions, self.at = decompositions, at

    def run_node(self, n: fx.Node) -> Any:
        self.at(n)
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        overload = target.default if isinstance(target, torch._ops.OpOverloadPacket) else target
        if overload in self.decompositions:
            return self.decompositions[overload](*args, **kwargs)
        return super().call_function(target, args, kwargs)


def run_functionally(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    decompositions: Mapping[Any, Callable[..., Any]],
    at: Callable[[fx.Node], None],
) -> tuple[Any, ...]:
    """The results of a graph, a tuple, and the inputs that it writes, from ops that write nothing (2.11 to 2.13).

    ``at`` is told each node before it runs. Dispatch modes see the functional ops.
    """

    def plain(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not _is_functional_tensor(value):
            return value
        _sync(value)
        return _from_functional_tensor(value)

    wrapped = [_to_functional_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    _enable_functionalization(reapply_views=True)
    try:
        results = _Decomposing(gm, decompositions, at).run(*wrapped)
    finally:
        _disable_functionalization()
    tensors = [x for x in wrapped if isinstance(x, torch.Tensor)]
    return tuple(map(plain, (*results, *(x for x in tensors if _has_data_mutation(x)))))


def is_decomposed(op: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
    """Whether torch's tracer would look at what an op is made of instead of at the op (2.11 to 2.13)."""
    aten = torch.ops.aten
    kept = (aten.size.default, aten.stride.default, aten.storage_offset.default)
    return op not in kept and bool(_would_decompose()(op, list(args)))
