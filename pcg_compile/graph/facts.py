"""Facts about a Dynamo graph: what each node computes, dispatches to, and writes.

The graph is interpreted once on fake tensors, whose storages alias exactly as the real ones will. All
passes read these facts instead of guessing from names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..torch_internals import NEEDS_DATA, fake_mode_of, python_dispatcher, unbacked_symbols_may_stay, without_transforms

__all__ = [
    "Calls", "DataDecide", "NodeFacts", "OpCall", "alias_of", "calls_of", "squeezed_sizes", "storage_of", "tensors_in",
    "trace_facts", "update_facts", "written_tensors",
]  # fmt: skip

#: What each node calls: target, args and kwargs, as they were when :func:`calls_of` looked.
Calls = dict[fx.Node, tuple[Any, Any, Any]]
#: Ops that change what a tensor is rather than what it holds: run again on the same one, they would do so twice.
_RESHAPING = frozenset(
    ("t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "as_strided_", "resize_", "resize_as_",
     "set_", "detach_")
)  # fmt: skip


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


class DataDecide(Exception):
    """A node whose result cannot be told without its data, such as ``x[i]`` of a tensor ``i`` without dimensions."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node = node


class _Tracer(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.facts: dict[fx.Node, NodeFacts] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            return self._traced(n)
        except NEEDS_DATA as error:
            raise DataDecide(n, str(error)) from error

    def _traced(self, n: fx.Node) -> Any:
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

    Raises:
        DataDecide: only the data tell what a node gives.
    """
    fake_mode = fake_mode_of(inputs)
    fresh = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    tracer = _Tracer(gm)
    with fake_mode, python_dispatcher(), unbacked_symbols_may_stay(fake_mode), torch.no_grad():
        tracer.run(*fresh)
    return tracer.facts


def calls_of(gm: fx.GraphModule) -> Calls:
    """What each node calls, with what: what facts follow from."""
    return {node: (node.target, node.args, node.kwargs) for node in gm.graph.nodes}


def update_facts(gm: fx.GraphModule, facts: Mapping[fx.Node, NodeFacts], before: Calls) -> dict[fx.Node, NodeFacts]:
    """Facts of a graph that a pass has rewritten; a node that computes the same of the same values keeps its own.

    Args:
        facts: of the graph as it was. What a pass has noted there for a node of its own is the value that the node
            takes the place of, and stays the value of all that follows from it.
        before: :func:`calls_of` the graph as it was.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    values = [facts[node].value if node in before else node.meta["example_value"] for node in inputs]
    if any(_reshapes(call) for fact in facts.values() for call in fact.ops):
        return trace_facts(gm, values)
    fake_mode = fake_mode_of(values)
    tracer = _Tracer(gm)
    fresh: set[fx.Node] = set()
    with fake_mode, python_dispatcher(), unbacked_symbols_may_stay(fake_mode), torch.no_grad():
        for node in gm.graph.nodes:
            known = facts.get(node)
            if node.op == "placeholder" and node not in before:
                value = node.meta["example_value"]
                tracer.facts[node] = NodeFacts(
                    value.detach() if isinstance(value, torch.Tensor) else value, (), frozenset()
                )
            elif known is not None and node in before and _as_before(node, before[node], facts, tracer.facts, fresh):
                tracer.facts[node] = known
            else:
                value = tracer.run_node(node)
                if known is not None and node not in before and _looks_alike(value, known.value):
                    tracer.facts[node] = replace(tracer.facts[node], value=known.value)
                else:
                    fresh.add(node)
            tracer.env[node] = tracer.facts[node].value
    return tracer.facts


def _reshapes(call: OpCall) -> bool:
    name = str(call.op).split(".")
    return len(name) > 1 and name[1] in _RESHAPING


def _as_before(
    node: fx.Node,
    before: tuple[Any, Any, Any],
    old: Mapping[fx.Node, NodeFacts],
    new: Mapping[fx.Node, NodeFacts],
    fresh: set[fx.Node],
) -> bool:
    """Whether a node calls the same with the same values, by identity: sizes must not be compared."""
    if before[0] is not node.target or node.op == "output" or not fresh.isdisjoint(node.all_input_nodes):
        return False
    if before[1] is node.args and before[2] is node.kwargs:
        return True

    def leaves(call: Any, facts: Mapping[fx.Node, NodeFacts]) -> list[Any]:
        flat = tree_leaves(call, is_leaf=lambda leaf: isinstance(leaf, (fx.Node, slice)))
        return [facts[leaf].value if isinstance(leaf, fx.Node) else leaf for leaf in flat]

    theirs, ours = leaves(before[1:], old), leaves((node.args, node.kwargs), new)
    return len(theirs) == len(ours) and all(a is b for a, b in zip(theirs, ours, strict=True))


def _looks_alike(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    same = one.dtype == other.dtype and one.device == other.device and one.layout == other.layout
    # As text, so that no guard on a size is made.
    return same and str((one.shape, one.stride())) == str((other.shape, other.stride()))
