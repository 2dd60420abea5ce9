"""Reads from the graph which token each row of a LoRA layer's input belongs to.

Any input of the graph may hold the step's tokens. The rows of each input are followed through the graph
(:mod:`.rules`). Then the inputs that hold the tokens are found, and each layer's rows are looked up. Equal numbers of
rows prove nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from pcg_compile.fx.facts import NodeFacts, OpCall, arguments_of, bodies_of, storage_of, tensors_in, written_tensors
from pcg_compile.fx.places import place_of
from pcg_compile.split_ops import registered_split_ops
from pcg_compile.torch_compat.dynamo_graphs import is_static_input

from ..padding_safety.dims import as_expr
from .layouts import Lost, Order, Rows, State, columns, fused, meet, moving, regroup, size_of
from .row_calls import Indices, RowCall
from .rules import queried, rows_after

_LAYERS = (torch.ops.pcg.lora, torch.ops.pcg.lora.default)
#: Ops that run their region once, and give what it gives.
_REGIONS = ("wrap", "tag_activation_checkpoint", "wrap_activation_checkpoint", "invoke_subgraph", "wrap_with_autocast",
            "wrap_with_set_grad_enabled")  # fmt: skip
_LOOK_UPS = ("aten::index", "aten::index_select", "aten::gather", "aten::_unsafe_index")


@dataclass(frozen=True)
class LayerRows:
    """What the rows of a layer's input are.

    Attributes:
        name: the layer's. rows: the token of each; None where ``reason`` says why it is unknown.
        tokens: the sizes of the step's tokens, row-major.
    """

    name: str
    rows: Rows | None = None
    reason: str = ""
    tokens: tuple[Any, ...] = ()

    @property
    def in_order(self) -> bool:
        """Whether row i is token i."""
        return self.rows is not None and self.rows.in_order


def follow_rows(
    gm: fx.GraphModule,
    facts: Mapping[fx.Node, NodeFacts],
    notes: list[str],
    remarks: list[tuple[str, str]],
    before: str = "",
) -> tuple[dict[fx.Node, LayerRows], str]:
    """What the rows of each ``pcg::lora`` of a graph are, and why rows of its results are not tokens in order, if so.

    Args:
        notes: what explain() shows goes there. remarks: what is counted, (reason, where): rules that failed.
        before: the same of an earlier graph of the model, whose results may be inputs of this one.
    """
    follower = _Follower(facts, notes, remarks)
    for node in gm.graph.nodes:
        follower.node(node, gm)
    if before:
        return {node: LayerRows(_name_of(node), None, before) for node in follower.layers}, before
    return follower.verdicts(), follower.moved


class _Follower:
    def __init__(self, facts: Mapping[fx.Node, NodeFacts], notes: list[str], remarks: list[tuple[str, str]]) -> None:
        self.facts, self.notes, self.remarks, self.indices = facts, notes, remarks, Indices()
        #: By the identity of a tensor, which the facts keep, and by input.
        self.states: dict[int, dict[fx.Node, State]] = {}
        self.by_storage: dict[int, dict[int, torch.Tensor]] = {}
        self.layers: dict[fx.Node, dict[fx.Node, State]] = {}
        #: Inputs that may hold tokens, each with one that stands for all whose rows it is combined with.
        self.class_of: dict[fx.Node, fx.Node] = {}
        self.dynamic: set[fx.Node] = set()
        #: Inputs whose rows are rows of the graph's results, and why those are not tokens in order.
        self.results: set[fx.Node] = set()
        self.moved = ""
        #: The node of the region that is being followed, and the facts of those that were.
        self.region: fx.Node | None = None
        self.kept: list[Any] = []

    def of(self, tensor: torch.Tensor) -> dict[fx.Node, State]:
        """What is known of a tensor, by input."""
        return self.states.get(id(tensor), {})

    def node(self, node: fx.Node, gm: fx.GraphModule) -> None:
        given = [t for source in node.all_input_nodes for t in tensors_in(self.facts[source].value)]
        if node.op == "output":
            for tensor in given:
                self._result(tensor)
        elif node.op == "placeholder":
            self._input(node, self.facts[node].value)
        elif node.target in _LAYERS:
            x = node.args[1] if len(node.args) > 1 else node.kwargs["x"]
            states = self.of(self.facts[x].value)  # type: ignore[index]
            if self.layers.setdefault(node, states) != states:
                self.layers[node] = {root: Lost("its region runs on rows in several orders") for root in states}
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            self._body(node, gm)
        for call in self.facts[node].ops if node in self.facts and node.target not in _LAYERS else ():
            self._call(node, call)
        related = {root for t in given for root, s in self.of(t).items() if isinstance(s, Lost) or moving(*s.dims)}  # type: ignore[union-attr]
        for tensor in tensors_in(self.facts[node].value) if node in self.facts and related else ():
            if id(tensor) not in self.states:
                # Nothing that was dispatched gave it.
                self._enter(tensor, {root: Lost(f"{node.name} may change the order of rows") for root in related})

    def _input(self, node: fx.Node, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            return
        self._enter(value, {})
        static = is_static_input(node) or "pcg_step_input" in node.meta or value.layout != torch.strided
        if value.dim() and not static:
            sizes = _tokens_in(value)
            strides = [size_of((size, 0) for size in sizes[i + 1 :]) for i in range(len(sizes))]
            dims = [fused([(as_expr(factor[0]), factor[1])]) for factor in zip(sizes, strides, strict=True)]
            dims += [columns(size) for size in value.shape[len(sizes) :]]
            self.class_of[node] = node
            if any(isinstance(as_expr(size), sympy.Basic) for size in value.shape):
                self.dynamic.add(node)
            self.states[id(value)] = {node: Rows(Order(size_of((size, 0) for size in sizes)), 0, tuple(dims))}

    def _result(self, tensor: torch.Tensor) -> None:
        for root, state in self.of(tensor).items():
            if isinstance(state, Rows) and moving(*state.dims):
                self.results.add(root)
            if tensor.is_floating_point() and tensor.dim() > 1 and not self.moved:
                if isinstance(state, Lost):
                    self.moved = f"ahead of a graph break, {state.reason}"
                elif state is not None and not state.like(state.dims[:-1]).in_order:
                    self.moved = "ahead of a graph break, rows were put in another order or picked"

    def _body(self, node: fx.Node, gm: fx.GraphModule) -> None:
        """Follows rows into a region that is a graph of its own and runs once, and out of it."""
        leaves = [leaf for leaf in tree_leaves((node.args, dict(node.kwargs))) if isinstance(leaf, fx.Node)]
        operands = [self.facts[leaf].value for leaf in leaves if leaf.op != "get_attr"]
        results = list(tensors_in(self.facts[node].value))
        if str(node.target) == "flex_attention":
            # Its queries' rows are its results'.
            self._enter(results[0], self.of(operands[0]))
        bodies = list(bodies_of(gm, node, self.facts, self.notes)) if str(node.target) in _REGIONS else []
        if len(bodies) == 1:
            (body, facts), outer, region = bodies[0], self.facts, self.region
            self.facts, self.region = facts, region or node
            self.kept.append(facts)
            inputs = body.graph.find_nodes(op="placeholder")
            for one, operand in zip(inputs, operands[len(operands) - len(inputs) :], strict=True):
                if isinstance(operand, torch.Tensor):
                    self._enter(facts[one].value, self.of(operand))
            for one in body.graph.nodes:
                if one.op == "output":
                    found = [t for n in one.all_input_nodes for t in tensors_in(facts[n].value)]
                elif one.op != "placeholder":
                    self.node(one, body)
            self.facts, self.region = outer, region
            for result, tensor in zip(results, found, strict=True) if len(found) == len(results) else ():
                self._enter(result, self.of(tensor))
        graphs = [getattr(gm, str(leaf.target), None) for leaf in leaves if leaf.op == "get_attr"]
        inner = [m for graph in graphs if isinstance(graph, fx.GraphModule) for m in graph.modules()]
        for one in (n for m in inner if isinstance(m, fx.GraphModule) for n in m.graph.nodes if n.target in _LAYERS):
            # Rows of other regions are unknown.
            self.layers.setdefault(one, {})

    def _enter(self, tensor: torch.Tensor, states: Mapping[fx.Node, State]) -> None:
        self.states[id(tensor)] = {root: state for root, state in states.items() if state is not None}
        self.by_storage.setdefault(storage_of(tensor), {})[id(tensor)] = tensor

    def _call(self, node: fx.Node, call: OpCall) -> None:
        written = list(written_tensors(call))
        targets = list(tensors_in(call.result)) or written
        given = list(tensors_in((call.args, dict(call.kwargs))))
        if not targets or isinstance(call.op, torch._ops.HigherOrderOperator):
            return
        for tensor in given:
            self.by_storage.setdefault(storage_of(tensor), {})[id(tensor)] = tensor
        name = str(call.op.name()).split(".")[0]
        name = name if name == "aten::copy_" else name.removesuffix("_")
        arguments = arguments_of(call.op, call.args, call.kwargs)
        found: list[dict[fx.Node, State]] = [{} for _ in targets]
        sources = [root for t in given[:1] for root, s in self.of(t).items() if name in _LOOK_UPS]
        for root in self.class_of if self.dynamic.isdisjoint(sources) else sources:
            # Rows that an index picks are the source's; the index's own rows don't matter.
            def state_of(tensor: torch.Tensor, root: fx.Node = root) -> State:
                return self.of(tensor).get(root)

            if any(root in self.of(t) for t in given):
                made = RowCall(name, arguments, targets, given, state_of, self.indices, self.region or node)
                for states, state in zip(found, self._after(call.op, made, node), strict=True):
                    states[root] = state
        for states in found:
            self._join(states)
        for tensor, states in zip(targets, found, strict=True):
            if any(tensor is one for one in written):
                self._write(tensor, states)
            elif not any(tensor is one for one in given):
                self._enter(tensor, states)
        for tensor in written:
            if not any(tensor is one for one in targets):
                self._write(tensor, {root: Lost(f"{name} writes it") for t in given for root in self.of(t)})
        self.indices.note(name, arguments, targets[-1])

    def _after(self, op: Any, call: RowCall, node: fx.Node) -> list[State]:
        try:
            if call.op == "pcg::paged_attention":
                found = queried(call, call.tensors[0])
            elif _attends(op):
                # A row for each query.
                found = queried(call, next(t for t in call.tensors if call.state(t) is not None))
            else:
                found = rows_after(op, call)
        except Exception as error:  # a rule met arguments it was not written for: counted, and the rows are lost
            found = Lost(f"{call.op} could not be followed: {type(error).__name__}")
            remark = (f"rows of LoRA layers: {found.reason}: {error}", str(place_of(node)))
            if remark not in self.remarks:
                self.remarks.append(remark)
        return found if isinstance(found, list) else [found] * len(call.results)

    def _write(self, tensor: torch.Tensor, states: dict[fx.Node, State]) -> None:
        """A tensor now holds other rows; so do those that share its memory."""
        old = self.of(tensor)
        others = [one for one in self.by_storage.get(storage_of(tensor), {}).values() if one is not tensor]
        self._enter(tensor, states)
        for one in (tensor, *others):
            self.indices.keys[id(one)] = object()
        for root in (root for root in {**old, **states} if old.get(root) != states.get(root)):
            for other in others:
                before = self.of(other).get(root)
                self.states.setdefault(id(other), {})[root] = _through(tensor, states.get(root), other, before)

    # -- which inputs are the tokens' ---------------------------------------------------------------------------

    def _join(self, states: Mapping[fx.Node, State]) -> None:
        """Inputs whose tokens are the same in one result are of the same tokens."""
        alike: dict[State, fx.Node] = {}
        for root, state in states.items():
            if isinstance(state, Rows) and not state.order.parts and moving(*state.dims):
                keep, gone = self.class_of[alike.setdefault(state, root)], self.class_of[root]
                self.class_of = {one: keep if own is gone else own for one, own in self.class_of.items()}

    def _tokens(self) -> tuple[list[fx.Node], str]:
        """The inputs that are the step's tokens, or why that is unknown."""
        groups = [[root for root, of in self.class_of.items() if of is own] for own in set(self.class_of.values())]
        groups = [g for g in groups if not self.dynamic.isdisjoint(g)] or groups
        serving = [g for g in groups if any(_of(states, g)[0] is not None for states in self.layers.values())]
        asked = [g for g in groups if not self.results.isdisjoint(g)] or serving
        if len(asked) > 1:
            asked = [g for g in asked if g in serving]
        if len(asked) == 1:
            return asked[0], ""
        names = ", ".join(sorted(root.name for group in asked for root in group))
        reason = f"which input has the step's tokens is unknown: {names}" if names else "no input has its rows"
        return [], reason

    def verdicts(self) -> dict[fx.Node, LayerRows]:
        """What each layer's rows are."""
        tokens, why = self._tokens()
        values = {id(tensor) for fact in self.facts.values() for tensor in tensors_in(fact.value)}
        found: dict[fx.Node, LayerRows] = {}
        for node, states in self.layers.items():
            rows, reason = _of(states, tokens) if tokens else (None, why)
            if rows is not None and any(id(index) not in values for index in _indices(rows.order)):
                rows, reason = None, "its rows are picked by an index that no node of the graph gives"
            sizes: tuple[Any, ...] = ()
            if rows is not None:
                root = next(root for root in tokens if states.get(root) is not None)
                sizes = tuple(size for size in _tokens_in(self.facts[root].value) if as_expr(size) != 1)
            found[node] = LayerRows(_name_of(node), rows, reason, sizes)
        return found


def _tokens_in(value: torch.Tensor) -> list[Any]:
    """The sizes that the tokens of an input lie along: all but a float tensor's last, which is their width."""
    floats = value.is_floating_point() or value.is_complex()
    return list(value.shape[: value.dim() - (value.dim() > 1 and floats)])


def _indices(order: Order) -> list[torch.Tensor]:
    own = [] if order.index is None else [order.index]
    return [*own, *(index for part in order.parts for index in _indices(part.order))]


def _of(states: Mapping[fx.Node, State], roots: list[fx.Node]) -> tuple[Rows | None, str]:
    """The rows of a layer's input among the tokens of some inputs, which must agree, or why there are none."""
    known = [state for root in roots if (state := states.get(root)) is not None]
    lost = next((state.reason for state in known if isinstance(state, Lost)), None)
    if lost is not None or not known:
        return None, lost or "its rows are not the step's tokens'"
    first = known[0]
    assert isinstance(first, Rows)
    if any(state != first for state in known):
        return None, "it combines rows in several orders"
    if moving(first.dims[-1]):
        return None, "its rows are made of several tokens each"
    return first.like(first.dims[:-1]), ""


def _through(tensor: torch.Tensor, state: State, other: torch.Tensor, before: State) -> State:
    """The rows of a tensor that shares memory with one that was written."""
    looks = [[(as_expr(size), as_expr(stride)) for size, stride in zip(t.shape, t.stride(), strict=True)]
             for t in (tensor, other)]  # fmt: skip
    if looks[0] == looks[1]:
        return state
    new: State = None
    if isinstance(state, Rows) and not isinstance(before, Lost):
        if tensor.dim() == other.dim():
            # Of the same rows, it may have other columns.
            if all(one == two for one, two, dim in zip(*looks, state.dims, strict=True) if moving(dim)):
                pairs = zip(state.dims, other.shape, strict=True)
                own = state.like(dim if moving(dim) else columns(size) for dim, size in pairs)
                new = meet([before, own], other.shape)
        elif before is None and tensor.is_contiguous() and other.is_contiguous():
            new = regroup(state, other.shape)
    return new or Lost("it is written through another view of its memory")


def _attends(op: Any) -> bool:
    """Whether an op attends: its queries' rows, the tokens of the batch's requests, are its results'."""
    ops, name = registered_split_ops(), str(op.name())
    known = ops.get(name) or ops.get(name.split(".")[0])
    return known is not None and "qo_indptr" in known.metadata


_OWNER = re.compile(r"^[LG](\['\w+'\]|\.\w+)(\[\d+\])*")
_PART = re.compile(r"(?:\._modules)?\[['\"]?([\w.]+)['\"]?\]")


def _name_of(node: fx.Node) -> str:
    """The path of the layer in the user's model, else the line that calls it."""
    paths = [path for path, *_ in (node.meta.get("nn_module_stack") or {}).values()]
    name = _PART.sub(r".\1", _OWNER.sub("", str(paths[-1]))).strip(".") if paths else ""
    return name or str(place_of(node))
