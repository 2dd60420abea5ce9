"""Makes the plan of a graph from its segments: inputs, items, what aliases what, and who shares static memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from ..options import Options
from ..split_ops import SplitOp
from ..torch_compat.dynamo_graphs import is_static_input
from ..torch_compat.expressions import number_of_symbol
from .contexts import Autocast, autocast_regions
from .facts import NodeFacts, alias_of, storage_of
from .places import module_of, place_of
from .plan import NOT_YET, InputSpec, Item, PieceItem, Plan, SplitOpItem
from .sizes import SymType, expr_of, leaves_of, sizes_of, symbols_of
from .splitting import Segment, fills
from .storage_ops import reason_to_run_eagerly
from .strides import Layouts
from .submodules import build_piece

__all__ = ["make_plan"]

#: A user's tensor without dynamic sizes is bound by its address, not copied in, from this size on.
_BIND_BYTES = 64 << 20


def make_plan(
    gm: fx.GraphModule,
    facts: Mapping[fx.Node, NodeFacts],
    segments: Sequence[Segment],
    options: Options,
    symbol_values: Mapping[sympy.Symbol, Any],
    device: torch.device,
    counted: Collection[fx.Node] = (),
) -> Plan:
    """A plan from segments. Pieces are built, not compiled.

    Args:
        counted: nodes that no captured graph can hold, so each step counts them as fallbacks.
    """
    regions = autocast_regions(gm)
    backed = set(symbol_values)
    symbol_values = {**symbol_values, **_unbacked(facts)}
    output = next(iter(gm.graph.find_nodes(op="output")))
    readers = {node for segment in segments for node in segment.nodes} | {output}
    items: list[Item] = []
    for index, segment in enumerate(segments):
        if segment.kind == "call" and not (segment.cut and segment.cut.op.compiled and options.compiler != "eager"):
            items.append(_split_op_item(segment, index, facts, options, regions, counted))
            continue
        piece = build_piece(gm, facts, segment.nodes, regions, symbol_values, readers)
        first = segment.nodes[0]
        item = PieceItem(piece, index, NOT_YET, str(place_of(first)), module_of(first))
        item.trivial = segment.kind == "trivial"
        item.idle = item.trivial and not any(fills(facts[node]) for node in segment.nodes)
        if segment.inside_transform:
            item.refusal = "it holds a split op inside a function transform, where no cut is possible"
        if any(s not in backed for s in piece.symbols):
            item.refusal = "its sizes depend on data"
        if segment.cut is not None:
            item.split_reason = item.refusal = segment.cut.reason
        items.append(item)
    _name_pieces(items)
    inputs = _inputs(gm, facts, options, segments)
    symbols = tuple(s for s in symbol_values if s in backed)
    dims = sizes_of([s.value for s in inputs])
    users = [s.value for s in inputs if s.kind == "user"]
    written = frozenset().union(*(f.writes for f in facts.values()))
    plan = Plan(
        gm,
        facts,
        inputs,
        items,
        output.args[0],
        symbols,
        tuple(_size_source(symbol, inputs) for symbol in symbols),
        device,
        dims,
        Layouts.of(users, dims),
        mutated=frozenset(
            s.node for s in inputs if s.kind in ("user", "bound", "static") and storage_of(s.value) in written
        ),
    )
    _find_shared_writes(plan)
    plan.eager = reason_to_run_eagerly(gm, facts, segments)
    plan.refusal = plan.eager or _refusal(plan)
    _assign_slots(plan)
    return plan


def _name_pieces(items: Sequence[Item]) -> None:
    """Pieces are counted from 0; split ops have their op's name."""
    pieces = 0
    for item in items:
        if isinstance(item, PieceItem):
            item.name = "allocation or view" if item.trivial else "split op, compiled"
            if item.is_piece:
                item.name = f"piece {pieces}"
                pieces += 1


def _unbacked(facts: Mapping[fx.Node, NodeFacts]) -> dict[sympy.Symbol, Any]:
    """Symbols, those too that stand for what only the data tell: the values that first show them."""
    found: dict[sympy.Symbol, Any] = {}
    shown: dict[sympy.Symbol, Any] = {}
    for fact in facts.values():
        for leaf in leaves_of(fact.value):
            for number in (*leaf.shape,) if isinstance(leaf, torch.Tensor) else (leaf,):
                if isinstance(number, SymType):
                    expr = expr_of(number)
                    if isinstance(expr, sympy.Symbol):
                        found.setdefault(expr, number)
                    shown.update(dict.fromkeys(symbols_of(number) - shown.keys(), number))
    # The bool of a tensor is Eq(u0, 1), and nothing has u0 itself.
    return {**{s: number_of_symbol(s, like) for s, like in shown.items() if s not in found}, **found}


def _split_op_item(
    segment: Segment,
    index: int,
    facts: Mapping[fx.Node, NodeFacts],
    options: Options,
    regions: Mapping[fx.Node, Autocast],
    counted: Collection[fx.Node],
) -> SplitOpItem:
    assert segment.cut is not None
    node = segment.nodes[0]
    outputs = [n for n in segment.nodes if isinstance(facts[n].value, (torch.Tensor, *SymType))]
    reads = [n for n in node.all_input_nodes if isinstance(facts[n].value, torch.Tensor)]
    writes = [n for n in reads if storage_of(facts[n].value) in facts[node].writes]
    return SplitOpItem(
        node,
        index,
        segment.cut.op,
        segment.cut.reason,
        str(place_of(node)),
        _padding_mode(node, segment.cut.op, options),
        tuple(outputs),
        tuple(reads),
        tuple(writes),
        regions.get(node, ()),
        module_of(node),
        counted=node in counted,
        request=node.meta.get("pcg_request"),
    )


def _padding_mode(node: fx.Node, op: SplitOp, options: Options) -> Literal["request", "slice"]:
    if op.own_metadata:
        return "slice" if options.padding == "slice" else "request"
    return "request" if "pcg_request" in node.meta else "slice"


def _inputs(
    gm: fx.GraphModule, facts: Mapping[fx.Node, NodeFacts], options: Options, segments: Sequence[Segment]
) -> tuple[InputSpec, ...]:
    written = frozenset().union(*(f.writes for f in facts.values()))
    specs: list[InputSpec] = []
    position = 0
    for node in gm.graph.find_nodes(op="placeholder"):
        value = facts[node].value
        step = node.meta.get("pcg_step_input")
        if step is not None:
            specs.append(InputSpec(node, "step", value, -1, step))
            continue
        kind: Any
        if isinstance(value, torch.Tensor):
            kind = "user"
            if is_static_input(node):
                kind = "static"
            elif not symbols_of(value) and (storage_of(value) in written or _bytes(value) >= _BIND_BYTES):
                kind = "bound"
        else:
            kind = "size" if isinstance(expr_of(value), sympy.Symbol) else "number"
        specs.append(InputSpec(node, kind, value, position, pad_value=node.meta.get("pcg_pad_value")))
        position += 1
    return tuple(specs)


def _bytes(value: torch.Tensor) -> int:
    return int(value.numel()) * value.element_size()


def _size_source(symbol: sympy.Symbol, inputs: Sequence[InputSpec]) -> tuple[int, int]:
    for spec in inputs:
        if spec.kind == "size" and expr_of(spec.value) == symbol:
            return spec.position, -1
    for spec in inputs:
        if isinstance(spec.value, torch.Tensor) and spec.position >= 0:
            for dim, size in enumerate(spec.value.shape):
                if expr_of(size) == symbol:
                    return spec.position, dim
    raise LookupError(f"no input tells the size {symbol}")


def _find_shared_writes(plan: Plan) -> None:
    written: set[int] = set()
    for item in reversed(plan.items):
        if isinstance(item, PieceItem):
            made = [storage_of(plan.value(node)) for node in item.outputs]
            read = {storage_of(plan.value(node)) for node in item.reads}
            shared = {s for s in made if s in read or made.count(s) > 1}
            item.shares_written = bool(shared & written)
            written |= {storage_of(plan.value(item.piece.inputs[i])) for i in item.piece.writes}
        else:
            written |= {storage_of(plan.value(node)) for node in item.writes}


def _refusal(plan: Plan) -> str | None:
    """Why captured graphs, or padded copies, could give other values than eager for this graph."""
    for spec in plan.inputs:
        if isinstance(spec.value, torch.Tensor) and not _is_plain(spec.value):
            return f"input {spec.node.name} is not a plain strided tensor"
    earlier: set[int] = {storage_of(s.value) for s in plan.inputs if isinstance(s.value, torch.Tensor)}
    order = list(plan.gm.graph.nodes)
    rank = {node: i for i, node in enumerate(order)}
    for item in plan.items:
        for node in item.outputs:
            value = plan.value(node)
            if not isinstance(value, torch.Tensor):
                continue
            if not _is_plain(value):
                return f"a tensor that is not plain and strided crosses a boundary at {item.where}"
            storage = storage_of(value)
            if isinstance(item, SplitOpItem) and storage in earlier:
                for later in order[rank[node] + 1 :]:
                    if storage in plan.facts[later].writes if later in plan.facts else False:
                        return f"a split op at {item.where} returns a view of memory that is written later"
        earlier |= alias_of([plan.value(node) for node in item.outputs])
    return None


def _is_plain(value: Any) -> bool:
    return (
        value.layout == torch.strided
        and not value.is_conj()
        and not value.is_neg()
        and not value.is_quantized
        and all(isinstance(s, torch.SymInt) or s >= 0 for s in value.stride())
    )


def _assign_slots(plan: Plan) -> None:
    """Static memory for results: values that are never alive together share a slot."""
    last: dict[int, int] = {}
    for item in plan.items:
        for node in (*item.reads, *item.outputs):
            if isinstance(plan.value(node), torch.Tensor):
                last[storage_of(plan.value(node))] = item.index
                plan.last_read[node] = item.index
    end = len(plan.items)
    for node in _nodes_of(plan.outputs):
        plan.last_read.pop(node, None)
        if isinstance(plan.value(node), torch.Tensor):
            last[storage_of(plan.value(node))] = end
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    count = 0
    for item in plan.items:
        for until, slot in list(busy):
            if until < item.index:
                busy.remove((until, slot))
                free.append(slot)
        for node in item.outputs:
            if not isinstance(plan.value(node), torch.Tensor):
                continue
            until = last[storage_of(plan.value(node))]
            slot = free.pop() if free else count
            count = max(count, slot + 1)
            busy.append((until, slot))
            plan.slots[node] = slot
            plan.last_use[node] = until


def _nodes_of(value: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    map_arg(value, nodes.append)
    return nodes
