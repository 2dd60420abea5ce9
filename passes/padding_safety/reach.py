"""Whether an index stays within what it looks up at a bucket's size too: on a GPU, one that leaves it is fatal.

Padding repeats row 0, and so is as good an index as row 0. What counts instead (an arange, a cumulative sum) goes on
counting through the padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map_only

from pcg_compile.fx.sizes import SymType, expr_of
from pcg_compile.torch_compat.expressions import expression_nodes

from .dims import Mixing, as_expr, has_tokens, is_prefix, size_of
from .rules import Call, axis_of

__all__ = ["Counts", "Reach"]

#: Entries of an index that is computed to see how far it reaches.
_MOST_ENTRIES = 1 << 24
#: (argument that is looked up, argument with the index, whether the axis is the argument ``dim``).
_LOOKUPS = {
    "aten::embedding": ("weight", "indices", False),
    "aten::index": ("self", "indices", False),
    "aten::_unsafe_index": ("self", "indices", False),
    "aten::index_select": ("self", "index", True),
    "aten::gather": ("self", "index", True),
    "aten::scatter": ("self", "index", True),
    "aten::scatter_add": ("self", "index", True),
    "aten::scatter_reduce": ("self", "index", True),
}
#: Their results are places in what they read, or below a number.
_BOUNDED = frozenset(
    f"aten::{name}" for name in ("argmax", "argmin", "argsort", "remainder", "bucketize", "searchsorted")
)
#: Of their two results the second is places.
_PLACES_SECOND = frozenset(f"aten::{name}" for name in ("topk", "sort", "max", "min", "kthvalue", "mode", "median"))
#: Their results hold the values that they read.
_SAME_VALUES = frozenset(
    f"aten::{name}" for name in ("expand", "view", "unsqueeze", "squeeze", "permute", "transpose", "clone", "alias")
)


@dataclass(frozen=True)
class Reach:
    """An index that follows from sizes alone, as a graph of the sizes ``symbols``; it looks up ``rows`` entries.

    Where these are dynamic, a negative one would count from the bucket.
    """

    graph: fx.GraphModule
    symbols: tuple[sympy.Symbol, ...]
    entries: Any
    rows: Any

    def renamed(self, names: Mapping[sympy.Symbol, sympy.Symbol]) -> Reach:
        """The same of other sizes."""
        entries, rows = (
            size.xreplace(names) if isinstance(size, sympy.Basic) else size for size in (self.entries, self.rows)
        )
        return replace(self, symbols=tuple(names.get(s, s) for s in self.symbols), entries=entries, rows=rows)

    def leaves(self, sizes: Mapping[sympy.Symbol, int]) -> str | None:
        """Why the index cannot be used at these sizes, or None."""
        values = {symbol: sympy.Integer(n) for symbol, n in sizes.items()}
        entries, rows = (
            int(size.xreplace(values)) if isinstance(size, sympy.Basic) else size for size in (self.entries, self.rows)
        )
        if entries > _MOST_ENTRIES:
            return f"an index of {entries} entries is too large to see how far it reaches"
        with torch.inference_mode(False), torch.no_grad():
            index = self.graph(*(sizes[s] for s in self.symbols))
        least = 0 if isinstance(self.rows, sympy.Basic) else -self.rows
        if index.numel() and not (least <= int(index.min()) and int(index.max()) < rows):
            return f"an index that counts through the padding would leave what it looks up, {self.rows} entries"
        return None


class Counts:
    """Which values of a piece count on through its padding, and which follow from sizes alone."""

    def __init__(self) -> None:
        self.counting: set[fx.Node] = set()
        self.sized: set[fx.Node] = set()
        self.reaches: list[Reach] = []

    def note(self, node: fx.Node, call: Call) -> None:
        """Enters what a call gives; called after its rule."""
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (torch.Tensor, list, tuple))]
        if all(n in self.sized for n in tensors):
            self.sized.add(node)
        name = _packet(node)
        starts = call.kind == "prefix" or (name == "aten::arange" and _dynamic(call))
        if name not in _BOUNDED and not _is_mask(node) and (starts or not self.counting.isdisjoint(tensors)):
            self.counting.add(node)

    def note_element(self, node: fx.Node) -> None:
        """Enters one of several results."""
        source = node.args[0]
        if source in self.sized:
            self.sized.add(node)
        places = _packet(source) in _PLACES_SECOND and node.args[1] == 1
        if source in self.counting and not places and not _is_mask(node):
            self.counting.add(node)

    def check(self, node: fx.Node, call: Call) -> None:
        """Looks at a lookup before its rule does.

        Raises:
            Mixing: an index may leave what it looks up, as its values depend on data.
        """
        if _packet(node) not in _LOOKUPS:
            return
        looked_up, where, by_dim = _LOOKUPS[_packet(node)]
        source, given = call.tensor(looked_up), _argument(node, where)
        for place, index in enumerate(given if isinstance(given, (list, tuple)) else [given]):
            axis = axis_of(source.dims, call.arguments["dim"]) if by_dim else place
            if not isinstance(index, fx.Node) or index not in self.counting:
                continue
            if index in self.sized and is_prefix(source.dims[axis]):
                self.reaches.append(_reach(index, size_of(source.dims[axis])))
                call.sized.add(place)
            elif not has_tokens(source.dims[axis]):
                raise Mixing("its index counts on through the padding, and may leave what it looks up")


def _reach(index: fx.Node, rows: Any) -> Reach:
    while _packet(index) in _SAME_VALUES:
        index = index.all_input_nodes[0]
    graph = fx.Graph()
    needed: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for source in node.all_input_nodes:
            if isinstance(source.meta.get("val"), (torch.Tensor, list, tuple)):
                visit(source)
        needed.append(node)

    visit(index)
    leaves = [leaf for node in needed for leaf in tree_leaves((node.args, node.kwargs))]
    numbers = {n: expr_of(n.meta["val"]) for n in leaves if isinstance(n, fx.Node) and n not in seen}
    # torch's tracer leaves some symbolic numbers as they are, no nodes.
    numbers.update({n: n for n in (rows,) if isinstance(n, sympy.Basic)})
    numbers.update({n.node.expr: n.node.expr for n in leaves if isinstance(n, SymType)})
    symbols = sorted({s for e in numbers.values() if isinstance(e, sympy.Basic) for s in e.free_symbols}, key=str)
    sizes = {symbol: graph.placeholder(str(symbol)) for symbol in symbols}
    copies: dict[Any, Any] = {}

    def copied(leaf: Any) -> Any:
        key = leaf.node.expr if isinstance(leaf, SymType) else leaf
        if key not in copies:
            expr = numbers[key]
            copies[key] = expression_nodes(graph, expr, sizes) if isinstance(expr, sympy.Basic) else expr
        return copies[key]

    for node in needed:
        args, kwargs = tree_map_only((fx.Node, *SymType), copied, (node.args, node.kwargs))
        copies[node] = graph.create_node(node.op, node.target, tuple(args), kwargs)
    graph.output(copies[index])
    entries: Any = 1
    for size in index.meta["val"].shape:
        entries = entries * as_expr(size)
    return Reach(fx.GraphModule({}, graph), tuple(symbols), entries, rows)


def _packet(node: Any) -> str:
    target = getattr(node, "target", None)
    return target.name().partition(".")[0] if isinstance(target, torch._ops.OpOverload) else ""


def _argument(node: fx.Node, name: str) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return node.args[names.index(name)]


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _dynamic(call: Call) -> bool:
    return any(isinstance(as_expr(size), sympy.Basic) for shape in call.shapes for size in shape)
