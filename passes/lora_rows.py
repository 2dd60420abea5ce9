"""Whose token each row of a LoRA layer's input is, read from the graph.

Every input of the graph may hold the step's tokens. For each of them, the order of its rows is followed through the
graph (:mod:`.lora_row_rules`); then it is decided which inputs are the tokens', and each layer's rows are looked up.
That two tensors have equally many rows says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from pcg_compile.graph.facts import NodeFacts, OpCall, storage_of, tensors_in, written_tensors
from pcg_compile.graph.where import place_of
from pcg_compile.ops import registered_split_ops
from pcg_compile.torch_compat.dynamo_graphs import is_static_input

from . import lora_row_indexing  # noqa: F401 - it enters its rules
from .bodies import bodies_of
from .lora_orders import Lost, Orders, Rows, State, axes_of, plain_dims
from .lora_row_rules import RowCall, queried, row_rule_for
from .safety_dims import as_expr
from .safety_rules import rule_for as padding_rule_for

__all__ = ["LayerRows", "follow_rows"]

_LAYERS = (torch.ops.pcg.lora, torch.ops.pcg.lora.default)
#: Ops of pcg's own whose queries are tokens of the step, in its order.
_ATTENTION = "pcg::paged_attention"
#: Ops that run their region once, and give what it gives.
_REGIONS = ("wrap", "tag_activation_checkpoint", "wrap_activation_checkpoint", "invoke_subgraph", "wrap_with_autocast",
            "wrap_with_set_grad_enabled")  # fmt: skip
_SAME = ("_to_copy", "clone", "detach", "alias", "contiguous", "lift_fresh")


@dataclass(frozen=True)
class LayerRows:
    """What the rows of a layer's input are.

    Attributes:
        name: the layer's. rows: the order of tokens that they lie in; None where ``reason`` says why it is unknown.
        tokens: the sizes of the step's tokens, row-major; None where it is unknown which input has them.
    """

    name: str
    rows: Rows | None = None
    reason: str = ""
    tokens: tuple[Any, ...] = ()

    @property
    def in_order(self) -> bool:
        """Whether row i is token i."""
        if self.rows is None:
            return False
        order = self.rows.order
        axes = list(axes_of(self.rows.dims[:-1]))
        if any(size != 1 and axis is None for dim in self.rows.dims[:-1] for size, axis in dim):
            return False
        while order.kind == "split":
            pair = list(order.axes[-2:])
            at = axes.index(pair[0]) if pair[0] in axes else len(axes)
            if axes[at : at + 2] != pair:
                return False
            axes[at : at + 2] = [order.parts[1]]
            order = order.parts[0]
        return order.kind == "tokens" and tuple(axes) == order.axes


def follow_rows(
    gm: fx.GraphModule, facts: Mapping[fx.Node, NodeFacts], notes: list[str], before: str = ""
) -> tuple[dict[fx.Node, LayerRows], str]:
    """What the rows of each ``pcg::lora`` of a graph are, and why rows of its results are not tokens in order, if so.

    Args:
        notes: remarks for explain() go there.
        before: the same of an earlier graph of the model, whose results may be inputs of this one.
    """
    followed = _Follower(facts, notes)
    for node in gm.graph.nodes:
        followed.node(node, gm)
    moved = before or followed.moved
    if before:
        return {node: LayerRows(_name_of(node), None, before) for node in followed.layers}, moved
    return followed.verdicts(), moved


class _Follower:
    def __init__(self, facts: Mapping[fx.Node, NodeFacts], notes: list[str]) -> None:
        self.facts, self.notes = facts, notes
        self.orders = Orders()
        #: By tensor and input; tensors are kept by the facts, so that identities stay theirs.
        self.states: dict[int, dict[fx.Node, State]] = {}
        self.keys: dict[int, Hashable] = {}
        self.by_storage: dict[int, dict[int, torch.Tensor]] = {}
        self.roots: list[fx.Node] = []
        self.layers: dict[fx.Node, dict[fx.Node, State]] = {}
        #: Inputs by an input that stands for all that have their rows in one order.
        self.class_of: dict[fx.Node, fx.Node] = {}
        #: (input, input): rows of the first are picked by an index whose rows are the second's.
        self.picks: set[tuple[fx.Node, fx.Node]] = set()
        self.queries: set[fx.Node] = set()
        self.kept: list[Any] = []
        #: The node of the region that is being followed, if any.
        self.region: fx.Node | None = None
        #: Inputs that rows of the graph's results are of.
        self.results: set[fx.Node] = set()
        #: Why rows of the graph's results are not tokens in order.
        self.moved = ""
        self.fresh = 0
        #: Keys of 0, 1, 2, ...
        self.counting: set[Hashable] = set()

    # -- one node after the other -------------------------------------------------------------------------------

    def node(self, node: fx.Node, gm: fx.GraphModule) -> None:
        self.orders.place = self.region or node
        fact = self.facts.get(node)
        if node.op == "output" or fact is None:
            for source in node.all_input_nodes if node.op == "output" else ():
                for tensor in tensors_in(self.facts[source].value):
                    for root, state in self.states.get(id(tensor), {}).items():
                        if isinstance(state, Rows) and set(axes_of(state.dims)) == set(state.order.axes):
                            self.results.add(root)
                        if tensor.is_floating_point() and tensor.dim() > 1:
                            self.moved = self.moved or _why_moved(state)
            return
        if node.op == "placeholder":
            self._input(node, fact.value)
            return
        if node.target in _LAYERS:
            x = self.facts[_argument(node, 1, "x")].value
            states = dict(self.states.get(id(x), {}))
            if node in self.layers and self.layers[node] != states:
                # A region that two ops run.
                states = {root: Lost("its region runs on rows in several orders") for root in states}
            self.layers[node] = states
            return
        before = self._states_into(node)
        for call in fact.ops:
            self._call(node, call)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            self._bodies(node, gm)
        for tensor in tensors_in(fact.value):
            if before and id(tensor) not in self.states:
                # Nothing that was dispatched gave it.
                self._enter(tensor, {root: Lost(f"{node.name} may change the order of rows") for root in before})

    def _bodies(self, node: fx.Node, gm: fx.GraphModule) -> None:
        """Follows rows into regions that are graphs of their own, and out of the only one."""
        leaves = [leaf for leaf in tree_leaves((node.args, dict(node.kwargs))) if isinstance(leaf, fx.Node)]
        operands = [self.facts[leaf].value for leaf in leaves if leaf.op != "get_attr"]
        graphs = [getattr(gm, str(leaf.target), None) for leaf in leaves if leaf.op == "get_attr"]
        inside = [one for graph in graphs if isinstance(graph, fx.GraphModule) for one in _layers_in(graph)]
        runs_once = str(node.target) in _REGIONS
        if not inside and not runs_once:
            return
        region, self.region = self.region, self.region or node
        outer, results = self.facts, list(tensors_in(self.facts[node].value))
        found: list[list[torch.Tensor]] = []
        for body, facts in bodies_of(gm, node, outer, self.notes):
            inputs = body.graph.find_nodes(op="placeholder")
            self.facts = facts
            for one, operand in zip(inputs, operands[len(operands) - len(inputs) :], strict=True):
                if isinstance(operand, torch.Tensor):
                    self._enter(facts[one].value, self.states.get(id(operand), {}), self._key(operand))
            for one in body.graph.nodes:
                if one.op not in ("placeholder", "output"):
                    self.node(one, body)
                elif one.op == "output":
                    leaves = [leaf for leaf in tree_leaves(one.args) if isinstance(leaf, fx.Node)]
                    found.append([t for leaf in leaves for t in tensors_in(facts[leaf].value)])
            # Facts of a body keep its tensors, and so their identities.
            self.kept.append(facts)
        self.facts, self.region = outer, region
        for one in inside:
            self.layers.setdefault(one, {})
        if runs_once and len(found) == 1 and len(found[0]) == len(results):
            for result, tensor in zip(results, found[0], strict=True):
                self._enter(result, self.states.get(id(tensor), {}))

    def _states_into(self, node: fx.Node) -> set[fx.Node]:
        return {
            root
            for source in node.all_input_nodes
            for tensor in tensors_in(self.facts[source].value)
            for root, state in self.states.get(id(tensor), {}).items()
            if isinstance(state, Lost) or (isinstance(state, Rows) and axes_of(state.dims))
        }

    def _input(self, node: fx.Node, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            return
        self._enter(value, {})
        if is_static_input(node) or "pcg_step_input" in node.meta or value.layout != torch.strided:
            return
        dims = list(plain_dims(value.shape))
        columns = value.dim() > 1 and (value.is_floating_point() or value.is_complex())
        along = [i for i, size in enumerate(value.shape[: value.dim() - columns]) if as_expr(size) != 1]
        if not value.dim():
            return
        order = self.orders.tokens(node, [as_expr(value.shape[i]) for i in along])
        for i, axis in zip(along, order.axes, strict=True):
            dims[i] = ((axis.size, axis),)
        self.roots.append(node)
        self.class_of[node] = node
        self.states[id(value)] = {node: Rows(order, tuple(dims))}

    def _enter(self, tensor: torch.Tensor, states: dict[fx.Node, State], key: Hashable = None) -> None:
        self.states[id(tensor)] = {root: state for root, state in states.items() if state is not None}
        self.by_storage.setdefault(storage_of(tensor), {})[id(tensor)] = tensor
        if key is None:
            self.fresh += 1
            key = ("value", self.fresh)
        self.keys[id(tensor)] = key

    def _key(self, tensor: torch.Tensor) -> Hashable:
        if id(tensor) not in self.keys:
            self._enter(tensor, {})
        return self.keys[id(tensor)]

    def _call(self, node: fx.Node, call: OpCall) -> None:
        results = list(tensors_in(call.result))
        name = str(call.op.name() if isinstance(call.op, torch._ops.OpOverload) else call.op)
        arguments = _named(call)
        written = list(written_tensors(call))
        call_tensors = list(tensors_in((call.args, dict(call.kwargs))))
        if not results and not written:
            return
        roots = dict.fromkeys(root for t in call_tensors for root in self.states.get(id(t), {}))
        keys = self._keys_of(name, arguments, results, call_tensors)
        targets = results or written
        found: list[dict[fx.Node, State]] = [{} for _ in targets]
        for root in roots:
            states = self._rule(call.op, name, arguments, targets, root, call_tensors)
            for states_of, state in zip(found, states, strict=True):
                states_of[root] = state
        self._note_classes(name, arguments, call_tensors, found)
        inverse = self._inverse_of(name, arguments)
        for tensor, own, key in zip(targets, found, keys or [inverse] * len(targets), strict=False):
            if any(tensor is one for one in written):
                self._write(tensor, own)
                self.keys[id(tensor)] = inverse or self.keys[id(tensor)]
            elif not any(tensor is one for one in call_tensors):
                self._enter(tensor, own, key)
        for tensor in written:
            if not any(tensor is one for one in targets):
                self._write(tensor, {root: Lost(f"{name} writes it") for root in roots})

    def _rule(
        self, op: Any, name: str, arguments: dict[str, Any], targets: list[torch.Tensor], root: fx.Node,
        given: list[torch.Tensor],
    ) -> list[State]:  # fmt: skip
        def state(tensor: torch.Tensor) -> State:
            return self.states.get(id(tensor), {}).get(root)

        call = RowCall(op, arguments, targets, self.orders, state, self._key)
        found = row_rule_for(op)
        try:
            if found is not None:
                result = found(call)
            elif name.split(".")[0] == _ATTENTION:
                self._note_query(root, state(given[0]))
                result = queried(call, given[0])
            elif _keeps_queries(name):
                result = queried(call, next(t for t in given if state(t) is not None))
            elif not name.startswith("aten::") and padding_rule_for(op) is not None:
                # Its owner says that rows stay rows.
                result = queried(call, next(t for t in given if state(t) is not None))
            elif any(isinstance(s := state(t), Lost) or (isinstance(s, Rows) and axes_of(s.dims)) for t in given):
                result = call.lost()
            else:
                result = None
        except Exception as error:
            # A rule that meets arguments it was not written for: the rows are lost, and the layer refused by name.
            result = Lost(f"{name} could not be followed: {type(error).__name__}")
        return result if isinstance(result, list) else [result] * len(targets)

    # -- memory -------------------------------------------------------------------------------------------------

    def _write(self, tensor: torch.Tensor, states: dict[fx.Node, State]) -> None:
        """A tensor now holds other rows; so do those that share its memory."""
        old = self.states.get(id(tensor), {})
        others = dict(self.by_storage.get(storage_of(tensor), {}))
        self._enter(tensor, states)
        changed = [root for root in {**old, **self.states[id(tensor)]} if old.get(root) != states.get(root)]
        for other in others.values():
            if other is tensor:
                continue
            self.fresh += 1
            self.keys[id(other)] = ("value", self.fresh)
            for root in changed:
                self.states.setdefault(id(other), {})[root] = self._through(tensor, states.get(root), other, root)

    def _through(self, tensor: torch.Tensor, state: State, other: torch.Tensor, root: fx.Node) -> State:
        """The rows of a tensor that shares the memory of one that was written."""
        before = self.states.get(id(other), {}).get(root)
        if isinstance(state, Rows):
            same = [as_expr(size) for size in tensor.shape] == [as_expr(size) for size in other.shape]
            if same and [as_expr(s) for s in tensor.stride()] == [as_expr(s) for s in other.stride()]:
                return state
            if before is None or isinstance(before, Rows):
                if tensor.dim() == other.dim() and all(
                    as_expr(one) == as_expr(two)
                    for one, two, dim in zip(tensor.shape, other.shape, state.dims, strict=True)
                    if axes_of([dim])
                ):
                    dims = [
                        dim if axes_of([dim]) else ((as_expr(size), None),)
                        for dim, size in zip(state.dims, other.shape, strict=True)
                    ]
                    return self.orders.meet([(before, other.dim()), (Rows(state.order, tuple(dims)), other.dim())],
                                            other.shape)  # fmt: skip
                if before is None and tensor.is_contiguous() and other.is_contiguous():
                    whole = self.orders.regroup(state, other.shape)
                    if whole is not None:
                        return whole
        return Lost("it is written through another view of its memory")

    # -- values of indices --------------------------------------------------------------------------------------

    def _keys_of(
        self, name: str, arguments: dict[str, Any], results: list[torch.Tensor], given: list[torch.Tensor]
    ) -> list[Hashable] | None:
        """Keys of values that are computed alike, for tensors of whole numbers, which may be indices."""
        if not results or any(t.is_floating_point() or t.is_complex() for t in results[-1:]):
            return None
        base = name.split(".")[0].removeprefix("aten::")
        if name.partition("::")[0] != "aten" or any(one is t for t in given for one in results):
            return None
        whole = all(not (t.is_floating_point() or t.is_complex() or t.dtype is torch.bool) for t in given)
        if base in _SAME and given and whole:
            return [self._key(given[0])]
        if base in ("rand", "randint", "randperm", "empty", "empty_like", "new_empty", "bernoulli", "multinomial"):
            return None
        try:
            key = (name, *(self._value_key(value) for value in arguments.items()))
            hash(key)
        except TypeError:
            return None
        if base == "arange" and arguments.get("start", 0) == 0 and arguments.get("step", 1) == 1:
            self.counting.add((key, 0))
        count, source = arguments.get("other"), arguments.get("self")
        divides = base == "floor_divide" or (base == "div" and arguments.get("rounding_mode") in ("floor", "trunc"))
        if divides and type(count) is int and count > 0 and isinstance(source, torch.Tensor) and whole:
            self.orders.quotients[(key, 0)] = self._key(source), source, count
        if base == "sort" and len(results) == 2 and results[1].dim() == 1:
            self.orders.permutations.add((key, 1))
            source = self._key(given[0])
            falling = bool(arguments.get("descending"))
            if source in self.orders.permutations and not falling:
                self.orders.inverses[(key, 1)] = source
                self.orders.inverses.setdefault(source, (key, 1))
        return [(key, i) for i in range(len(results))]

    def _inverse_of(self, name: str, arguments: dict[str, Any]) -> Hashable:
        """The key of ``inverse[permutation] = arange(n)``, whatever lay in ``inverse`` before."""
        if name.split(".")[0].removeprefix("aten::").rstrip("_") not in ("scatter", "index_put", "index_copy"):
            return None
        target, index = arguments["self"], arguments.get("indices", arguments.get("index"))
        values = arguments.get("values", arguments.get("source", arguments.get("src")))
        index = index[0] if isinstance(index, (list, tuple)) and len(index) == 1 else index
        if not isinstance(index, torch.Tensor) or not isinstance(values, torch.Tensor) or target.dim() != 1:
            return None
        key = self._key(index)
        if key not in self.orders.permutations or self._key(values) not in self.counting:
            return None
        self.orders.inverses[("inverse", key)] = key
        return ("inverse", key)

    def _value_key(self, value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            return ("tensor", self._key(value))
        if isinstance(value, (list, tuple)):
            return tuple(self._value_key(one) for one in value)
        if isinstance(value, (torch.SymInt, int)):
            return ("number", as_expr(value))
        return (type(value).__name__, str(value))

    # -- which inputs are the tokens' ---------------------------------------------------------------------------

    def _note_query(self, root: fx.Node, state: State) -> None:
        if (
            isinstance(state, Rows)
            and state.order.kind == "tokens"
            and set(axes_of(state.dims)) == set(state.order.axes)
        ):
            self.queries.add(root)

    def _note_classes(
        self, name: str, arguments: dict[str, Any], given: list[torch.Tensor], found: list[dict[fx.Node, State]]
    ) -> None:
        base = name.split(".")[0].removeprefix("aten::")
        if base in ("index", "index_select", "gather", "_unsafe_index") and given:
            sources = self.states.get(id(given[0]), {})
            for index in given[1:]:
                for root, state in self.states.get(id(index), {}).items():
                    if isinstance(state, Rows) and state.order.kind == "tokens":
                        self.picks.update((source, root) for source in sources if source is not root)
            return
        for states in found:
            bases: dict[Any, fx.Node] = {}
            for root, state in states.items():
                if not isinstance(state, Rows) or state.order.kind != "tokens" or not state.order.axes:
                    continue
                if set(axes_of(state.dims)) != set(state.order.axes):
                    continue
                place = {axis: i for i, axis in enumerate(state.order.axes)}
                look = tuple(tuple(place.get(axis, -1) for _, axis in dim if axis is not None) for dim in state.dims)
                other = bases.setdefault(look, root)
                if other is not root:
                    self._join(other, root)

    def _join(self, one: fx.Node, other: fx.Node) -> None:
        keep, gone = self.class_of[one], self.class_of[other]
        if keep is not gone:
            for root, own in self.class_of.items():
                if own is gone:
                    self.class_of[root] = keep

    def _tokens(self) -> tuple[fx.Node | None, str]:
        """The inputs that are the step's tokens, by their class, or why that is unknown."""
        classes = list(dict.fromkeys(self.class_of.values()))
        dynamic = [c for c in classes if any(_is_dynamic(self._sizes(root)) for root in self._members(c))]
        classes = dynamic or classes
        asked = [c for c in classes if any(root in self.queries for root in self._members(c))]
        if asked:
            return (asked[0], "") if len(asked) == 1 else (None, "attention has queries of several inputs")
        served = {c: sum(self._of_class(states, c)[0] is not None for states in self.layers.values()) for c in classes}
        wanted = [c for c in classes if not self.results.isdisjoint(self._members(c))]
        wanted = wanted or [c for c in classes if served[c]]
        wanted = [c for c in wanted if served[c] == max(served[one] for one in wanted)]
        picked = {self.class_of[root] for source, root in self.picks if self.class_of[source] in wanted}
        if len(wanted) > 1:
            wanted = [c for c in wanted if c not in picked] or wanted
        if len(wanted) == 1:
            return wanted[0], ""
        if not wanted:
            return None, "no input of the graph has its rows"
        names = ", ".join(sorted(root.name for c in wanted for root in self._members(c)))
        return None, f"which input has the step's tokens is unknown: {names}"

    def _members(self, c: fx.Node) -> list[fx.Node]:
        return [root for root, own in self.class_of.items() if own is c]

    def _sizes(self, root: fx.Node) -> tuple[Any, ...]:
        value = self.facts[root].value
        return tuple(as_expr(size) for size in value.shape)

    def _of_class(self, states: Mapping[fx.Node, State], c: fx.Node) -> tuple[Rows | None, str]:
        """The rows that a tensor has of the inputs of a class, which must agree, or why there are none."""
        found: Rows | None = None
        shape: Any = None
        for root in self._members(c):
            state = states.get(root)
            if state is None:
                continue
            if isinstance(state, Lost):
                return None, state.reason
            dims = state.dims[:-1]
            axes = axes_of(dims)
            if set(axes) != set(state.order.axes) or len(axes) != len(state.order.axes):
                return None, "its rows are made of several tokens each"
            if not state.order.whole:
                return None, "some of its rows are no token's"
            look = (_look(state.order), _dims_look(state.order, dims))
            if found is None:
                found, shape = state, look
            elif look != shape:
                return None, "it combines rows in several orders"
        return found, "" if found is not None else "its rows are not the step's tokens'"

    def verdicts(self) -> dict[fx.Node, LayerRows]:
        """What each layer's rows are."""
        tokens, why = self._tokens()
        values = {id(tensor) for fact in self.facts.values() for tensor in tensors_in(fact.value)}
        found: dict[fx.Node, LayerRows] = {}
        for node, states in self.layers.items():
            rows, reason = self._of_class(states, tokens) if tokens is not None else (None, why)
            sizes: tuple[Any, ...] = ()
            if rows is not None:
                root = _root_of(rows.order)
                shape = self.facts[root.parts[0]].value.shape
                sizes = tuple(size for size in shape if as_expr(size) != 1)[: len(root.axes)]
                if any(id(tensor) not in values for order in _orders_in(rows.order) for tensor in order.tensors):
                    rows, reason = None, "it picks rows by an index that no node of the graph gives"
            found[node] = LayerRows(_name_of(node), rows, reason, sizes)
        return found


def _layers_in(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for graph in gm.modules() if isinstance(graph, fx.GraphModule) for n in graph.graph.nodes
            if n.op == "call_function" and n.target in _LAYERS]  # fmt: skip


def _why_moved(state: State) -> str:
    if isinstance(state, Lost):
        return f"ahead of a graph break, {state.reason}"
    if state is None:
        return ""
    if set(axes_of(state.dims)) == set(state.order.axes) and state.order.kind in ("tokens", "split"):
        return ""
    return "ahead of a graph break, rows were put in another order, picked or summed up"


def _root_of(order: Any) -> Any:
    while order.kind != "tokens":
        order = next(o for o, _, _ in order.parts[0] if o is not None) if order.kind == "cat" else order.parts[0]
    return order


def _orders_in(order: Any) -> list[Any]:
    """An order and all that it is made of."""
    if order is None or order.kind == "tokens":
        return []
    parents = [one for one, _, _ in order.parts[0]] if order.kind == "cat" else [order.parts[0]]
    return [order, *(inner for parent in parents for inner in _orders_in(parent))]


def _look(order: Any) -> Hashable:
    """An order without the input that it begins with: two inputs' tokens that went the same way look alike."""
    if order.kind == "tokens":
        return ("tokens", len(order.axes))
    if order.kind == "cat":
        return ("cat", *(one and (_look(one), _dims_look(one, [dim]), str(size)) for one, dim, size in order.parts[0]))
    parent, what, *rest = order.parts
    if order.kind == "split":
        return ("split", _look(parent), parent.axes.index(what), str(rest))
    dims = what if order.kind == "take" else [what]
    numbers = () if order.kind == "take" else tuple(map(str, rest))
    return (order.kind, _look(parent), _dims_look(parent, dims), numbers, tuple(map(id, order.tensors)))


def _dims_look(order: Any, dims: Sequence[Any]) -> Hashable:
    return tuple(tuple((str(s), -1 if a is None else order.axes.index(a)) for s, a in dim if s != 1) for dim in dims)


def _is_dynamic(sizes: Sequence[Any]) -> bool:
    return any(isinstance(size, sympy.Basic) and bool(size.free_symbols) for size in sizes)


def _argument(node: fx.Node, position: int, name: str) -> fx.Node:
    found = node.args[position] if len(node.args) > position else node.kwargs[name]
    assert isinstance(found, fx.Node)
    return found


def _named(call: OpCall) -> dict[str, Any]:
    schema = getattr(call.op, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else [f"arg{i}" for i in range(len(call.args))]
    named = dict(zip(names, call.args, strict=False))
    named.update(call.kwargs)
    return named


def _keeps_queries(name: str) -> bool:
    """Whether an op attends: its queries' rows, the tokens of the batch's requests, are its results'."""
    ops = registered_split_ops()
    op = ops.get(name) or ops.get(name.split(".")[0])
    return op is not None and ("qo_indptr" in op.metadata or name.startswith("higher_order::flex_attention"))


_OWNER = re.compile(r"^[LG](\['\w+'\]|\.\w+)(\[\d+\])*")
_PART = re.compile(r"(?:\._modules)?\[['\"]?([\w.]+)['\"]?\]")


def _name_of(node: fx.Node) -> str:
    """The path of the layer in the user's model, else the line that calls it."""
    paths = [path for path, *_ in (node.meta.get("nn_module_stack") or {}).values()]
    name = _PART.sub(r".\1", _OWNER.sub("", str(paths[-1]))).strip(".") if paths else ""
    return name or str(place_of(node))
