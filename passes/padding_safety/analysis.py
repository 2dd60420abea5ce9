"""Decides whether a piece may be captured at a bucket: only if its real rows cannot depend on padding rows.

The piece is traced to functional aten form and interpreted over dimensions (:mod:`.dims`). The real entries of every
input are right and lie first. Each op's rule (:mod:`.rules`) says where the result's are, or that they may depend on
padding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from pcg_compile.attention.ops import store_kv
from pcg_compile.fx.facts import arguments_of
from pcg_compile.fx.functional import functional_form
from pcg_compile.fx.places import place_of
from pcg_compile.lora.ops import route_form, row_wise_form, row_wise_form_of_many

from . import index_rules, op_rules, rules  # noqa: F401 - the first two enter their rules
from .dims import Mixing, as_expr, dims_of, grows, has_tokens, is_prefix
from .masks import finiteness, known_after
from .reach import Counts, Reach
from .rules import (
    OTHER,
    REPEATED,
    WILD,
    Call,
    Known,
    Tracked,
    packet_of,
    register_row_rule,
)  # fmt: skip

__all__ = ["NodeVerdict", "PieceSafety", "analyze_piece", "register_row_rule"]

Kind = Literal["row-wise", "prefix", "mixing", "unknown"]
#: What pcg's own ops do with rows, in ops that the analysis has rules for.
_ROW_FORMS: dict[object, Callable[..., Any]] = {
    torch.ops.pcg.store_kv.default: store_kv,
    torch.ops.pcg.lora_apply.default: row_wise_form,
    torch.ops.pcg.lora_apply_many.default: row_wise_form_of_many,
    torch.ops.pcg.lora_route_rows.default: route_form,
}
_ORDER: tuple[Kind, ...] = ("row-wise", "prefix", "unknown", "mixing")


@dataclass(frozen=True)
class NodeVerdict:
    """What one op does with padding, why, and the user's line."""

    kind: Kind
    op: str
    reason: str
    where: str
    #: Whether a rule, or the tracer, raised what it should not: that is counted.
    failed: bool = False


@dataclass(frozen=True)
class PieceSafety:
    """The verdict on a piece: the worst of its nodes, the deciding one first.

    ``row_indices`` are (input position, symbol): index inputs that pick rows, whose negative values count from the
    real size of that symbol and must be made positive before the piece runs at a bucket.
    """

    kind: Kind
    nodes: tuple[NodeVerdict, ...] = ()
    row_indices: tuple[tuple[int, Any], ...] = ()
    #: (size, size): a step where they differ is not captured.
    equals: tuple[tuple[Any, Any], ...] = ()
    #: Indices that must stay within what they look up at a bucket too.
    reaches: tuple[Reach, ...] = ()
    #: (input, size): masks that must be padded with zeros along a size.
    zeroed: tuple[tuple[str, Any], ...] = ()
    #: Of the padding of its results, see :mod:`.masks`; and of what it writes.
    finiteness: tuple[int, ...] = ()

    def renamed(self, names: Mapping[sympy.Symbol, sympy.Symbol]) -> PieceSafety:
        """The verdict on a piece of the same structure, whose sizes have other names."""
        if all(one == other for one, other in names.items()):
            return self

        def other(expr: Any) -> Any:
            return expr.xreplace(names) if isinstance(expr, sympy.Basic) else expr

        return replace(
            self,
            row_indices=tuple((position, other(symbol)) for position, symbol in self.row_indices),
            equals=tuple((other(one), other(two)) for one, two in self.equals),
            reaches=tuple(reach.renamed(names) for reach in self.reaches),
            zeroed=tuple((name, other(symbol)) for name, symbol in self.zeroed),
        )

    def finiteness_of(self, result: int) -> int:
        """Of the padding of a result."""
        if result < len(self.finiteness):
            return self.finiteness[result]
        return REPEATED if self.kind == "row-wise" else WILD

    @property
    def reason(self) -> str:
        """Of the deciding node."""
        return f"{self.nodes[0].op}: {self.nodes[0].reason}" if self.nodes else ""

    @property
    def where(self) -> str:
        """Of the deciding node."""
        return self.nodes[0].where if self.nodes else ""


def analyze_piece(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    scratch: Collection[int] = (),
    masks: Mapping[int, str] | None = None,
    finiteness: Mapping[int, int] | None = None,
) -> PieceSafety:
    """The verdict on a piece.

    Args:
        gm: the piece, torch-level; its output is a tuple. inputs: its fake inputs (tensors, SymInts).
        scratch: positions of index inputs whose padding points to memory that nobody reads.
        masks: names of inputs that only mask, by position. finiteness: of inputs whose padding is no real row's.
    """
    if not any(isinstance(x, torch.SymInt) for x in inputs) and not any(
        has_tokens(d) for x in inputs if isinstance(x, torch.Tensor) for d in dims_of(x.shape)
    ):
        return PieceSafety("row-wise")
    if any("functorch" in (getattr(node.target, "__module__", None) or "") for node in gm.graph.nodes):
        # A trace that fails inside a transform would leave the transform's state behind.
        return PieceSafety("unknown", (NodeVerdict("unknown", "piece", "it holds a function transform", ""),))
    try:
        traced = functional_form(gm, inputs, _ROW_FORMS)
    except Exception as error:  # what ops raise is anyone's: the piece is probed, and this is counted
        reason = (
            f"it cannot be traced to aten: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        return PieceSafety("unknown", (NodeVerdict("unknown", "piece", reason, "", failed=True),))
    return _Analysis(traced, scratch, masks, finiteness).run()


class _Analysis:
    def __init__(
        self,
        gm: fx.GraphModule,
        scratch: Collection[int],
        masks: Mapping[int, str] | None = None,
        finiteness: Mapping[int, int] | None = None,
    ) -> None:
        self.gm, self.scratch, self.masks, self.finiteness = gm, scratch, masks or {}, finiteness or {}
        self.zeroed: set[tuple[str, Any]] = set()
        self.results: list[int] = []
        self.values: dict[fx.Node, Any] = {}
        self.verdicts: list[NodeVerdict] = []
        self.row_indices: list[tuple[int, Any]] = []
        self.equals: list[tuple[Any, Any]] = []
        self.counts = Counts()
        self.placeholders: list[fx.Node] = list(gm.graph.find_nodes(op="placeholder"))

    def run(self) -> PieceSafety:
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "get_attr":
                value = getattr(self.gm, str(node.target))
                self.values[node] = Tracked(dims_of(value.shape)) if isinstance(value, torch.Tensor) else value
            elif node.op == "output":
                self._output(node)
            else:
                self._call(node)
        self._check_row_indices()
        kinds: list[Kind] = [v.kind for v in self.verdicts]
        worst: Kind = max(kinds, key=_ORDER.index, default="row-wise")
        nodes = sorted(self.verdicts, key=lambda v: -_ORDER.index(v.kind))
        return PieceSafety(
            worst,
            tuple(nodes),
            tuple(dict.fromkeys(self.row_indices)),
            tuple(dict.fromkeys(self.equals)),
            tuple(self.counts.reaches),
            tuple(sorted(self.zeroed, key=str)),
            tuple(self.results),
        )

    def _placeholder(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        position = self.placeholders.index(node)
        if isinstance(value, torch.Tensor):
            dims = dims_of(value.shape)
            known: frozenset[Known] = frozenset()
            level = self.finiteness.get(position, REPEATED)
            if position in self.masks:
                sizes = [d[0] for d in dims if len(d) == 1 and isinstance(d[0], sympy.Symbol)]
                known = frozenset(Known(s, 0, self.masks[position], s) for s in sizes if sizes.count(s) == 1)
                level = max(level, OTHER)
            tracked = Tracked(dims, position in self.scratch, position, known=known, finiteness=level)
            self.values[node] = _one_tracked(tracked, value)
            self._sizes(node, [tuple(value.shape)])
        else:
            self.values[node] = value

    def _note(self, kind: Kind, node: fx.Node, reason: str, failed: bool = False) -> None:
        self.verdicts.append(NodeVerdict(kind, str(node.target), reason, str(place_of(node)), failed))

    def _sizes(self, node: fx.Node, shapes: Sequence[tuple[Any, ...]]) -> None:
        """At a bucket there must be at least as many entries as at the real size."""
        shrinks = [size for shape in shapes for size in shape if not grows(as_expr(size))]
        if shrinks:
            self._note("mixing", node, f"its size {shrinks[0]} may be smaller where there are more tokens")

    def _call(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.target is operator.getitem:
            source = self.values[node.args[0]]  # type: ignore[index]
            position: Any = node.args[1]
            self.values[node] = source[position] if isinstance(source, (list, tuple)) else value
            self.counts.note_element(node)
            return
        if not _has_tensors(value) and not isinstance(node.target, torch._ops.OpOverload):
            # Arithmetic on sizes.
            self.values[node] = value
            return
        arguments = _named(node, self.values)
        call = Call(node.target, arguments, _shapes(value))
        dynamic = any(has_tokens(d) for t in call.tensors() for d in t.dims) or any(
            has_tokens(d) for shape in call.shapes for d in dims_of(shape)
        )
        rule = rules.rule_for(node.target)
        try:
            self.counts.check(node, call)
            if rule is not None:
                result = rule(call)
                rules.no_size_as_number(call)
            elif not dynamic and not _dynamic_numbers(arguments):
                result = [dims_of(shape) for shape in call.shapes]
            else:
                self._note("unknown", node, "the analysis has no rule for this op")
                result = [dims_of(shape) for shape in call.shapes]
        except Mixing as reason:
            self._note("mixing", node, str(reason))
            result = [dims_of(shape) for shape in call.shapes]
        except Exception as error:  # a rule may be anyone's: the op is probed instead, and this is counted
            self._note("unknown", node, f"its rule failed: {type(error).__name__}: {error}", failed=True)
            result = [dims_of(shape) for shape in call.shapes]
        self.counts.note(node, call)
        if call.kind == "prefix":
            self._note("prefix", node, "rows depend on rows before them, never on padding behind them")
        self._sizes(node, call.shapes)
        self.row_indices += call.row_indices
        self.equals += call.equals
        self.zeroed |= call.zeroed
        self.values[node] = self._padding_of(node, call, _tracked(result, value), known=rule is not None)

    def _padding_of(self, node: fx.Node, call: Call, result: Any, known: bool) -> Any:
        """Enters what is known of the padding of a result."""
        packet = packet_of(node.target) if str(node.target).startswith("aten.") else ""
        starts = call.kind == "prefix" or (packet == "arange" and any(map(has_tokens, dims_of(call.shapes[0]))))
        level = finiteness(packet, call, starts) if known or not call.tensors() else WILD
        if isinstance(result, list):
            return [replace(r, finiteness=level) if isinstance(r, Tracked) else r for r in result]
        if not isinstance(result, Tracked):
            return result
        uniform = None
        if packet in ("full", "scalar_tensor", "zeros", "full_like", "zeros_like"):
            number = call.arguments.get("fill_value", call.arguments.get("s", 0))
            if isinstance(number, (int, float)):
                uniform = torch.tensor(number, device="cpu").to(node.meta["val"].dtype).item()
        elif packet in ("expand", "view", "unsqueeze", "clone", "alias", "detach"):
            uniform = call.tensors()[0].uniform
        return replace(result, known=known_after(packet, node, call, result.dims), finiteness=level, uniform=uniform)

    def _output(self, node: fx.Node) -> None:
        values = [self.values[n] if isinstance(n, fx.Node) else None for n in tree_leaves(node.args)]
        self.results = [v.finiteness if isinstance(v, Tracked) else WILD for v in values]
        for leaf in node.all_input_nodes:
            tracked = self.values[leaf]
            for one in tracked if isinstance(tracked, (list, tuple)) else [tracked]:
                if isinstance(one, Tracked) and not all(is_prefix(d) for d in one.dims):
                    reason = "its real entries do not come first in a result of the piece"
                    self.verdicts.append(NodeVerdict("mixing", str(leaf.target), reason, str(place_of(leaf))))

    def _check_row_indices(self) -> None:
        """An index that picks rows may do nothing else: its negative values are changed before the piece runs."""
        fixed = {position for position, symbol in self.row_indices if symbol is None}
        self.row_indices = [(position, symbol) for position, symbol in self.row_indices if symbol is not None]
        for position, _ in self.row_indices:
            node = self.placeholders[position]
            users = set(_through_copies(node))
            if position in fixed:
                self._note("mixing", node, "row indices pick entries of a dimension of fixed size as well")
            bad = [u for u in users if packet_of(u.target) not in ("index", "index_select", "_unsafe_index")]
            if bad:
                self._note("mixing", bad[0], "it uses row indices, which count from the real size, for something else")


def _through_copies(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    for user in node.users:
        copies = packet_of(user.target) in ("detach", "alias", "_to_copy", "clone")
        found += _through_copies(user) if copies else [user]
    return found


def _has_tensors(value: Any) -> bool:
    return any(isinstance(v, torch.Tensor) for v in (value if isinstance(value, (list, tuple)) else [value]))


def _shapes(value: Any) -> list[tuple[Any, ...]]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [tuple(v.shape) for v in values if isinstance(v, torch.Tensor)]


def _named(node: fx.Node, values: dict[fx.Node, Any]) -> dict[str, Any]:
    def known(n: fx.Node) -> Any:
        return values[n]

    named = arguments_of(node.target, map_arg(node.args, known), map_arg(node.kwargs, known))
    return {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in named.items() if v is not None}


def _dynamic_numbers(arguments: dict[str, Any]) -> bool:
    leaves = [leaf for v in arguments.values() for leaf in (v if isinstance(v, list) else [v])]
    return any(isinstance(leaf, torch.SymInt) and not isinstance(as_expr(leaf), int) for leaf in leaves)


def _tracked(result: Any, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        parts = iter(result if isinstance(result, list) else [result])
        return [_one_tracked(next(parts), v) if isinstance(v, torch.Tensor) else v for v in value]
    if isinstance(value, torch.Tensor):
        return _one_tracked(result[0] if isinstance(result, list) else result, value)
    return value


def _one_tracked(dims: Any, value: torch.Tensor) -> Tracked:
    tracked = dims if isinstance(dims, Tracked) else Tracked(dims)
    return replace(tracked, is_mask=value.dtype is torch.bool)
