"""How arguments come into a program: where each lies in static memory, and the operations that load it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..fx.places import name_of_input
from ..fx.plan import InputSpec
from ..fx.sizes import evaluate, expr_of, shape_at, strides_at, symbols_of
from ..memory.buffers import extent
from ..memory.views import expanded_dims, looks_like, real_rows, unexpanded
from ..torch_compat.cuda import FEW_COPIES, foreach_copy
from .draft import Draft
from .program import Frame, Load, LookUpRows, PadInput
from .row_padding import PaddedLoad, RowsOf, fill_padding, is_large, padded_load

__all__ = ["add_loads"]

_SELECTS = (torch.ops.aten.index_select.default,)


class _Loads:
    """The operations so far, by what they do: plain copies are made in one call."""

    def __init__(self) -> None:
        self.targets: list[torch.Tensor] = []
        self.sources: list[InputSpec] = []
        self.in_place: list[tuple[int, InputSpec]] = []
        self.expanded: list[Load] = []
        self.padded: dict[int, PaddedLoad] = {}
        self.rows: RowsOf = {}
        self.last: list[LookUpRows | PadInput] = []


def add_loads(d: Draft) -> None:
    """Gives every input its static memory, or its place in the frame, and adds what loads them all."""
    loads = _Loads()
    groups = _alike(d) if d.bucket is not None else []
    side_by_side = {spec.node: static for group in groups for spec, static in zip(group, _place_group(d, group))}
    with torch.inference_mode(False), torch.no_grad():
        for spec in d.plan.inputs:
            if spec.kind == "step":
                if spec.node not in d.static:
                    _bind_step_input(d, spec)
            elif not isinstance(spec.value, torch.Tensor):
                continue
            elif d.bucket is None or (spec.kind == "user" and not d.plan.wants_static(spec.node)):
                # Read where it lies; what lies on another device than the captured graphs does so always.
                loads.in_place.append((d.late(spec.node), spec))
            elif spec.kind in ("static", "bound"):
                d.static[spec.node] = d.binding.held(spec.position, d.frame.args[spec.position])
            else:
                _copy_in(d, loads, spec, side_by_side.get(spec.node))
        stacked = [load for group in groups if (load := _stacked(d, loads, group)) is not None]
    d.loads += _operations(d, loads, stacked)


def _operations(d: Draft, loads: _Loads, stacked: list[Load]) -> list[Any]:
    first: list[Any] = []
    if loads.targets:
        positions = [spec.position for spec in loads.sources]
        first.append(Load(partial(_copy, d.frame, loads.targets, positions), _names(loads.sources)))
    padded = [Load(partial(load.run, d.frame), _names(load.specs)) for load in loads.padded.values()]
    late: list[Any] = []
    if loads.in_place:
        places = [(slot, spec.position) for slot, spec in loads.in_place]
        late.append(Load(partial(_read_in_place, d.frame, places), _names([spec for _, spec in loads.in_place])))
    return [*first, *loads.expanded, *padded, *stacked, *late, *loads.last]


def _names(specs: Sequence[InputSpec]) -> str:
    return ", ".join(name_of_input(spec.node) for spec in specs)


def _copy(frame: Frame, targets: list[torch.Tensor], positions: list[int]) -> None:
    args = frame.args
    foreach_copy(targets, [args[i] for i in positions])


def _copy_expanded(frame: Frame, target: torch.Tensor, position: int, dims: Sequence[int]) -> None:
    """The first entries along ``dims``, whose entries share memory."""
    target.copy_(unexpanded(frame.args[position], dims))


def _read_in_place(frame: Frame, places: Sequence[tuple[int, int]]) -> None:
    for slot, position in places:
        frame.values[slot] = frame.args[position]


def _alike(d: Draft) -> list[list[InputSpec]]:
    """Inputs that differ in nothing but their values, where copying many in one call pays."""
    groups: dict[tuple[Any, ...], list[InputSpec]] = {}
    for spec in d.plan.inputs:
        value = spec.value
        if spec.kind != "user" or not isinstance(value, torch.Tensor) or not d.plan.wants_static(spec.node):
            continue
        special = spec.pad_value is not None or spec.node in d.plan.row_indices or spec.node.name in d.plan.zeroed
        shape = shape_at(value, d.at)
        if special or not symbols_of(value) or strides_at(value, d.at) != _contiguous(shape):
            continue
        groups.setdefault((value.dtype, *map(expr_of, value.shape)), []).append(spec)
    return [group for group in groups.values() if len(group) > (1 if _is_large(d, group[0]) else FEW_COPIES)]


def _is_large(d: Draft, spec: InputSpec) -> bool:
    """Whether one load of a group of inputs takes fewer launches than one for each of two inputs."""
    dynamic = [n for n in spec.value.shape if symbols_of(n)]
    return len(dynamic) > 1 and is_large(evaluate(n, d.at) for n in dynamic)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _place_group(d: Draft, group: list[InputSpec]) -> list[torch.Tensor]:
    first = group[0]
    shape, strides = shape_at(first.value, d.at), strides_at(first.value, d.at)
    # Each begins at a multiple of 16 elements, as compiled code assumes of what it reads.
    apart = -(-extent(shape, strides) // 16) * 16
    slot = ("inputs", first.position)
    together = d.binding.place(slot, slot, (len(group), *shape), (apart, *strides), first.value.dtype)
    with torch.inference_mode(False), torch.no_grad():
        return list(together.unbind())


def _stacked(d: Draft, loads: _Loads, group: list[InputSpec]) -> Load | None:
    """One load for a group of inputs that lie side by side, in place of one for each."""
    first = loads.padded.get(group[0].position)
    # With others between them, padded dimensions come first in the target.
    indexed = [i for i, rows in enumerate(first.index) if rows is not None] if first is not None else []
    if first is None or indexed != list(range(indexed[0], indexed[-1] + 1)):
        return None
    shape, slot = (len(group), *shape_at(group[0].value, d.sizes)), ("inputs", group[0].position)
    stack = d.binding.place(("stack", slot), ("stack", slot), shape, _contiguous(shape), group[0].value.dtype)
    apart: Any = d.static[group[1].node].storage_offset() - d.static[group[0].node].storage_offset()
    for spec in group:
        del loads.padded[spec.position]
    load = first.side_by_side(group, apart, stack)
    return Load(partial(load.run, d.frame), _names(group))


def _bind_step_input(d: Draft, spec: InputSpec) -> None:
    assert spec.step is not None
    tensor = spec.step.get(d.step, int(evaluate(spec.step.size, d.at)))
    if not looks_like(tensor, spec.value, d.at):
        # Another cache than the one that the pieces were compiled with: their code may hold its sizes.
        d.compiled = False
        d.fallbacks.append((f"{spec.step.name} has other sizes than when compiled: pieces run eagerly", ""))
    d.static[spec.node] = tensor


def _copy_in(d: Draft, loads: _Loads, spec: InputSpec, target: torch.Tensor | None) -> None:
    if target is None:
        shape, strides = shape_at(spec.value, d.at), strides_at(spec.value, d.at)
        target = d.binding.place(spec.node, ("input", spec.position), shape, strides, spec.value.dtype)
    d.static[spec.node] = target
    d.copied.append(spec)
    rows = d.plan.row_indices.get(spec.node)
    expanded = expanded_dims(target)
    if rows is not None:
        # Entries that share memory are looked up once.
        given = _look_up_rows(d, loads, spec, unexpanded(target, expanded), d.sizes[rows], d.at[rows])
        target = given.expand(target.shape) if expanded else given
    real, load = real_rows(target, spec.value, d.sizes), None
    if spec.pad_value is not None and rows is None:
        fills = fill_padding(target, spec.value, d.sizes, spec.pad_value)
    else:
        # A mask is zero in the padding along the sizes that it is summed over.
        zero = d.plan.zeroed.get(spec.node.name, set())
        masking = [i for i, n in enumerate(spec.value.shape) if expr_of(n) in zero]
        fills = fill_padding(target, spec.value, d.sizes, 0, masking)
        for dim in masking:
            target = target.narrow(dim, 0, real.shape[dim])
        load = padded_load(spec, target, tuple(real.shape), expanded, loads.rows)
    loads.last += [PadInput(fill, _names([spec])) for fill in fills]
    if load is not None:
        loads.padded[spec.position] = load
    elif expanded:
        call = partial(_copy_expanded, d.frame, unexpanded(real, expanded), spec.position, expanded)
        loads.expanded.append(Load(call, _names([spec])))
    else:
        loads.targets.append(real)
        loads.sources.append(spec)


def _look_up_rows(
    d: Draft, loads: _Loads, spec: InputSpec, indices: torch.Tensor, size: int, bucket: int
) -> torch.Tensor:
    """Where to load row indices, which are looked up in ``0 .. size - 1`` on their way to ``indices``.

    So a negative one counts from the real size, and one that is out of range is the error that eager raises, where
    at the bucket's size it would silently be a padding row. ``index_select`` has no negative ones.
    """
    shape = tuple(indices.shape)
    given = d.binding.place((spec.node, "given"), ("given", spec.position), shape, _contiguous(shape), torch.int64)
    rows = d.binding.place(("rows", indices.dtype), ("rows", indices.dtype), (bucket,), (1,), indices.dtype)
    torch.arange(bucket, out=rows, device=rows.device)
    selects = any(call.op in _SELECTS for user in spec.node.users for call in d.plan.facts[user].ops)
    if len(shape) == 1 and selects:
        call = partial(torch.index_select, rows[:size], 0, given, out=indices)
    else:
        call = partial(torch.take, rows[:size], given, out=indices)
    loads.last.append(LookUpRows(call, _names([spec])))
    return given
