"""Builds the program of a step while the step runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from ..graph.plan import CallSite, PieceSite, Site
from .binding import Binding
from .building import Building
from .calls import callable_of, run_call, run_exact
from .inputs import bind_inputs
from .outputs import emitter
from .program import Body, Program
from .recorded import conformer, run_recorded
from .whole import WholeStep, why_not_whole

__all__ = ["build_and_run"]


def build_and_run(
    binding: Binding,
    sizes: Mapping[sympy.Symbol, int],
    bucket: Mapping[sympy.Symbol, int] | None,
    args: Sequence[Any],
    step: Any,
) -> tuple[Program, Any]:
    """Builds the program of a step and runs the step on the way, recording what is not recorded yet.

    Args:
        sizes: the real sizes. bucket: the sizes to record at, None to run everything at its exact size.
        args: the call's arguments. step: the state of ``pcg.step()``, or None.

    Recording and running go together because a piece that is warmed up, or run on a CPU to record it, must see
    real data: rubbish in an index would be an illegal memory access.
    """
    b = Building(binding, sizes, bucket, args, step)
    try:
        outputs = _build(b)
    except BaseException:
        b.drop_new_recordings()
        raise
    finally:
        b.program.frame[:] = [None] * len(b.program.frame)
    if not b.program.complete:
        b.drop_new_recordings()
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
        for site in b.plan.sites:
            if b.shared.agreement is not None and site.index == b.plan.first_collective:
                b.program.confirm = b.shared.agreement.confirm
                b.add(b.program.confirm)
            _run_site(b, site)
            b.free_after(site.index)
            b.program.op_sites += [site.index] * (len(b.program.ops) - len(b.program.op_sites))
            b.keep.pop(site.index, None)
    b.program.emit = emitter(b)
    b.program.counters.replays += b.program.replays
    if b.program.bucket is not None and b.program.complete and b.program.recording_keys:
        b.binding.buckets.add(b.program.bucket)
    if b.bucket is not None and b.requests and b.shared.options.cudagraph_mode != "piecewise" and b.program.complete:
        _find_whole(b)
    if b.bucket is not None and _is_the_buckets(b):
        program = b.program
        b.binding.bodies[program.bucket] = Body(  # type: ignore[index]
            dict(b.static),
            program.ops,
            program.op_sites,
            program.replays,
            program.recording_keys,
            program.whole,
            list(program.fallbacks),
        )
    return b.program.emit(b.args)


def _build_on(b: Building, body: Body) -> Any:
    """A program for other real sizes in a bucket that has one: only inputs and outputs differ."""
    program = b.program
    program.ops, program.replays, program.whole = body.ops, body.replays, body.whole
    program.op_sites, program.recording_keys = body.op_sites, body.recording_keys
    program.fallbacks = list(body.fallbacks)
    program.confirm = b.shared.agreement.confirm if b.shared.agreement is not None else None
    program.emit = emitter(b)
    return program.run(b.args)


def _run_site(b: Building, site: Site) -> None:
    if isinstance(site, CallSite):
        run_call(b, site)
    elif b.bucket is None or not run_recorded(b, site):
        run_exact(b, site)


def _is_the_buckets(b: Building) -> bool:
    """Whether nothing between inputs and outputs depends on the real sizes."""
    return (
        b.compiled
        and b.requests
        and b.program.complete
        and not b.program.frame
        and len(b.program.fallbacks) == b.program.bucket_fallbacks
        and all(site.mode == "request" for site in b.plan.sites if isinstance(site, CallSite))
    )


def _find_whole(b: Building) -> None:
    """The whole step as one recording, shared by all programs of the bucket."""
    assert b.program.bucket is not None
    full = b.shared.options.cudagraph_mode == "full"
    reason = why_not_whole(b.plan.sites, lambda site: _is_recorded(b, site))
    if not b.compiled:
        reason = "pieces run eagerly"
    if reason is not None:
        if reason and full:
            b.program.fallbacks.append((f"attention between pieces: {reason}", ""))
        return
    wholes = b.binding.wholes
    if b.program.bucket not in wholes:
        leaves, _ = tree_flatten(b.plan.outputs, is_leaf=lambda x: isinstance(x, fx.Node))
        made = [n for n in leaves if isinstance(n, fx.Node) and n in b.static and n.op != "placeholder"]
        wholes[b.program.bucket] = WholeStep(
            b.shared,
            dict(b.at),
            b.bucket_name(),
            {s.node: b.static[s.node] for s in b.plan.inputs if s.node in b.static},
            {node: b.static[node] for node in made},
            {s.index: _whole_piece(b, s) for s in b.plan.sites if isinstance(s, PieceSite)},
            callable_of,
            True if full or _is_full_by_default(b) else None,
            not full,
        )
    b.program.whole = wholes[b.program.bucket]


def _is_full_by_default(b: Building) -> bool:
    """Whether "auto" takes one CUDA graph a step without a measurement.

    An op of someone else's is compared with pieces first, by warm-up. On a CPU a replay runs the same calls.
    """
    ours = all(site.op.own_metadata for site in b.plan.sites if isinstance(site, CallSite))
    return ours and b.shared.device.type == "cuda" and b.shared.agreement is None


def _is_recorded(b: Building, site: PieceSite) -> bool:
    if any(node not in b.static for node in (*site.reads, *site.outputs)):
        return False
    assert b.bucket is not None
    key = (site.index, tuple(b.bucket[s] for s in site.piece.symbols))
    return key in b.binding.recordings


def _whole_piece(b: Building, site: PieceSite) -> Callable[..., Sequence[torch.Tensor]]:
    function, conform = site.compiled.function, conformer(b, site.piece)
    return lambda *args: conform(function(*args))
