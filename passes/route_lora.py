"""Opens LoRA layers: the adapters' work joins its piece, routing comes first, once for all layers.

    pcg::lora(y, x, factors, layout)

becomes

    pcg::prepare_lora(rows, pool, memory)                              once, ahead of everything
    pcg::lora_apply(y, x, factors, permutation, seg_indptr, layout)    routing comes from the step

and layers that read the same x share one ``pcg::lora_apply_many`` (:mod:`.group_lora`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from pcg_compile.graph.scalars import expr_of, symbols_of
from pcg_compile.lora.packed import decode
from pcg_compile.lora.routing import RoutingMemory, router_by_id

from .context import PassContext, StepInput
from .group_lora import LoRACall, group_calls
from .rewriting import Rewriter

__all__ = ["route_lora"]

_TARGETS = (torch.ops.pcg.lora, torch.ops.pcg.lora.default)
_NAMES = ("y", "x", "factors", "layout")


def route_lora(gm: fx.GraphModule, context: PassContext) -> fx.GraphModule:
    """Rewrites every ``pcg::lora``; a graph without one stays as it is.

    A layer whose tokens lie in two dimensions, the inner one dynamic, stays as it is and runs between pieces: the
    padding of such tokens lies between them, where a routing of the step's tokens does not reach.
    """
    found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _TARGETS]
    rewriter = Rewriter(gm, context)
    opened: dict[tuple[int, str], tuple[Any, fx.Node, str]] = {}
    memories: dict[int, RoutingMemory] = {}
    calls = []
    for node in found:
        given = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
        y, layout = context.facts[given["y"]].value, decode(given["layout"])
        rows = _rows(y)
        if rows is None:
            context.splits[node] = "a LoRA layer whose tokens lie in two dynamic dimensions"
            continue
        routing = (layout.pool, str(expr_of(rows)))
        if layout.pool not in memories:
            memories[layout.pool] = router_by_id(layout.pool).new_memory()
        opened.setdefault(routing, (rows, node, str(len(opened))))
        shared = (given["x"], y.dtype, y.device, layout.adapters, layout.rank, layout.dtype)
        calls.append(LoRACall(node, given, routing, len(layout.slices), shared))
    groups = group_calls(gm.graph, calls, context.facts, context.splits)
    for group, moved in groups:
        for node in moved:
            group[0].node.prepend(node)
        rows, _, name = opened[group[0].routing]
        _open(rewriter, group, rows, name, memories[group[0].routing[0]])
    for (pool, _), (rows, node, _) in opened.items():
        rewriter.ahead_of_all(node, torch.ops.pcg.prepare_lora.default, rows, pool, memories[pool].id)
    if opened:
        context.notes.append(
            f"pcg::prepare_lora ahead of {len(calls)} LoRA layers in {len(groups)} calls: {len(opened)} routings a step"
        )
    return rewriter.done() if found else gm


def _rows(y: torch.Tensor) -> Any:
    """The number of tokens, where padding can only lie behind them; else None."""
    leading = [size for size in y.shape[:-1] if expr_of(size) != 1]
    if any(symbols_of(size) for size in leading[1:]):
        return None
    rows: Any = 1
    for size in leading:
        rows = rows * size
    return rows


def _open(rewriter: Rewriter, group: Sequence[LoRACall], rows: Any, name: str, memory: RoutingMemory) -> None:
    first, given = group[0].node, group[0].given
    device = rewriter.facts[given["y"]].value.device
    adapters = memory.max_adapters

    def part(which: int) -> Callable[[Any, int], torch.Tensor]:
        return lambda state, size: memory.routing(size)[which]

    permutation = rewriter.step_input(
        StepInput(
            f"lora_permutation_{name}",
            lambda size: torch.empty(size, dtype=torch.int32, device=device),
            part(0),
            rows,
            scratch=True,
        )
    )
    seg_indptr = rewriter.step_input(
        StepInput(
            f"lora_seg_indptr_{name}",
            lambda size: torch.empty(adapters + 1, dtype=torch.int32, device=device),
            part(1),
            rows,
        )
    )
    routing = (permutation, seg_indptr)
    with rewriter.graph.inserting_before(first):
        if len(group) == 1:
            arguments = (given["y"], given["x"], given["factors"], *routing, given["layout"])
            rewriter.call(first, torch.ops.pcg.lora_apply.default, arguments)
        else:
            y, factors, layouts = ([one.given[key] for one in group] for key in ("y", "factors", "layout"))
            arguments = (y, given["x"], factors, *routing, ";".join(layouts))
            rewriter.call(first, torch.ops.pcg.lora_apply_many.default, arguments)
    for one in group:
        rewriter.graph.erase_node(one.node)
