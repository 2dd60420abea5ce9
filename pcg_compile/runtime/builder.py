"""Builds the program of a step while the step runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from ..fx.plan import Item, PieceItem, SplitOpItem
from .binding import Binding
from .build_state import Building
from .full_graph import FullGraph, why_not_full
from .inputs import bind_inputs
from .outputs import emitter
from .pieces import conformer, run_captured
from .program import Body, Program
from .split_op_calls import callable_of, run_call, run_exact

__all__ = ["build_and_run"]


def build_and_run(
    binding: Binding,
    sizes: Mapping[sympy.Symbol, int],
    bucket: Mapping[sympy.Symbol, int] | None,
    args: Sequence[Any],
    step: Any,
) -> tuple[Program, Any]:
    """Builds the program of a step and runs the step on the way, captured graph what is not captured yet.

    Args:
        sizes: the real sizes. bucket: the sizes to capture at, None to run everything at its exact size.
        args: the call's arguments. step: the state of ``pcg.step()``, or None.

    Capturing and running go together because a piece that is warmed up, or run on a CPU to capture it, must see
    real data: rubbish in an index would be an illegal memory access.
    """
    b = Building(binding, sizes, bucket, args, step)
    try:
        outputs = _build(b)
    except BaseException:
        b.drop_new_captures()
        raise
    finally:
        b.program.frame[:] = [None] * len(b.program.frame)
    if not b.program.complete:
        b.drop_new_captures()
    return b.program, outputs


def _build(b: Building) -> Any:
    shares = b.compiled and b.requests and b.program.bucket
    body = b.binding.bodies.get(b.program.bucket) if shares else None  # type: ignore[arg-type]
    if body is not None:
        b.static.update(body.static)
    bind_inputs(b)
    if body is not None:
        return _build_on(b, body)
    b.program.start(b.args)
    with b.shared.engine.session():
        for item in b.plan.items:
            if b.shared.agreement is not None and item.index == b.plan.first_collective:
                b.program.confirm = b.shared.agreement.confirm
                b.add(b.program.confirm)
            _run_item(b, item)
            b.free_after(item.index)
            b.program.op_items += [item.index] * (len(b.program.ops) - len(b.program.op_items))
            b.keep.pop(item.index, None)
    b.program.emit = emitter(b)
    b.program.counters.replays += b.program.replays
    if b.program.bucket is not None and b.program.complete and b.program.capture_keys:
        b.binding.buckets.add(b.program.bucket)
    if b.bucket is not None and b.requests and b.shared.options.cudagraph_mode != "piecewise" and b.program.complete:
        _find_full_graph(b)
    if b.bucket is not None and _is_the_buckets(b):
        program = b.program
        b.binding.bodies[program.bucket] = Body(  # type: ignore[index]
            dict(b.static),
            program.ops,
            program.op_items,
            program.replays,
            program.capture_keys,
            program.full_graph,
            list(program.fallbacks),
        )
    return b.program.emit(b.args)


def _build_on(b: Building, body: Body) -> Any:
    """A program for other real sizes in a bucket that has one: only inputs and outputs differ."""
    program = b.program
    program.ops, program.replays, program.full_graph = body.ops, body.replays, body.full_graph
    program.op_items, program.capture_keys = body.op_items, body.capture_keys
    program.fallbacks = list(body.fallbacks)
    program.confirm = b.shared.agreement.confirm if b.shared.agreement is not None else None
    program.emit = emitter(b)
    return program.run(b.args)


def _run_item(b: Building, item: Item) -> None:
    if isinstance(item, SplitOpItem):
        run_call(b, item)
    elif b.bucket is None or not run_captured(b, item):
        run_exact(b, item)


def _is_the_buckets(b: Building) -> bool:
    """Whether nothing between inputs and outputs depends on the real sizes."""
    return (
        b.compiled
        and b.requests
        and b.program.complete
        and not b.program.frame
        and len(b.program.fallbacks) == b.program.bucket_fallbacks
        and all(item.mode == "request" for item in b.plan.items if isinstance(item, SplitOpItem))
    )


def _find_full_graph(b: Building) -> None:
    """The full CUDA graph as one captured graph, shared by all programs of the bucket."""
    assert b.program.bucket is not None
    full = b.shared.options.cudagraph_mode == "full"
    reason = why_not_full(b.plan.items, lambda item: _is_captured(b, item))
    if not b.compiled:
        reason = "pieces run eagerly"
    if reason is not None:
        if reason and full:
            b.program.fallbacks.append((f"attention between pieces: {reason}", ""))
        return
    full_graphs = b.binding.full_graphs
    if b.program.bucket not in full_graphs:
        leaves, _ = tree_flatten(b.plan.outputs, is_leaf=lambda x: isinstance(x, fx.Node))
        made = [n for n in leaves if isinstance(n, fx.Node) and n in b.static and n.op != "placeholder"]
        full_graphs[b.program.bucket] = FullGraph(
            b.shared,
            dict(b.at),
            b.bucket_name(),
            {s.node: b.static[s.node] for s in b.plan.inputs if s.node in b.static},
            {node: b.static[node] for node in made},
            {s.index: _full_graph_piece(b, s) for s in b.plan.items if isinstance(s, PieceItem)},
            callable_of,
            True if full or _is_full_by_default(b) else None,
            not full,
        )
    b.program.full_graph = full_graphs[b.program.bucket]


def _is_full_by_default(b: Building) -> bool:
    """Whether "auto" takes one CUDA graph a step without a measurement.

    An op of someone else's is compared with pieces first, by warm-up. On a CPU a replay runs the same calls.
    """
    ours = all(item.op.own_metadata for item in b.plan.items if isinstance(item, SplitOpItem))
    return ours and b.shared.device.type == "cuda" and b.shared.agreement is None


def _is_captured(b: Building, item: PieceItem) -> bool:
    if any(node not in b.static for node in (*item.reads, *item.outputs)):
        return False
    assert b.bucket is not None
    key = (item.index, tuple(b.bucket[s] for s in item.piece.symbols))
    return key in b.binding.captured_graphs


def _full_graph_piece(b: Building, item: PieceItem) -> Callable[..., Sequence[torch.Tensor]]:
    function, conform = item.compiled.function, conformer(b, item.piece)
    return lambda *args: conform(function(*args))
