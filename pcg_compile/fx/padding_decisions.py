"""Padding is decided here: which pieces may run padded to a bucket, which are probed first, and which never are.

:func:`decide_padding` writes each decision to the item of the plan that it is about (``PieceItem.refusal``,
``needs_probe``) or to the plan (``row_indices``, ``zeroed``, ``refusal``), and counts what was refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from ..counters import Counters
from ..errors import Hazard, UnsafePadding
from ..passes.padding_safety.analysis import PieceSafety, analyze_piece
from ..passes.padding_safety.masks import OTHER, WILD, mask_inputs
from .fake_storages import told_apart
from .places import name_of_input, place_parts
from .plan import PieceItem, Plan, SplitOpItem
from .sizes import expr_of

__all__ = ["decide_padding", "padding_hazards"]


def decide_padding(plan: Plan, counters: Counters) -> None:
    """Checks each distinct piece, and refuses what may depend on padding or on a number that changes.

    Raises:
        UnsafePadding: under ``strict``, a piece was refused.
    """
    pieces = [item for item in plan.items if isinstance(item, PieceItem) and item.split_reason is None]
    _judge(plan, pieces)
    for item in pieces:
        item.refusal = item.refusal or _refusal(item, plan, counters.strict)
        if item.refusal is not None and item.is_piece and counters.strict:
            counters.fall_back(item.refusal, item.where, UnsafePadding)
    for safety in {id(item.safety): item.safety for item in pieces}.values():
        for verdict in (node for node in safety.nodes if node.failed):
            counters.fall_back(f"{verdict.op}: {verdict.reason}; the piece is probed", verdict.where)
    _decide_row_indices(plan, pieces)
    for name, symbol in {zero for item in pieces if item.refusal is None for zero in item.safety.zeroed}:
        plan.zeroed.setdefault(name, set()).add(symbol)
    for item in pieces:
        if item.shares_written and (item.refusal or item.needs_probe) and plan.refusal is None:
            plan.refusal = (
                "a piece that cannot be captured gives a view of memory that is written later "
                f"({item.refusal or item.safety.reason}; at {item.where})"
            )


def _judge(plan: Plan, pieces: list[PieceItem]) -> None:
    """Analyzes each piece, equal ones once; what is known of a value's padding goes on to its readers."""
    scratch = {s.node for s in plan.inputs if (s.step is not None and s.step.scratch) or s.pad_value is not None}
    masks = mask_inputs(plan)
    finiteness = {spec.node: OTHER for spec in plan.inputs if spec.step is not None}
    for item in plan.items:
        if isinstance(item, SplitOpItem) and item.mode == "request":
            finiteness |= dict.fromkeys((*item.outputs, *item.writes), OTHER)
    known: dict[Any, tuple[tuple[sympy.Symbol, ...], PieceSafety]] = {}
    for item in pieces:
        piece = item.piece
        numbered = list(enumerate(piece.inputs, len(piece.symbols)))
        marked = tuple(i for i, node in numbered if node in scratch)
        masking = {i: masks[node] for i, node in numbered if node in masks}
        levels = {i: finiteness[node] for i, node in numbered if node in finiteness}
        key = (piece.structure, marked, tuple(masking.items()), tuple(levels.items()))
        if key not in known:
            example = told_apart(piece.example)
            found = analyze_piece(piece.gm, example, scratch=marked, masks=masking, finiteness=levels)
            known[key] = (piece.symbols, found)
        symbols, found = known[key]
        item.safety = found.renamed(dict(zip(symbols, piece.symbols, strict=True)))
        finiteness |= {node: found.finiteness_of(i) for i, node in enumerate(piece.outputs)}
        finiteness |= {piece.inputs[i]: WILD for i in piece.writes}


def _refusal(item: PieceItem, plan: Plan, strict: bool) -> str | None:
    """Why a piece must not be captured, or None; notes where only a probe can tell."""
    piece = item.piece
    numbers = (s for s in piece.symbols if s not in plan.dims and (s in piece.numbers or s not in plan.layouts.symbols))
    number = next(numbers, None)
    if number is not None:
        return (
            f"a piece depends on {_name_of_number(number, plan)}, a number that changes and is no tensor's size; "
            "pass it as a tensor, torch.tensor(value, device=x.device), or keep it constant"
        )
    foreign = next((node for node in item.reads if plan.value(node).device != plan.device), None)
    if foreign is not None:
        name, there = name_of_input(foreign), plan.value(foreign).device
        cure = f'move it: {name}.to("{plan.device}")' if there.type != "meta" else f"{name} has no data: load it first"
        return f"a piece reads {name}, which is on {there}, while the graph is captured on {plan.device}; {cure}"
    if piece.symbols and item.safety.kind in ("mixing", "unknown"):
        item.where = item.safety.where or item.where
        if item.safety.kind == "mixing":
            return f"mixing: {item.safety.reason}"
        if strict:
            return f"opaque: {item.safety.reason}"
        item.needs_probe = True
    return None


def _name_of_number(symbol: sympy.Symbol, plan: Plan) -> str:
    specs = (spec for spec in plan.inputs if not isinstance(spec.value, torch.Tensor))
    return next((name_of_input(spec.node) for spec in specs if expr_of(spec.value) == symbol), str(symbol))


def _decide_row_indices(plan: Plan, pieces: list[PieceItem]) -> None:
    """Row indices count from the real size; pcg makes negative ones positive where it copies them in."""
    rows: dict[fx.Node, set[sympy.Symbol]] = {}
    for item in pieces:
        for node, symbol in _row_indices(item):
            rows.setdefault(node, set()).add(symbol)
    for node, (symbol, *others) in rows.items():
        several = "row indices pick rows of tensors of several sizes"
        reason = several if others else _why_not_row_index(node, symbol, plan)
        if reason is None:
            plan.row_indices[node] = symbol
            continue
        for reader in plan.items:
            if isinstance(reader, PieceItem) and node in reader.reads and reader.refusal is None:
                reader.refusal = f"mixing: {reason}"


def _row_indices(item: PieceItem) -> list[tuple[fx.Node, sympy.Symbol]]:
    found = item.safety.row_indices if item.safety is not None else ()
    return [(item.piece.inputs[position - len(item.piece.symbols)], symbol) for position, symbol in found]


def _why_not_row_index(node: fx.Node, symbol: sympy.Symbol, plan: Plan) -> str | None:
    if not any(spec.node is node and spec.kind == "user" for spec in plan.inputs):
        return "row indices that are no argument of the call may count from the end"
    readers = (item for item in plan.items if node in item.reads)
    if all(isinstance(item, PieceItem) and (node, symbol) in _row_indices(item) for item in readers):
        return None
    return "row indices are used for something else as well"


def padding_hazards(plan: Plan) -> Iterator[Hazard]:
    """What ``pcg.check`` says of pieces whose real rows depend on others, or on what nobody knows."""
    for item in plan.items:
        if not isinstance(item, PieceItem) or item.trivial or item.safety is None or not item.safety.nodes:
            continue
        verdict = item.safety.nodes[0]
        if verdict.kind == "mixing":
            kind = "mixing"
            cure = "the piece runs at its exact size; keep row-wise work in pieces of its own, with a split op between"
        elif verdict.kind == "unknown":
            kind, cure = "opaque", f'tell pcg what it does: pcg.register_row_rule("{verdict.op}", rule)'
        else:
            continue
        yield Hazard(kind, verdict.op, *place_parts(verdict.where), verdict.reason, cure)
