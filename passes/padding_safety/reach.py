"""Whether an index that counts through the padding stays within what it looks up: on a GPU, one that leaves it kills.

Padding repeats row 0, so an index made of inputs is as good in the padding as in row 0. An arange and a cumulative sum
go on counting instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from pcg_compile.fx.facts import arguments_of
from pcg_compile.fx.sizes import evaluate, size_at, symbols_of

from .dims import Mixing, as_expr, has_tokens, is_prefix, size_of
from .rules import Call, axis_of, packet_of

#: Entries of an index that is computed to see how far it reaches.
_MOST_ENTRIES = 1 << 24
#: Argument that is looked up, argument with the index.
_LOOKUPS = {
    "embedding": ("weight", "indices"), "index": ("self", "indices"), "_unsafe_index": ("self", "indices"),
    **dict.fromkeys(("index_select", "gather", "scatter", "scatter_add", "scatter_reduce"), ("self", "index")),
}  # fmt: skip
#: Their results are places in what they read, or below a number.
_BOUNDED = ("argmax", "argmin", "argsort", "remainder", "bucketize", "searchsorted")
#: The second of their results is places.
_PLACES_SECOND = ("topk", "sort", "max", "min", "kthvalue", "mode", "median")
#: Their results hold the values that they read.
_SAME_VALUES = ("expand", "view", "unsqueeze", "squeeze", "permute", "transpose", "clone", "alias")


@dataclass(frozen=True)
class Reach:
    """An index that follows from sizes alone and looks up ``rows`` entries.

    Where these are dynamic, a negative one would count from the bucket.

    Attributes:
        index: the node that gives it, in the piece's functional form.
        names: the name of each of its sizes in the graph, by the name in that form.
    """

    index: fx.Node
    rows: Any
    names: Mapping[sympy.Symbol, sympy.Symbol] = field(hash=False)

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The sizes that it follows from."""
        return tuple(self.names.values())

    def renamed(self, names: Mapping[sympy.Symbol, sympy.Symbol]) -> Reach:
        """The same of other sizes."""
        return replace(self, names={own: names.get(name, name) for own, name in self.names.items()})

    def leaves(self, sizes: Mapping[sympy.Symbol, int]) -> str | None:
        """Why the index cannot be used at these sizes, or None."""
        own = {symbol: sizes[name] for symbol, name in self.names.items()}
        entries = evaluate(self.index.meta["val"].numel(), own)
        if entries > _MOST_ENTRIES:
            return f"an index of {entries} entries is too large to see how far it reaches"
        with torch.inference_mode(False), torch.no_grad():
            index = _value(self.index, own, {})
        rows, dynamic = size_at(self.rows, own), isinstance(self.rows, sympy.Basic)
        if index.numel() and not ((0 if dynamic else -rows) <= int(index.min()) and int(index.max()) < rows):
            shown = self.rows.xreplace(dict(self.names)) if dynamic else rows
            return f"an index that counts through the padding would leave what it looks up, {shown} entries"
        return None


def _value(node: fx.Node, sizes: Mapping[sympy.Symbol, int], known: dict[fx.Node, Any]) -> Any:
    if node not in known:
        if _holds_tensors(node):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: _value(n, sizes, known))
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            known[node] = evaluate(node.meta["val"], sizes)
    return known[node]


class Counts:
    """Which values of a piece count on through its padding, and which follow from sizes alone."""

    def __init__(self) -> None:
        self.counting: set[fx.Node] = set()
        self.sized: set[fx.Node] = set()
        self.reaches: list[Reach] = []

    def note(self, node: fx.Node, call: Call) -> None:
        """Enters what a call gives; called after its rule."""
        tensors = list(filter(_holds_tensors, node.all_input_nodes))
        if self.sized.issuperset(tensors):
            self.sized.add(node)
        name = packet_of(node.target)
        dynamic = any(isinstance(as_expr(size), sympy.Basic) for shape in call.shapes for size in shape)
        starts = call.kind == "prefix" or (name == "arange" and dynamic)
        if name not in _BOUNDED and not _is_mask(node) and (starts or not self.counting.isdisjoint(tensors)):
            self.counting.add(node)

    def note_element(self, node: fx.Node) -> None:
        """Enters one of several results."""
        source, position = node.args
        if source in self.sized:
            self.sized.add(node)
        places = packet_of(source.target) in _PLACES_SECOND and position == 1  # type: ignore[union-attr]
        if source in self.counting and not places and not _is_mask(node):
            self.counting.add(node)

    def check(self, node: fx.Node, call: Call) -> None:
        """Looks at a lookup before its rule does.

        Raises:
            Mixing: an index may leave what it looks up, as its values depend on data.
        """
        if packet_of(node.target) not in _LOOKUPS:
            return
        looked_up, name = _LOOKUPS[packet_of(node.target)]
        source = call.tensor(looked_up)
        given = arguments_of(node.target, node.args, node.kwargs)[name]
        for place, index in enumerate(given if isinstance(given, (list, tuple)) else [given]):
            axis = axis_of(source.dims, call.arguments["dim"]) if name == "index" else place
            if not isinstance(index, fx.Node) or index not in self.counting:
                continue
            if index in self.sized and is_prefix(source.dims[axis]):
                self.reaches.append(_reach(index, size_of(source.dims[axis])))
                call.sized.add(place)
            elif not has_tokens(source.dims[axis]):
                raise Mixing("its index counts on through the padding, and may leave what it looks up")


def _reach(index: fx.Node, rows: Any) -> Reach:
    while packet_of(index.target) in _SAME_VALUES:
        index = index.all_input_nodes[0]
    symbols, waiting, seen = symbols_of([rows]), [index], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            symbols |= symbols_of(node.meta["val"])
            waiting += node.all_input_nodes
    return Reach(index, rows, {symbol: symbol for symbol in sorted(symbols, key=str)})


def _holds_tensors(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool
