"""Where a program finds its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ..graph.plan import InputSpec
from ..graph.scalars import evaluate, shape_at, strides_at, symbols_of
from .binding import wants_static
from .building import Building
from .views import assign, expanded_dims, looks_like, real_rows, tails, unexpanded

__all__ = ["bind_inputs"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_SELECTS = (torch.ops.aten.index_select.default,)


def bind_inputs(b: Building) -> None:
    """Gives every input its static memory, or its place in the frame."""
    for spec in b.plan.inputs:
        if spec.kind == "step":
            if spec.node not in b.static:
                _bind_step_input(b, spec)
        elif not isinstance(spec.value, torch.Tensor):
            continue
        elif b.bucket is None or (spec.kind == "user" and not wants_static(b.plan, spec.node)):
            # Read where it lies; what lies on another device than the recordings does so always.
            b.program.late_inputs.append((b.late(spec.node), spec.position))
        elif spec.kind in ("static", "bound"):
            b.static[spec.node] = b.binding.held(spec.position, b.args[spec.position])
        else:
            _copy_in(b, spec)


def _bind_step_input(b: Building, spec: InputSpec) -> None:
    assert spec.step is not None
    tensor = spec.step.get(b.step, int(evaluate(spec.step.size, b.at)))
    if not looks_like(tensor, spec.value, b.at):
        # Another cache than the one that the pieces were compiled with: their code may hold its sizes.
        b.compiled = False
        b.program.fallbacks.append((f"{spec.step.name} has other sizes than when compiled: pieces run eagerly", ""))
    b.static[spec.node] = tensor


def _copy_in(b: Building, spec: InputSpec) -> None:
    shape, strides = shape_at(spec.value, b.at), strides_at(spec.value, b.at)
    target = b.binding.place(spec.node, ("input", spec.position), shape, strides, spec.value.dtype)
    real = real_rows(target, spec.value, b.sizes)
    b.static[spec.node] = target
    b.copied.append(spec)
    expanded = expanded_dims(real)
    real = unexpanded(real, expanded)
    rows = b.plan.row_indices.get(spec.node)
    if rows is not None:
        real = _pick_real_rows(b, spec, real, b.sizes[rows], b.at[rows])
    pad_value = spec.pad_value if rows is None else 0
    if expanded:
        b.program.expanded.append((real, spec.position, expanded))
    else:
        b.program.targets.append(real)
        b.program.sources.append(spec.position)
    padding = tails(target, spec.value, b.sizes)
    if pad_value is not None:
        b.program.prologue.extend(partial(t.fill_, pad_value) for t in padding)
    elif padding and spec.value.dtype in _INTEGERS:
        _pad_like_the_first(b.args[spec.position], spec, padding)


def _pad_like_the_first(argument: torch.Tensor, spec: InputSpec, padding: Sequence[torch.Tensor]) -> None:
    """Integers may become an index: where no step has put any yet, the zeros of fresh memory need not make a good one.

    Once for each program is enough: from then on padding is what steps leave there.
    """
    with torch.inference_mode(False), torch.no_grad():
        for dim, size in enumerate(spec.value.shape):
            if symbols_of(size):
                argument = argument.narrow(dim, 0, 1)
        for tail in padding:
            assign(tail, argument.expand_as(tail))


def _pick_real_rows(b: Building, spec: InputSpec, indices: torch.Tensor, size: int, bucket: int) -> torch.Tensor:
    """Where to copy row indices, which are looked up in ``0 .. size - 1`` on their way to ``indices``.

    So a negative one counts from the real size, and one that is out of range is the error that eager raises, where
    at the bucket's size it would silently be a padding row. ``index_select`` has no negative ones.
    """
    with torch.inference_mode(False), torch.no_grad():
        shape = tuple(indices.shape)
        strides = torch.empty(shape, device="meta").stride()
        given = b.binding.place((spec.node, "given"), ("given", spec.position), shape, strides, torch.int64)
        rows = b.binding.place(("rows", indices.dtype), ("rows", indices.dtype), (bucket,), (1,), indices.dtype)
        torch.arange(bucket, out=rows, device=rows.device)
        if len(shape) == 1 and any(call.op in _SELECTS for user in spec.node.users for call in b.plan.facts[user].ops):
            b.program.prologue.append(partial(torch.index_select, rows[:size], 0, given, out=indices))
        else:
            b.program.prologue.append(partial(torch.take, rows[:size], given, out=indices))
    return given
