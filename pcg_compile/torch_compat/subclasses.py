"""Tensors made of other tensors, such as DTensors: graphs over the plain tensors (torch 2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .fake_tensors import TracingContext
from .probe import attributes, deferred, private

_READ = "2.11 to 2.13"
attributes("torch.utils._python_dispatch", _READ, "is_traceable_wrapper_subclass")
attributes("torch._inductor.config", _READ, "enable_auto_functionalized_v2")
attributes("torch.ops.higher_order", _READ, "auto_functionalized", lambda: torch.ops.higher_order)
_aot_module_simplified = deferred("torch._functorch.aot_autograd.aot_module_simplified", _READ)
_inductor_config = deferred("torch._inductor.config", _READ)
_is_any_autocast_enabled = private("torch._C._is_any_autocast_enabled", _READ)


def is_subclass(value: Any) -> bool:
    """Whether a tensor is made of others and can be taken apart, as a DTensor can (2.11 to 2.13)."""
    return isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)


def lower_subclasses(
    gm: fx.GraphModule, inputs: list[Any], compile_plain: Callable[[fx.GraphModule, Sequence[Any]], Any]
) -> Callable[..., Any]:
    """AOTAutograd's inference graph over plain tensors, compiled by ``compile_plain`` (2.11 to 2.13).

    Parameters keep being known as such, so they are bound by address. Calls of custom ops that write their
    arguments are in the form that :func:`functionalized_call` reads.
    """
    inner: list[_PlainCall] = []

    def compile_lowered(lowered: fx.GraphModule, fakes: Sequence[Any]) -> Any:
        metadata = getattr(TracingContext.try_get(), "fw_metadata", None)
        static = set(getattr(metadata, "static_input_indices", None) or ())
        for position, node in enumerate(lowered.graph.find_nodes(op="placeholder")):
            if position in static:
                node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        # Copies of what was written come after the graph, and autocast is switched off ahead of it.
        copies = getattr(metadata, "mutated_inp_runtime_indices", True)
        inner.append(_PlainCall(compile_plain(lowered, fakes), bool(copies) or _is_any_autocast_enabled()))
        return inner[-1]

    with _inductor_config().patch(enable_auto_functionalized_v2=False):
        whole: Callable[..., Any] = _aot_module_simplified()(
            gm,
            inputs,
            fw_compiler=compile_lowered,
            inference_compiler=compile_lowered,
            decompositions={},
            keep_inference_input_mutations=True,
        )
    return _TakesDTensorsApart(whole, inner[-1]) if inner else whole


class _PlainCall:
    """A graph over plain tensors; notes what the last call got and gave."""

    def __init__(self, function: Callable[..., Any], needs_wrappers: bool) -> None:
        self.function, self.needs_wrappers = function, needs_wrappers
        self.last: tuple[Sequence[Any], Any] | None = None

    def __call__(self, *args: Any) -> Any:
        results = self.function(*args)
        self.last = None if self.needs_wrappers else (args, results)
        return results


class _TakesDTensorsApart:
    """A graph over DTensors that calls the one over what they are made of, without AOTAutograd's wrappers where it can.

    Those take some 4 us a parameter at every step, 1 ms for an 8B model. Where a call went through them and they did
    nothing but take arguments apart, and hand on the graph's results as they are, later calls do that by themselves.
    What the wrappers do is fixed when they are made; guards see to it that the arguments are of the same kinds.
    """

    def __init__(self, whole: Callable[..., Any], plain: _PlainCall) -> None:
        self._full_graph, self._plain = whole, plain
        #: Where each plain argument comes from: an argument, or one of its attributes.
        self._sources: list[tuple[int, str | None]] | None = None

    def __call__(self, *args: Any) -> Any:
        if self._sources is not None:
            return self._plain.function(*_taken_apart(args, self._sources))
        results = self._full_graph(*args)
        last, self._plain.last = self._plain.last, None
        if last is not None:
            sources = _sources_of(args)
            if _same_objects(_taken_apart(args, sources), last[0]) and _same_objects(results, last[1]):
                self._sources = sources
        return results


def _sources_of(args: Sequence[Any]) -> list[tuple[int, str | None]]:
    sources: list[tuple[int, str | None]] = []
    for i, arg in enumerate(args):
        sources += [(i, name) for name in arg.__tensor_flatten__()[0]] if is_subclass(arg) else [(i, None)]
    return sources


def _taken_apart(args: Sequence[Any], sources: Sequence[tuple[int, str | None]]) -> list[Any]:
    return [args[i] if name is None else getattr(args[i], name) for i, name in sources]


def _same_objects(one: Any, other: Any) -> bool:
    return (
        isinstance(one, (tuple, list))
        and isinstance(other, (tuple, list))
        and len(one) == len(other)
        and all(a is b or (type(a) is int and a == b) for a, b in zip(one, other, strict=True))
    )


def functionalized_call(node: fx.Node) -> tuple[torch._ops.OpOverload, Mapping[str, Any]] | None:
    """The op that writes its arguments, and those, of a node that does it on copies; else None (2.11 to 2.13).

    The node's result is a tuple of what the op returns, or None for an op that returns nothing, and the copies in the
    order of the op's arguments.
    """
    if node.target is not torch.ops.higher_order.auto_functionalized:
        return None
    op = node.args[0]
    assert isinstance(op, torch._ops.OpOverload)
    return op, node.kwargs
