"""Where to cut a graph: the split ops in it, and the runs of nodes between them."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.node import map_arg

from ..errors import SplitOpNotFound, message
from ..split_ops import SplitOp, registered_split_ops
from .contexts import is_grad_switch, is_mode_switch, is_transform, transform_depth
from .facts import NodeFacts, tensors_in
from .sizes import is_scalar, symbols_of

__all__ = ["Cut", "Segment", "fills", "find_cuts", "name_tuple_elements", "op_names", "segments_of"]

_ALLOCATIONS = frozenset(
    f"aten::{name}"
    for base in ("empty", "zeros", "ones", "full")
    for name in (base, f"{base}_like", f"new_{base}", f"{base}_strided", f"new_{base}_strided")
)
_NO_EFFECT = frozenset({"_log_api_usage_once", "_log_api_usage_metadata"})
_DATA_TAGS = {"dynamic_output_shape", "data_dependent_output"}


@dataclass(frozen=True)
class Cut:
    """Why a node runs between pieces."""

    op: SplitOp
    reason: str


@dataclass
class Segment:
    """A run of nodes: a "piece" to capture, a "call" of one split op, or "trivial": no kernel but allocations."""

    kind: Literal["piece", "call", "trivial"]
    nodes: list[fx.Node] = field(default_factory=list)
    cut: Cut | None = None
    #: A split op lies inside a function transform (vmap, ...), which cannot be cut.
    inside_transform: bool = False


def op_names(node: fx.Node, facts: NodeFacts | None) -> set[str]:
    """Every name that a node answers to: of its target, of the ops that it dispatches, packet and overload."""
    names: set[str] = set()
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        names |= {target.name(), _packet(target.name()), f"{_packet(target.name())}.{target._overloadname}"}
    elif isinstance(target, torch._ops.OpOverloadPacket):
        names.add(target._qualified_op_name)
    elif isinstance(target, torch._ops.HigherOrderOperator):
        names.add(f"higher_order::{target.name()}")
    elif node.op == "call_method":
        names.add(f"aten::{target}")
    elif callable(target) and hasattr(torch.ops.aten, getattr(target, "__name__", "")):
        names.add(f"aten::{target.__name__}")
    for call in facts.ops if facts else ():
        if isinstance(call.op, torch._ops.OpOverload):
            packet = _packet(call.op.name())
            names |= {call.op.name(), packet, f"{packet}.{call.op._overloadname}"}
    return names


def _packet(name: str) -> str:
    library, _, op = name.partition("::")
    return f"{library}::{op.split('.')[0]}"


def find_cuts(
    gm: fx.GraphModule,
    facts: Mapping[fx.Node, NodeFacts],
    extra: Iterable[str],
    isolated: Mapping[fx.Node, str],
    on_missing: Callable[[SplitOpNotFound], None],
    outside: Callable[[fx.Node, NodeFacts | None], str | None] = lambda node, facts: None,
) -> dict[fx.Node, Cut]:
    """The nodes to run between pieces: registered split ops, ``extra`` ones by name, unsafe and ``isolated`` ones.

    ``outside`` gives a reason why no CUDA graph can hold a node, or None. ``on_missing`` is handed the error for a name
    in ``extra`` that matches nothing, and may raise it.
    """
    registry = registered_split_ops()
    wanted = {name: registry.get(name, SplitOp(name)) for name in extra}
    known = {**registry, **wanted}
    found: set[str] = set()
    seen: set[str] = set()
    cuts: dict[fx.Node, Cut] = {}
    known_sizes = symbols_of([facts[n].value for n in gm.graph.find_nodes(op="placeholder")])
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module") or is_mode_switch(node):
            continue
        names = op_names(node, facts.get(node))
        seen |= names
        found |= names & wanted.keys()
        # An overload name is the more precise registration.
        matches = sorted(names & known.keys(), key=lambda name: "." not in name)
        if matches:
            origin = "named in the options" if matches[0] in wanted else "registered"
            cuts[node] = Cut(known[matches[0]], f"split op {matches[0]}, {origin}")
        elif _checks_data(node, facts, known_sizes):
            reason = "it checks what only the data tell"
            cuts[node] = Cut(SplitOp(_plain_name(node), any_strides=True), reason)
        elif sets_state(node, facts.get(node)):
            cuts[node] = Cut(
                SplitOp(_plain_name(node)), "it changes a state outside the graph, which a replay would not"
            )
        elif node in isolated:
            cuts[node] = Cut(SplitOp(_plain_name(node), any_strides=True), isolated[node])
        else:
            seen_sizes = known_sizes | symbols_of([facts[n].value for n in node.all_input_nodes if n in facts])
            tag = _unsafe_tag(facts.get(node), known_sizes, seen_sizes) or outside(node, facts.get(node))
            if tag:
                cuts[node] = Cut(SplitOp(_plain_name(node), any_strides=True), tag)
    for name in wanted.keys() - found:
        close = difflib.get_close_matches(name, seen, n=3, cutoff=0.5)
        on_missing(
            SplitOpNotFound(
                message(
                    f"split op {name!r} matches no node of the graph",
                    why=f"Nearest in the graph: {', '.join(close)}."
                    if close
                    else "The graph has no op of a like name.",
                    cure=f'Write: options={{"split_ops": ["{close[0] if close else "mylib::attention"}"]}}',
                )
            )
        )
    return cuts


def _unsafe_tag(facts: NodeFacts | None, known_sizes: frozenset[Any], seen_sizes: frozenset[Any]) -> str | None:
    for call in facts.ops if facts else ():
        tags = {tag.name for tag in getattr(call.op, "tags", ())}
        if "cudagraph_unsafe" in tags:
            return f"{call.op} is tagged cudagraph_unsafe"
        # Indexing is tagged as well, for the sake of boolean masks.
        if tags & _DATA_TAGS and facts is not None and not symbols_of(facts.value) <= known_sizes:
            return f"the result of {call.op} depends on data in its size"
    if facts is not None and facts.ops and not symbols_of(facts.value) <= seen_sizes:
        # A slice to a size that may be negative: torch gives its result a size of its own.
        return f"the size of the result of {facts.ops[-1].op} is only known when it has run"
    return None


def sets_state(node: fx.Node, facts: NodeFacts | None) -> bool:
    """Whether a node takes and gives no tensor and is no arithmetic: it can only be there for an effect."""
    if facts is None or node.op != "call_function" or facts.value is not None or facts.ops:
        return False
    module = getattr(node.target, "__module__", None) or ""
    name = getattr(node.target, "__name__", "")
    return not (is_transform(node) or _is_assertion(node) or name in _NO_EFFECT) and module.startswith("torch")


def _checks_data(node: fx.Node, facts: Mapping[fx.Node, NodeFacts], known_sizes: frozenset[Any]) -> bool:
    """Whether a node is an assertion on numbers, some of them known only once the graph runs.

    It runs between pieces, on the numbers themselves: a compiler may believe it, and leave it out.
    """
    if node.op != "call_function" or not _is_assertion(node):
        return False
    return not symbols_of([facts[n].value for n in node.all_input_nodes if n in facts]) <= known_sizes


def _plain_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def name_tuple_elements(gm: fx.GraphModule, facts: Mapping[fx.Node, NodeFacts]) -> bool:
    """Gives every element of a tuple-valued node a node of its own, so only tensors cross boundaries.

    Returns whether the graph changed.
    """
    changed = False
    for node in list(gm.graph.nodes):
        if node not in facts or is_scalar(facts[node].value) or node.op in ("placeholder", "output", "get_attr"):
            continue
        value = facts[node].value
        if not isinstance(value, (tuple, list)):
            continue
        others = [user for user in node.users if not _is_getitem(user)]
        if not others:
            continue
        elements: list[fx.Node] = []
        with gm.graph.inserting_after(node):
            for i in reversed(range(len(value))):
                element = gm.graph.call_function(operator.getitem, (node, i))
                element.stack_trace = node.stack_trace
                elements.insert(0, element)
        replacement = elements if isinstance(value, list) else tuple(elements)
        for user in others:
            user.args = _with_elements(user.args, node, replacement)
            user.kwargs = _with_elements(user.kwargs, node, replacement)
        changed = True
    if changed:
        gm.recompile()
    return changed


def _with_elements(arguments: Any, node: fx.Node, elements: Any) -> Any:
    return map_arg(arguments, lambda one: elements if one is node else one)


def _is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem and not isinstance(node.args[1], fx.Node)


def segments_of(gm: fx.GraphModule, facts: Mapping[fx.Node, NodeFacts], cuts: Mapping[fx.Node, Cut]) -> list[Segment]:
    """The graph as an ordered list of segments.

    Nodes whose value is a number belong to none: their values follow from the sizes. An element of a tuple
    belongs to the segment that makes the tuple.
    """
    segments: list[Segment] = []
    home: dict[fx.Node, Segment] = {}
    current: Segment | None = None
    depth = 0
    for node in gm.graph.nodes:
        depth += transform_depth(node)
        # Inside a transform, gradients are what is computed.
        switches = is_mode_switch(node) and not (depth and is_grad_switch(node))
        if node.op in ("placeholder", "output", "get_attr") or switches:
            continue
        if node not in cuts and is_scalar(facts[node].value) and not _has_effect(node, facts[node]):
            continue
        source = node.args[0] if _is_getitem(node) else None
        if isinstance(source, fx.Node) and source in home and isinstance(facts[source].value, (tuple, list)):
            segment = home[source]
        elif node in cuts and depth == 0:
            segment = Segment("call", cut=cuts[node])
            segments.append(segment)
            current = None
        else:
            if current is None:
                current = Segment("piece")
                segments.append(current)
            segment = current
        if node in cuts and depth > 0:
            segment.inside_transform = True
        segment.nodes.append(node)
        home[node] = segment
    for segment in segments:
        if segment.kind == "piece" and all(_makes_nothing(facts[node]) for node in segment.nodes):
            segment.kind = "trivial"
    return segments


def _has_effect(node: fx.Node, facts: NodeFacts) -> bool:
    """Whether a node without a tensor result must still run: it does more than compute with sizes."""
    if facts.writes or is_transform(node) or is_grad_switch(node):
        return True
    if node.op == "call_function" and _is_assertion(node):
        # On sizes: it held when the graph was traced, and is a guard since. On others, it is cut out.
        return False
    return any(
        next(tensors_in((call.args, dict(call.kwargs))), None) is not None
        for call in facts.ops
        if not _is_size_query(call.op)
    )


def _is_assertion(node: fx.Node) -> bool:
    """Whether a node asserts something of numbers."""
    return getattr(node.target, "__name__", "").startswith(("_check", "sym_constrain", "_assert_scalar"))


def _is_size_query(op: Any) -> bool:
    return getattr(op, "__name__", "").startswith(("sym_", "size", "stride", "numel", "dim", "storage_offset"))


def _makes_nothing(facts: NodeFacts) -> bool:
    """Whether a node launches no kernel on data: a view, or a fresh allocation."""
    for call in facts.ops:
        if not isinstance(call.op, torch._ops.OpOverload):
            return False
        if _packet(call.op.name()) in _ALLOCATIONS or call.op._overloadname == "alias":
            continue
        returns = call.op._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view:
            return False
    return True


def fills(facts: NodeFacts) -> bool:
    """Whether a node puts values into memory: of the ops of a trivial segment, those that allocate and fill."""
    names = {_packet(call.op.name()) for call in facts.ops if isinstance(call.op, torch._ops.OpOverload)}
    return any(name in _ALLOCATIONS and "empty" not in name for name in names)
