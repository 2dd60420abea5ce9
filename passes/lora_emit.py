"""Computes, beside a graph's own values, the adapter slot of each row: what happened to rows happens to their slots."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .lora_orders import Axis, Dim, Order, Rows
from .rewriting import Rewriter

__all__ = ["SlotsOfRows"]


class SlotsOfRows:
    """Adds nodes that bring the slots of a step's tokens into the order of some rows."""

    def __init__(self, rewriter: Rewriter, tokens: fx.Node, nodes: Mapping[int, fx.Node], like: fx.Node) -> None:
        """
        Args:
            tokens: the slots of the step's tokens. nodes: by the identity of their values.
            like: the layer that asks.
        """
        self.rewriter, self.tokens, self.nodes, self.like = rewriter, tokens, nodes, like
        self._known: dict[Order, fx.Node] = {}
        self._after: fx.Node | None = None

    def of(self, rows: Rows) -> fx.Node:
        """int32, in one dimension: a slot for each entry of all dimensions of ``rows``."""
        slots = self._order(rows.order)
        self._place(rows.order)
        leading: Dim = tuple(factor for dim in rows.dims for factor in dim if factor[0] != 1)
        found = self._arranged(slots, rows.order.axes, [leading])
        return found if leading else self.call("reshape", found, 1)

    def _place(self, order: Order) -> None:
        self._after = order.place if order.kind != "tokens" else None

    def _order(self, order: Order) -> fx.Node:
        known = self._known.get(order)
        if known is None:
            make = getattr(self, f"_{order.kind}")
            # What it is made of stands first, at places of its own.
            parents = [] if order.kind == "tokens" else (
                [one for one, _, _ in order.parts[0]] if order.kind == "cat" else [order.parts[0]]
            )  # fmt: skip
            made = [self._order(one) for one in parents]
            self._place(order)
            known = self._known[order] = make(order, *made)
        return known

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A call behind what the last order was made of."""
        graph = self.rewriter.graph
        after = self._after
        place = after.next if after is not None else next(iter(graph.nodes))
        while place.op == "placeholder":
            place = place.next
        # What was added there before comes first.
        while place.meta.get("pcg_lora_slots"):
            place = place.next
        with graph.inserting_before(place):
            node = self.rewriter.call(self.like, target, args)
        node.meta["pcg_lora_slots"] = True
        return node

    def _size(self, size: Any) -> Any:
        if size is None:
            return None
        graph = self.rewriter.graph
        place = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(place):
            return self.rewriter.size_node(size)

    def _arranged(self, slots: fx.Node, axes: Sequence[Axis], dims: Sequence[Dim]) -> fx.Node:
        factors = [factor for dim in dims for factor in dim]
        places = [axes.index(axis) for _, axis in factors if axis is not None]
        if places != sorted(places):
            slots = self.call("permute", slots, *places)
        new = [i for i, (_, axis) in enumerate(factors) if axis is None]
        for i in new:
            slots = self.call("unsqueeze", slots, i)
        if new:
            slots = self.call("expand", slots, *(-1 if axis is not None else self._size(s) for s, axis in factors))
        for i, dim in reversed(list(enumerate(dims))):
            if len(dim) > 1:
                before = sum(len(one) for one in dims[:i])
                slots = self.call("flatten", slots, before, before + len(dim) - 1)
        return slots

    def _opened(self, order: Order, slots: fx.Node, dims: Sequence[Dim]) -> fx.Node:
        """Slots with the axes that stay first, and dimensions that something is done to behind them."""
        used = {axis for dim in dims for _, axis in dim}
        kept = [((axis.size, axis),) for axis in order.axes if axis not in used]
        return self._arranged(slots, order.axes, [*kept, *dims])

    def _tokens(self, order: Order) -> fx.Node:
        if not order.axes:
            return self.call("select", self.tokens, 0, 0)
        if len(order.axes) == 1:
            return self.tokens
        return self.call("view", self.tokens, *(self._size(axis.size) for axis in order.axes))

    def _take(self, order: Order, slots: fx.Node) -> fx.Node:
        parent, dims, _, sizes = order.parts
        indices = [self.nodes[id(tensor)] for tensor in order.tensors]
        slots = self.call(operator.getitem, self._opened(parent, slots, dims), (Ellipsis, *indices))
        for i in reversed(range(len(sizes))):
            if sizes[i] == 1:
                slots = self.call("select", slots, i - len(sizes) + sum(s == 1 for s in sizes[i + 1 :]), 0)
        return slots

    def _gather(self, order: Order, slots: fx.Node) -> fx.Node:
        parent, dim, size, where = order.parts
        (tensor,) = order.tensors
        index = self.nodes[id(tensor)]
        for d in reversed(range(tensor.dim())):
            if d not in where:
                index = self.call("select", index, d, 0)
        rank = {d: i for i, d in enumerate(sorted(where))}
        places = [rank[d] for d in where]
        if places != sorted(places):
            index = self.call("permute", index, *places)
        slots = self.call(torch.gather, self._opened(parent, slots, [dim]), -1, index)
        return self.call("select", slots, -1, 0) if size == 1 else slots

    def _piece(self, order: Order, slots: fx.Node) -> fx.Node:
        parent, dim, start, stop, step = order.parts
        if isinstance(stop, int) and stop >= 2**62:
            stop = None
        part = slice(self._size(start), self._size(stop), step)
        return self.call(operator.getitem, self._opened(parent, slots, [dim]), (Ellipsis, part))

    def _fix(self, order: Order, slots: fx.Node) -> fx.Node:
        parent, dim, index = order.parts
        return self.call("select", self._opened(parent, slots, [dim]), -1, self._size(index))

    def _flip(self, order: Order, slots: fx.Node) -> fx.Node:
        return self.call("flip", self._opened(order.parts[0], slots, [order.parts[1]]), -1)

    def _roll(self, order: Order, slots: fx.Node) -> fx.Node:
        return self.call("roll", self._opened(order.parts[0], slots, [order.parts[1]]), self._size(order.parts[2]), -1)

    def _cat(self, order: Order, *slots: fx.Node) -> fx.Node:
        parts = [
            self._opened(one, own, [dim]) for (one, dim, _), own in zip(order.parts[0], slots, strict=True)
        ]  # fmt: skip
        return self.call(torch.cat, parts, -1)

    def _split(self, order: Order, slots: fx.Node) -> fx.Node:
        parent, axis, outer, inner = order.parts
        opened = self._opened(parent, slots, [((axis.size, axis),)])
        return self.call("unflatten", opened, -1, (self._size(outer), self._size(inner)))
