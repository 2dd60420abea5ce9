"""Facts about a Dynamo graph: what each node computes, dispatches to, and writes.

The graph is interpreted once on fake tensors, whose storages alias exactly as the real ones will. All
passes read these facts instead of guessing from names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..torch_compat.fake_tensors import (
    NEEDS_DATA,
    FakeTensor,
    fake_like,
    fake_mode_of,
    holds_data,
    python_dispatcher,
    unbacked_symbols_may_stay,
)
from .contexts import is_transform
from .fake_storages import in_own_memory, note_memory, storage_of
from .node_facts import NodeFacts, OpCall, arguments_of, tensors_in, written_tensors
from .repeats import Repeats

__all__ = [
    "Calls", "DataDecide", "NodeFacts", "OpCall", "OpCalls", "alias_of", "arguments_of", "bodies_of", "calls_of",
    "squeezed_sizes", "storage_of", "tensors_in", "trace_all_facts", "trace_facts", "update_facts", "written_tensors",
]  # fmt: skip

#: What each node calls: target, args and kwargs, as they were when :func:`calls_of` looked.
Calls = dict[fx.Node, tuple[Any, Any, Any]]
#: Ops that change what a tensor is rather than what it holds: run again on the same one, they would do so twice.
_RESHAPING = frozenset(
    ("t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "as_strided_", "resize_", "resize_as_",
     "set_", "detach_")
)  # fmt: skip


def alias_of(value: Any) -> frozenset[int]:
    """The storages of all tensors of a nested value."""
    return frozenset(storage_of(t) for t in tensors_in(value))


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


class OpCalls(TorchDispatchMode):
    """Appends each op that is dispatched, with what it gives if ``keep_results``."""

    def __init__(self, calls: list[OpCall], keep_results: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.keep_results = calls, keep_results

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append(OpCall(func, args, kwargs, result if self.keep_results else None))
        return result


class DataDecide(Exception):
    """A node whose result depends on data, such as ``x[i]`` of a tensor ``i`` without dimensions."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node = node


class _Tracer(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, repeats: Repeats) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.repeats = repeats
        self.facts: dict[fx.Node, NodeFacts] = {}
        #: Only the rows of layers with adapters are followed from op to op.
        self.keep_results = any(str(node.target).startswith("pcg.lora") for node in gm.graph.nodes)
        #: It is unknown whose memory a tensor lies in: the facts are useless.
        self.ambiguous = False

    def run_node(self, n: fx.Node) -> Any:
        call = self.repeats.call_of(n, self.env)
        facts = self.repeats.recall(call) if call is not None else None
        if facts is None:
            try:
                facts = self._trace(n)
            except NEEDS_DATA as error:
                raise DataDecide(n, str(error)) from error
            if call is not None:
                self.repeats.remember(call, facts)
        self.facts[n] = facts
        return facts.value

    def _trace(self, n: fx.Node) -> NodeFacts:
        calls: list[OpCall] = []
        if isinstance(n.target, torch._ops.HigherOrderOperator):
            value = super().run_node(n)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            calls.append(OpCall(n.target, args, kwargs, value))
        else:
            with OpCalls(calls, self.keep_results):
                value = super().run_node(n)
        if any(_reshapes(call) for call in calls):
            self.repeats.stop()
        if not calls and value is None:
            self.repeats.new_era()
        inputs = (tensor for source in n.all_input_nodes for tensor in tensors_in(self.env[source]))
        if not note_memory(inputs, lambda: tensors_in((value, [(call.args, dict(call.kwargs)) for call in calls]))):
            # Not an error: the state of a transform such as vmap that the graph is in must be left by its own nodes.
            self.ambiguous = True
            self.repeats.stop()
        return NodeFacts(value, tuple(calls), frozenset(storage_of(t) for call in calls for t in written_tensors(call)))


def trace_facts(gm: fx.GraphModule, inputs: Sequence[Any], keep_results: bool = False) -> dict[fx.Node, NodeFacts]:
    """Facts of every node of ``gm``, from one interpretation on fake ``inputs`` (tensors, ints, SymInts).

    Inputs are detached first, so an op that changes a tensor's metadata in place cannot reach the
    caller's fake tensors. Each lies in memory of its own, whatever the call that was traced had.

    Args:
        keep_results: what ops give stays known, as it does where the graph has layers with adapters.

    Raises:
        DataDecide: only the data tell what a node gives.
    """
    return _trace(gm, inputs, _repeats_of(gm), keep_results) or trace_all_facts(gm, inputs, keep_results)


def trace_all_facts(gm: fx.GraphModule, inputs: Sequence[Any], keep_results: bool = False) -> dict[fx.Node, NodeFacts]:
    """The same, with repeated calls traced again each time."""
    repeats = Repeats()
    repeats.stop()
    return _trace(gm, inputs, repeats, keep_results) or {}


def _repeats_of(gm: fx.GraphModule) -> Repeats:
    repeats = Repeats()
    if any(is_transform(node) for node in gm.graph.nodes):
        # Between the nodes that enter and leave vmap, tensors are wrapped in others.
        repeats.stop()
    return repeats


def _trace(
    gm: fx.GraphModule, inputs: Sequence[Any], repeats: Repeats, keep_results: bool
) -> dict[fx.Node, NodeFacts] | None:
    fake_mode = fake_mode_of(inputs)
    fresh = [_detached(x) for x in in_own_memory(inputs)]
    tracer = _Tracer(gm, repeats)
    tracer.keep_results |= keep_results
    with fake_mode, python_dispatcher(), unbacked_symbols_may_stay(fake_mode), torch.no_grad():
        tracer.run(*fresh)
    return None if tracer.ambiguous else tracer.facts


def _detached(value: Any) -> Any:
    if type(value) is FakeTensor and value.layout == torch.strided and not holds_data(value):
        return fake_like(value)
    return value.detach() if isinstance(value, torch.Tensor) else value


#: What ops raise of operands in another order than the body's: other shapes, types, or no tensors at all.
_MISTRACED = (
    ArithmeticError, AssertionError, AttributeError, DataDecide, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def bodies_of(
    gm: fx.GraphModule, node: fx.Node, facts: Mapping[fx.Node, NodeFacts], notes: list[str]
) -> Iterator[tuple[fx.GraphModule, dict[fx.Node, NodeFacts]]]:
    """The graphs inside an op of a higher order (a checkpointed region, branches), with their facts.

    A body's inputs are the last operands of the op: before them stand names, conditions and further bodies. A body that
    cannot be traced alone is left out, and named in ``notes``, which explain() shows.
    """
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return
    leaves = [leaf for leaf in tree_leaves((node.args, dict(node.kwargs))) if isinstance(leaf, fx.Node)]
    operands = [facts[n].value for n in leaves if n.op != "get_attr"]
    for body in [getattr(gm, str(n.target), None) for n in leaves if n.op == "get_attr"]:
        count = len(body.graph.find_nodes(op="placeholder")) if isinstance(body, fx.GraphModule) else -1
        if not isinstance(body, fx.GraphModule) or count > len(operands):
            continue
        try:
            inner = trace_facts(body, operands[len(operands) - count :], keep_results=True)
        except _MISTRACED as error:
            first = str(error).splitlines()[0] if str(error) else ""
            notes.append(f"{node.name} is judged as a whole: its body cannot be traced alone ({first})")
            continue
        yield body, inner


def calls_of(gm: fx.GraphModule) -> Calls:
    """What each node calls, with what: what facts follow from."""
    return {node: (node.target, node.args, node.kwargs) for node in gm.graph.nodes}


def same_calls(one: Calls, other: Calls) -> bool:
    """By identity: whatever is written to a node is another object, and sizes must not be compared."""
    return len(one) == len(other) and all(
        node is another and all(a is b for a, b in zip(mine, theirs, strict=True))
        for (node, mine), (another, theirs) in zip(one.items(), other.items(), strict=True)
    )


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
    return _update(gm, facts, before, values) or trace_all_facts(gm, values)


def _update(
    gm: fx.GraphModule, facts: Mapping[fx.Node, NodeFacts], before: Calls, values: Sequence[Any]
) -> dict[fx.Node, NodeFacts] | None:
    fake_mode = fake_mode_of(values)
    tracer = _Tracer(gm, _repeats_of(gm))
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
    return None if tracer.ambiguous else tracer.facts


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
    # As text, so no guard on a size is made.
    return same and str((one.shape, one.stride())) == str((other.shape, other.stride()))
