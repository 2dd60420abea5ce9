"""Adds nodes to a graph that bring the adapter slots of the step's tokens into the order of a layer's rows."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..rewriting import Rewriter
from .layouts import Order, Rows, fused


class SlotsOfRows:
    """Moves the slots of a step's tokens as the graph moves rows."""

    def __init__(self, rewriter: Rewriter, tokens: fx.Node, nodes: Mapping[int, fx.Node], like: fx.Node) -> None:
        """
        Args:
            tokens: the slots of the step's tokens. nodes: by the identity of their values. like: the layer that asks.
        """
        self.rewriter, self.tokens, self.nodes, self.like = rewriter, tokens, nodes, like
        self._known: dict[Order, fx.Node] = {}
        self._after: fx.Node | None = None

    def of(self, rows: Rows, place: fx.Node | None = None) -> fx.Node:
        """int32, in one dimension: a slot for each entry of ``rows``; computed behind ``place``."""
        slots = self._list(rows.order)
        self._after = place or rows.order.place
        factors = [factor for dim in rows.dims for factor in dim]
        moving = [factor for factor in factors if factor[1] != 0]
        if rows.offset == 0 and fused(moving) == fused([(rows.order.size, 1)]):
            slots = self.call("view", slots, tuple(self._size(size) for size, _ in moving))
        elif not moving:
            slots = self.call("select", slots, 0, self._size(rows.offset))
        else:
            index: Any = self._size(rows.offset)
            for i, (size, stride) in enumerate(moving):
                counting = self.call(torch.arange, self._size(size))
                counting.kwargs = {"device": self.tokens.meta["example_value"].device}
                counting = self.call("view", counting, tuple(-1 if k == i else 1 for k in range(len(moving))))
                index = self.call(operator.add, self.call(operator.mul, counting, self._size(stride)), index)
            slots = self.call(operator.getitem, slots, index)
        for i, (_, stride) in enumerate(factors):
            slots = self.call("unsqueeze", slots, i) if stride == 0 else slots
        return self.call("flatten", self.call("expand", slots, tuple(self._size(size) for size, _ in factors)))

    def _list(self, order: Order) -> fx.Node:
        if not order.parts:
            return self.tokens
        if order not in self._known:
            parts = [self.of(part, order.place) for part in order.parts]
            if order.index is None:
                made = self.call(torch.cat, parts)
            else:
                index = self.nodes[id(order.index)]
                for d in reversed(range(order.index.dim())):
                    index = index if order.along in (None, d) else self.call("select", index, d, 0)
                made = self.call("flatten", self.call(operator.getitem, parts[0], index))
            self._known[order] = made
        return self._known[order]

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A call behind the node that the last list needs, and behind what was added there before."""
        place = self._after.next if self._after is not None else next(iter(self.rewriter.graph.nodes))
        while place.op == "placeholder" or place.meta.get("pcg_lora_slots"):
            place = place.next
        with self.rewriter.graph.inserting_before(place):
            node = self.rewriter.call(self.like, target, args)
        node.meta["pcg_lora_slots"] = True
        return node

    def _size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        place = next(node for node in self.rewriter.graph.nodes if node.op != "placeholder")
        with self.rewriter.graph.inserting_before(place):
            found = self.rewriter.size_node(size)
        while place.prev.op not in ("placeholder", "root") and not place.prev.meta.get("pcg_lora_slots"):
            place = place.prev
            place.meta["pcg_lora_slots"] = True
        return found
