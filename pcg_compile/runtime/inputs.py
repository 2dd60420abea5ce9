"""Where a program finds its inputs."""

from __future__ import annotations

from functools import partial

import torch

from ..graph.plan import InputSpec
from ..graph.scalars import evaluate, shape_at, strides_at
from .binding import wants_static
from .building import Building
from .views import looks_like, real_rows, tails

__all__ = ["bind_inputs"]


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
            # The memory is held, not the user's object: when that goes, so do the recordings.
            with torch.inference_mode(False), torch.no_grad():
                b.static[spec.node] = b.args[spec.position].detach()
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
    b.program.targets.append(real_rows(target, spec.value, b.sizes))
    b.program.sources.append(spec.position)
    b.copied.append(spec)
    pad_value = 0 if spec.node in b.plan.row_indices else spec.pad_value
    if pad_value is not None:
        b.program.prologue.extend(partial(t.fill_, pad_value) for t in tails(target, spec.value, b.sizes))
    if spec.node in b.plan.row_indices:
        _count_from_the_real_size(b, b.program.targets[-1], b.sizes[b.plan.row_indices[spec.node]])


def _count_from_the_real_size(b: Building, indices: torch.Tensor, size: int) -> None:
    with torch.inference_mode(False):
        negative = torch.empty(indices.shape, dtype=torch.bool, device=indices.device)
    b.program.prologue.append(partial(torch.lt, indices, 0, out=negative))
    b.program.prologue.append(partial(indices.add_, negative, alpha=size))
