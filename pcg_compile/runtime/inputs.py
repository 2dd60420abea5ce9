"""Where a program finds its inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..fx.plan import InputSpec
from ..fx.sizes import evaluate, expr_of, shape_at, strides_at, symbols_of
from ..memory.buffers import extent
from ..memory.views import expanded_dims, looks_like, real_rows, unexpanded
from ..torch_compat.cuda import FEW_COPIES
from .binding import wants_static
from .build_state import Building
from .row_padding import PaddedLoad, StackedLoad, fill_padding, padded_load

__all__ = ["bind_inputs"]

_SELECTS = (torch.ops.aten.index_select.default,)


def bind_inputs(b: Building) -> None:
    """Gives every input its static memory, or its place in the frame."""
    groups = _alike(b) if b.bucket is not None else []
    side_by_side = {spec.node: static for group in groups for spec, static in zip(group, _place_group(b, group))}
    for spec in b.plan.inputs:
        if spec.kind == "step":
            if spec.node not in b.static:
                _bind_step_input(b, spec)
        elif not isinstance(spec.value, torch.Tensor):
            continue
        elif b.bucket is None or (spec.kind == "user" and not wants_static(b.plan, spec.node)):
            # Read where it lies; what lies on another device than the captured graphs does so always.
            b.program.late_inputs.append((b.late(spec.node), spec.position))
        elif spec.kind in ("static", "bound"):
            b.static[spec.node] = b.binding.held(spec.position, b.args[spec.position])
        else:
            _copy_in(b, spec, side_by_side.get(spec.node))
    for group in groups:
        _load_together(b, group)


def _alike(b: Building) -> list[list[InputSpec]]:
    """Inputs that differ in nothing but their values, where copying many in one call pays."""
    groups: dict[tuple[Any, ...], list[InputSpec]] = {}
    for spec in b.plan.inputs:
        value = spec.value
        if spec.kind != "user" or not isinstance(value, torch.Tensor) or not wants_static(b.plan, spec.node):
            continue
        special = spec.pad_value is not None or spec.node in b.plan.row_indices or spec.node.name in b.plan.zeroed
        shape = shape_at(value, b.at)
        if special or not symbols_of(value) or strides_at(value, b.at) != torch.empty(shape, device="meta").stride():
            continue
        groups.setdefault((value.dtype, *map(expr_of, value.shape)), []).append(spec)
    return [group for group in groups.values() if len(group) > FEW_COPIES]


def _place_group(b: Building, group: list[InputSpec]) -> list[torch.Tensor]:
    first = group[0]
    shape, strides = shape_at(first.value, b.at), strides_at(first.value, b.at)
    # Each begins at a multiple of 16 elements, as compiled code assumes of what it reads.
    apart = -(-extent(shape, strides) // 16) * 16
    slot = ("inputs", first.position)
    both = b.binding.place(slot, slot, (len(group), *shape), (apart, *strides), first.value.dtype)
    with torch.inference_mode(False), torch.no_grad():
        return list(both.unbind())


def _load_together(b: Building, group: list[InputSpec]) -> None:
    positions = [spec.position for spec in group]
    loads = [load for load in b.program.padded if isinstance(load, PaddedLoad) and load.position in positions]
    # With others between them, padded dimensions come first in the target.
    indexed = [d for d, rows in enumerate(loads[0].index) if rows is not None] if loads else []
    if not loads or indexed != list(range(indexed[0], indexed[-1] + 1)):
        return
    shape, slot = (len(group), *shape_at(group[0].value, b.sizes)), ("inputs", group[0].position)
    strides = torch.empty(shape, device="meta").stride()
    with torch.inference_mode(False), torch.no_grad():
        stack = b.binding.place(("stack", slot), ("stack", slot), shape, strides, group[0].value.dtype)
        target = loads[0].target
        apart = b.static[group[1].node].storage_offset() - b.static[group[0].node].storage_offset()
        targets = target.as_strided((len(group), *target.shape), (apart, *target.stride()))
    b.program.padded = [load for load in b.program.padded if load not in loads]
    b.program.padded.append(StackedLoad(positions, stack, targets, [None, *loads[0].index]))


def _bind_step_input(b: Building, spec: InputSpec) -> None:
    assert spec.step is not None
    tensor = spec.step.get(b.step, int(evaluate(spec.step.size, b.at)))
    if not looks_like(tensor, spec.value, b.at):
        # Another cache than the one that the pieces were compiled with: their code may hold its sizes.
        b.compiled = False
        b.program.fallbacks.append((f"{spec.step.name} has other sizes than when compiled: pieces run eagerly", ""))
    b.static[spec.node] = tensor


def _copy_in(b: Building, spec: InputSpec, target: torch.Tensor | None) -> None:
    if target is None:
        shape, strides = shape_at(spec.value, b.at), strides_at(spec.value, b.at)
        target = b.binding.place(spec.node, ("input", spec.position), shape, strides, spec.value.dtype)
    b.static[spec.node] = target
    b.copied.append(spec)
    rows = b.plan.row_indices.get(spec.node)
    expanded = expanded_dims(target)
    if rows is not None:
        # Entries that share memory are looked up once.
        given = _look_up_rows(b, spec, unexpanded(target, expanded), b.sizes[rows], b.at[rows])
        target = given.expand(target.shape) if expanded else given
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
