"""Opens LoRA layers: the adapters' work joins its piece, routing comes first, once for all layers.

    pcg::lora(y, x, factors, layout)

becomes

    pcg::prepare_lora(rows, pool, memory)                              once, ahead of everything
    pcg::lora_apply(y, x, factors, permutation, seg_indptr, layout)    routing comes from the step

and layers that read the same x share one ``pcg::lora_apply_many`` (:mod:`.group_lora`).

Note [rows of a layer]
Which token each row of x is comes from the graph (:mod:`.lora_rows`), never from their number. There are three cases:

- Row i is token i: the routing is the step's.
- The rows are tokens in another order (sorted, picked, reversed, cut): the slots of the step's tokens are static memory
  too, the graph brings them into that order as it does the rows (:mod:`.lora_slots`), and ``pcg::lora_route_rows``
  makes the routing of them, inside the piece.
- The rows are unknown: the layer serves batches with at most one adapter, which all rows then have. A batch that mixes
  adapters is refused by ``pcg::prepare_one_lora``, ahead of everything, with the layer's name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from pcg_compile.fx.facts import arguments_of, tensors_in
from pcg_compile.fx.sizes import expr_of, symbols_of
from pcg_compile.lora.packed import decode
from pcg_compile.lora.routing import OneAdapterMemory, Router, RoutingMemory, any_router, router_by_id

from .context import PassContext, StepInput
from .group_lora import LoRACall, group_calls
from .lora_rows.analysis import LayerRows, follow_rows
from .lora_rows.slots import SlotsOfRows
from .rewriting import Rewriter

_TARGETS = (torch.ops.pcg.lora, torch.ops.pcg.lora.default)


@dataclass
class _Pool:
    """What the layers of one pool share in a graph."""

    number: int
    router: Router
    memory: RoutingMemory
    #: Sizes that tokens are routed for, by their expression: the size, its number, and a layer.
    sizes: dict[str, tuple[Any, int, fx.Node]] = field(default_factory=dict)
    #: Layers whose rows are unknown, with the reason.
    unknown: dict[str, str] = field(default_factory=dict)
    #: Whether one of them cannot have adapters at all.
    never: bool = False
    one: OneAdapterMemory | None = None
    like: fx.Node | None = None

    def of_one(self) -> OneAdapterMemory:
        """Memory for the layers whose rows are unknown."""
        if self.one is None:
            self.one = self.router.new_memory_of_one(self.unknown)
        return self.one


def route_lora(gm: fx.GraphModule, context: PassContext) -> fx.GraphModule:
    """Rewrites every ``pcg::lora``; a graph without one stays as it is. See Note [rows of a layer].

    A layer whose tokens lie in two dimensions, the inner one dynamic, stays as it is and runs between pieces: the
    padding of such tokens lies between them, where a routing of the step's tokens does not reach.
    """
    found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _TARGETS]
    regions = any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in gm.graph.nodes)
    if found or ((context.continued or regions) and any_router()):
        layers, context.moved = follow_rows(gm, context.facts, context.notes, context.remarks, context.moved)
        if layers:
            return _Opening(gm, context, found, layers).done()
    return gm


class _Opening:
    def __init__(
        self, gm: fx.GraphModule, context: PassContext, found: Sequence[fx.Node], layers: Mapping[fx.Node, LayerRows]
    ) -> None:
        self.context = context
        self.rewriter = Rewriter(gm, context)
        self.values = {id(t): n for n, fact in reversed(context.facts.items()) for t in tensors_in(fact.value)}
        self.layers = layers
        self.pools: dict[int, _Pool] = {}
        self.slots: dict[tuple[int, str], SlotsOfRows] = {}
        self.routed: dict[Any, tuple[Any, Any]] = {}
        calls = [call for node in found if (call := self._call(node)) is not None]
        for node, layer in layers.items():
            if node.graph is not gm.graph and not layer.in_order:
                # Inside a region of its own, where the step's routing is looked up by its rows' number.
                reason = layer.reason or "its rows are in another order, in a region that is a graph of its own"
                self._refuse(layer.name, reason, node, self._pool(decode(str(node.args[3])).pool))
        groups = group_calls(gm.graph, calls, context.facts, context.splits)
        for group, moved in groups:
            for node in moved:
                group[0].node.prepend(node)
            self._open(group)
        for pool in self.pools.values():
            self._prepare(pool)
        if calls:
            context.notes.append(
                f"pcg::prepare_lora ahead of {len(calls)} LoRA layers in {len(groups)} calls: "
                f"{len(self.routed)} routings a step"
            )

    def done(self) -> fx.GraphModule:
        return self.rewriter.done()

    def _call(self, node: fx.Node) -> LoRACall | None:
        given = arguments_of(node.target, node.args, node.kwargs)
        y, layout, layer = self.context.facts[given["y"]].value, decode(given["layout"]), self.layers[node]
        pool = self._pool(layout.pool)
        routing = self._routing(node, y, layer, pool)
        if routing is None:
            return None
        shared = (given["x"], y.dtype, y.device, layout.adapters, layout.rank, layout.dtype)
        return LoRACall(node, given, (layout.pool, routing), len(layout.slices), shared)

    def _pool(self, number: int) -> _Pool:
        if number not in self.pools:
            router = router_by_id(number)
            self.pools[number] = _Pool(number, router, router.new_memory())
        return self.pools[number]

    def _routing(self, node: fx.Node, y: torch.Tensor, layer: LayerRows, pool: _Pool) -> Any:
        """What names the routing of a layer; None where it has none in the graph."""
        if layer.in_order:
            if any(symbols_of(size) for size in layer.tokens[1:]):
                self.context.splits[node] = "a LoRA layer whose tokens lie in two dynamic dimensions"
                return None
            return ("tokens", *self._tokens(node, layer, pool))
        if layer.rows is not None and not any(symbols_of(size) for size in layer.tokens[1:]):
            number = self._tokens(node, layer, pool)
            self.context.notes.append(f"{layer.name} gets the adapters of its rows, which are not in the tokens' order")
            return ("rows", *number, layer.rows)
        reason = layer.reason or "its tokens lie in two dynamic dimensions, in another order"
        self._refuse(layer.name, reason, node, pool)
        if not self._is_known(math.prod(y.shape[:-1])):
            # So many rows as only the data tell: no memory can be made for them ahead.
            pool.never = True
            self.rewriter.graph.erase_node(node)
            return None
        return ("one", str(expr_of(math.prod(y.shape[:-1]))))

    def _is_known(self, rows: Any) -> bool:
        """Whether a number follows from the sizes of the graph's inputs."""
        expr = expr_of(rows)
        given = [self.context.facts[node].value for node in self.rewriter.placeholders]
        known = {expr_of(value) for value in given if isinstance(value, torch.SymInt)}
        return not isinstance(expr, sympy.Basic) or bool(expr.free_symbols <= known)

    def _tokens(self, node: fx.Node, layer: LayerRows, pool: _Pool) -> tuple[str, int]:
        rows = math.prod(layer.tokens)
        text = str(expr_of(rows))
        if text not in pool.sizes:
            pool.sizes[text] = rows, len(pool.sizes), node
        return text, pool.sizes[text][1]

    def _refuse(self, name: str, reason: str, node: fx.Node, pool: _Pool) -> None:
        pool.unknown.setdefault(name, reason)
        pool.like = pool.like or node
        self.context.notes.append(f"{name} serves batches of one adapter only: {reason}")

    def _open(self, group: Sequence[LoRACall]) -> None:
        first, given = group[0].node, group[0].given
        routing = self._routing_nodes(group[0])
        with self.rewriter.graph.inserting_before(first):
            if len(group) == 1:
                arguments = (given["y"], given["x"], given["factors"], *routing, given["layout"])
                self.rewriter.call(first, torch.ops.pcg.lora_apply.default, arguments)
            else:
                y, factors, layouts = ([one.given[key] for one in group] for key in ("y", "factors", "layout"))
                arguments = (y, given["x"], factors, *routing, ";".join(layouts))
                self.rewriter.call(first, torch.ops.pcg.lora_apply_many.default, arguments)
        for one in group:
            self.rewriter.graph.erase_node(one.node)

    # -- routings -----------------------------------------------------------------------------------------------

    def _routing_nodes(self, call: LoRACall) -> tuple[Any, Any]:
        if call.routing not in self.routed:
            pool = self.pools[call.routing[0]]
            kind, text = call.routing[1][0], str(call.routing[1][1])
            y = self.context.facts[call.given["y"]].value
            if kind == "tokens":
                rows, number, _ = pool.sizes[text]
                made = self._inputs(pool.memory, f"{pool.number}_{number}", rows, y.device)
            elif kind == "rows":
                made = self._of_rows(call, pool, text, y.device)
            else:
                name = f"{pool.number}_one_{len(self.routed)}"
                made = self._inputs(pool.of_one(), name, math.prod(y.shape[:-1]), y.device)
            self.routed[call.routing] = made
        return self.routed[call.routing]

    def _inputs(
        self, memory: RoutingMemory | OneAdapterMemory, name: str, rows: Any, device: torch.device
    ) -> tuple[fx.Node, fx.Node]:
        adapters = memory.max_adapters
        permutation = StepInput(
            f"lora_permutation_{name}",
            lambda size: torch.empty(size, dtype=torch.int32, device=device),
            lambda state, size: memory.routing(size).permutation,
            rows,
            scratch=True,
        )
        seg_indptr = StepInput(
            f"lora_seg_indptr_{name}",
            lambda size: torch.empty(adapters + 1, dtype=torch.int32, device=device),
            lambda state, size: memory.routing(size).seg_indptr,
            rows,
        )
        return self.rewriter.step_input(permutation), self.rewriter.step_input(seg_indptr)

    def _of_rows(self, call: LoRACall, pool: _Pool, text: str, device: torch.device) -> tuple[fx.Node, fx.Node]:
        memory, (size, number, _) = pool.memory, pool.sizes[text]
        key = (call.routing[0], text)
        if key not in self.slots:
            slots = StepInput(
                f"lora_slots_{pool.number}_{number}",
                lambda size: torch.empty(size, dtype=torch.int32, device=device),
                lambda state, size: memory.slots(size),
                size,
            )
            self.slots[key] = SlotsOfRows(self.rewriter, self.rewriter.step_input(slots), self.values, call.node)
        emitted = self.slots[key]
        rows = self.layers[call.node].rows
        assert rows is not None
        routed = emitted.call(torch.ops.pcg.lora_route_rows.default, emitted.of(rows), memory.max_adapters)
        return emitted.call(operator.getitem, routed, 0), emitted.call(operator.getitem, routed, 1)

    def _prepare(self, pool: _Pool) -> None:
        for rows, _, node in pool.sizes.values():
            self.rewriter.ahead_of_all(node, torch.ops.pcg.prepare_lora.default, rows, pool.number, pool.memory.id)
        if pool.unknown and pool.like is not None:
            one = pool.of_one()
            one.layers, one.never = dict(pool.unknown), pool.never
            target = torch.ops.pcg.prepare_one_lora.default
            prepare = self.rewriter.ahead_of_all(pool.like, target, 0, pool.number, one.id)
            # The graph keeps its memory, also where no layer outside of a region reads it.
            prepare.meta["pcg_lora_memory"] = one
