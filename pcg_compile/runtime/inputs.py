"""Where a program finds its inputs."""

from __future__ import annotations

from functools import partial

import torch

from ..graph.plan import InputSpec
from ..graph.scalars import evaluate, expr_of, shape_at, strides_at
from .binding import wants_static
from .building import Building
from .padding import fill_padding, padded_load
from .views import expanded_dims, looks_like, real_rows, unexpanded

__all__ = ["bind_inputs"]

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
    b.static[spec.node] = target
    b.copied.append(spec)
    rows = b.plan.row_indices.get(spec.node)
    if rows is not None:
        target = _look_up_rows(b, spec, target, b.sizes[rows], b.at[rows])
    expanded = expanded_dims(target)
    with torch.inference_mode(False), torch.no_grad():
        real, load = real_rows(target, spec.value, b.sizes), None
        if spec.pad_value is not None and rows is None:
            b.program.prologue.extend(fill_padding(target, spec.value, b.sizes, spec.pad_value))
        else:
            # A mask is zero in the padding along the sizes that it is summed over.
            zero = b.plan.zeroed.get(spec.node.name, set())
            masking = [d for d, n in enumerate(spec.value.shape) if expr_of(n) in zero]
            b.program.prologue.extend(fill_padding(target, spec.value, b.sizes, 0, masking))
            for dim in masking:
                target = target.narrow(dim, 0, real.shape[dim])
            load = padded_load(spec.position, target, tuple(real.shape), expanded)
    if load is not None:
        b.program.padded.append(load)
    elif expanded:
        b.program.expanded.append((unexpanded(real, expanded), spec.position, expanded))
    else:
        b.program.targets.append(real)
        b.program.sources.append(spec.position)


def _look_up_rows(b: Building, spec: InputSpec, indices: torch.Tensor, size: int, bucket: int) -> torch.Tensor:
    """Where to load row indices, which are looked up in ``0 .. size - 1`` on their way to ``indices``.

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
