"""Facts about a Dynamo graph: what each node computes, dispatches to, and writes.

The graph is interpreted once on fake tensors, whose storages alias exactly as the real ones will. All
passes read these facts instead of guessing from names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..torch_internals import fake_mode_of, python_dispatcher, unbacked_symbols_may_stay, without_transforms

__all__ = [
    "NodeFacts", "OpCall", "alias_of", "squeezed_sizes", "storage_of", "tensors_in", "trace_facts", "written_tensors",
]  # fmt: skip


@dataclass(frozen=True)
class OpCall:
    """One dispatched op: its overload (or higher-order op) and the fake arguments it was called with."""

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class NodeFacts:
    """What one node does: its fake value, the ops that it dispatches, the storages that it writes."""

    value: Any
    ops: tuple[OpCall, ...]
    writes: frozenset[int]


def storage_of(tensor: torch.Tensor) -> int:
    """The identity of a tensor's storage; two tensors alias when it is the same."""
    try:
        return without_transforms(tensor).untyped_storage()._cdata
    except NotImplementedError:
        # Inside vmap: a wrapper without memory of its own.
        return -id(tensor)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among the leaves of a nested value."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def alias_of(value: Any) -> frozenset[int]:
    """The storages of all tensors of a nested value."""
    return frozenset(storage_of(t) for t in tensors_in(value))


def written_tensors(call: OpCall) -> Iterator[torch.Tensor]:
    """The argument tensors that an op writes, by its schema."""
    schema = getattr(call.op, "_schema", None)
    if schema is None:
        return
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        if argument.name in call.kwargs:
            yield from tensors_in(call.kwargs[argument.name])
        elif position < len(call.args):
            yield from tensors_in(call.args[position])


def squeezed_sizes(facts: Mapping[fx.Node, NodeFacts]) -> list[torch.SymInt]:
    """Dynamic sizes that a squeeze was traced to leave alone, which it does not where they are 1."""
    found: list[torch.SymInt] = []
    for call in (call for fact in facts.values() for call in fact.ops):
        if not str(call.op).startswith(("aten.squeeze.", "aten.squeeze_.")):
            continue
        shape = call.args[0].shape
        chosen = call.args[1] if len(call.args) > 1 else range(len(shape))
        for dim in [chosen] if isinstance(chosen, int) else chosen:
            size = shape[dim] if shape else 1
            if isinstance(size, torch.SymInt) and size.node.has_hint():
                found.append(size)
    return found


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[OpCall]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.calls.append(OpCall(func, args, kwargs))
        return func(*args, **kwargs)


class _Tracer(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.facts: dict[fx.Node, NodeFacts] = {}

    def run_node(self, n: fx.Node) -> Any:
        calls: list[OpCall] = []
        if isinstance(n.target, torch._ops.HigherOrderOperator):
            value = super().run_node(n)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            calls.append(OpCall(n.target, args, kwargs))
        else:
            with _Recorder(calls):
                value = super().run_node(n)
        writes = frozenset(storage_of(t) for call in calls for t in written_tensors(call))
        self.facts[n] = NodeFacts(value, tuple(calls), writes)
        return value


def trace_facts(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, NodeFacts]:
    """Facts of every node of ``gm``, from one interpretation on fake ``inputs`` (tensors, ints, SymInts).

    Inputs are detached first, so that an op that changes a tensor's metadata in place cannot reach the
    caller's fake tensors; storages stay shared.
    """
    fake_mode = fake_mode_of(inputs)
    fresh = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    tracer = _Tracer(gm)
    with fake_mode, python_dispatcher(), unbacked_symbols_may_stay(fake_mode), torch.no_grad():
        tracer.run(*fresh)
    return tracer.facts
