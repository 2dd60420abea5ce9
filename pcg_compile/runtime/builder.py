"""Builds the program of a step: a bucket that is new is captured here, operation by operation.

Note [built while it runs]. A program is data, and a step is a loop over it; but the first step of a bucket runs as its
program is built. The arguments of each operation are addresses, and those of a captured graph's results are known once
it is captured (a CUDA graph's memory pool chooses them). What is captured must be run before, with real data: rubbish
in an index would be an illegal memory access. Whether a capture succeeds, and what a probe finds, decides how the next
operation reads its inputs. So :func:`build_and_run` adds one operation at a time and calls it: a capture runs its piece
by itself. Programs of other real sizes in the bucket share the body that was built, and are complete before they run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from ..fx.plan import Item, PieceItem, SplitOpItem
from ..torch_compat.structured_trace import add_artifact
from .between import add_exact, add_split_op
from .binding import Binding
from .draft import Draft
from .emit import emit_of
from .full_graph import FullGraph, why_not_full
from .loads import add_loads
from .pieces import add_at_bucket, conformer
from .program import Body, Confirm, Program, size_name

__all__ = ["build_and_run"]

_LOG = logging.getLogger("pcg_compile")


def build_and_run(
    binding: Binding,
    sizes: Mapping[sympy.Symbol, int],
    bucket: Mapping[sympy.Symbol, int] | None,
    args: Sequence[Any],
    step: Any,
) -> tuple[Program, Any]:
    """Builds the program of a step and runs the step; returns the program and the step's outputs.

    See Note [built while it runs].

    Args:
        sizes: the real sizes. bucket: the sizes to capture at, None to run everything at its exact size.
        args: the call's arguments. step: the state of ``pcg.step()``, or None.
    """
    d = Draft(binding, sizes, bucket, args, step)
    body = binding.bodies.get(d.key) if d.key is not None and d.requests else None
    if body is not None:
        d.static.update(body.static)
    add_loads(d)
    if body is not None:
        program = d.program(body, emit_of(d))
        return program, program.run(args)
    try:
        for operation in d.loads:
            operation.call()
        with d.shared.engine.session():
            for item in d.plan.items:
                _add_and_run(d, item)
        d.shared.counters.replays += len(d.capture_keys)
        emit = emit_of(d)
        outputs = emit.call()
        program = d.program(_body_of(d), emit)
    except BaseException:
        d.drop_new_captures()
        raise
    finally:
        d.frame.clear()
    if not d.complete:
        d.drop_new_captures()
    elif program.replays:
        _log_captured(d, program)
    return program, outputs


def _log_captured(d: Draft, program: Program) -> None:
    bucket = d.bucket_name()
    use, name = d.shared.counters.bucket(bucket), "the fixed size" if bucket == () else f"bucket {bucket}"
    _LOG.info("captured %s: %d graphs, %.1f MiB, %.2f s", name, program.replays, use.bytes / 2**20, use.seconds)
    _LOG.debug("%s", program)
    add_artifact(f"pcg_program_{size_name(d.key or ())}".replace(" ", "_"), lambda: str(program), d.shared.number)


def _add_and_run(d: Draft, item: Item) -> None:
    if d.shared.agreement is not None and item.index == d.plan.first_collective:
        d.run(Confirm(d.shared.agreement.confirm, "sizes of all ranks"))
    if isinstance(item, SplitOpItem):
        add_split_op(d, item)
    elif d.bucket is None or not add_at_bucket(d, item):
        add_exact(d, item)
    d.free_after(item)
    d.keep.pop(item.index, None)


def _body_of(d: Draft) -> Body:
    """What the draft runs between inputs and outputs, which other programs of its bucket share where they can."""
    body = d.body()
    if d.key is None or not d.complete:
        return body
    if d.capture_keys:
        d.binding.buckets.add(d.key)
    if d.requests and d.shared.options.cudagraph_mode != "piecewise":
        body = replace(body, full_graph=_full_graph(d))
    request = all(item.mode == "request" for item in d.plan.items if isinstance(item, SplitOpItem))
    if request and d.compiled and d.requests and not d.frame.values and not d.fallbacks:
        # Nothing between inputs and outputs depends on the real sizes.
        d.binding.bodies[d.key] = body
    return body


def _full_graph(d: Draft) -> FullGraph | None:
    """The full CUDA graph of the bucket, which is captured when a step first needs it; None where there can be none."""
    assert d.key is not None
    if d.key in d.binding.piecewise:
        return None
    full = d.shared.options.cudagraph_mode == "full"
    reason = why_not_full(d.plan.items, lambda item: _is_captured(d, item)) if d.compiled else "pieces run eagerly"
    if reason is not None:
        if reason and full:
            d.fallbacks.append((f"attention between pieces: {reason}", ""))
        return None
    graph = d.binding.full_graphs.get(d.key)
    if graph is None:
        made = [n for n in d.plan.outputs if isinstance(n, fx.Node) and n in d.static and n.op != "placeholder"]
        graph = d.binding.full_graphs[d.key] = FullGraph(
            d.shared,
            dict(d.at),
            d.bucket_name(),
            {s.node: d.static[s.node] for s in d.plan.inputs if s.node in d.static},
            {node: d.static[node] for node in made},
            {s.index: _conforming(d, s) for s in d.plan.items if isinstance(s, PieceItem)},
            True if full or _is_full_by_default(d) else None,
            not full,
        )
    return graph


def _is_full_by_default(d: Draft) -> bool:
    """Whether "auto" takes one CUDA graph a step without a measurement.

    An op of someone else's is compared with pieces first, by warm-up. On a CPU a replay runs the same calls.
    """
    ours = all(item.op.own_metadata for item in d.plan.items if isinstance(item, SplitOpItem))
    return ours and d.shared.device.type == "cuda" and d.shared.agreement is None


def _is_captured(d: Draft, item: PieceItem) -> bool:
    assert d.bucket is not None
    key = (item.index, tuple(d.bucket[s] for s in item.piece.symbols))
    return key in d.binding.captured_graphs and all(node in d.static for node in (*item.reads, *item.outputs))


def _conforming(d: Draft, item: PieceItem) -> Callable[..., Sequence[torch.Tensor]]:
    function, conform = item.compiled.function, conformer(d, item.piece)
    return lambda *args: conform(function(*args))
