"""What padding rows hold: copies of row 0, in every padded dimension.

Note [row 0]. Padding must be as valid as real data. An index made of several inputs stays within its table for every
real row; only copies of *one* row, taken from all inputs alike, keep that true for padding. Hence each load gathers an
input's real rows and, behind them, its row 0 again. What a split op or a piece at its exact size writes between
captured graphs is padded likewise. Where there are no rows, padding is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import sympy
import torch

from ..fx.plan import InputSpec
from ..fx.sizes import shape_at
from ..memory.views import expanded_dims, tails, unexpanded
from .program import Frame

__all__ = ["PaddedLoad", "fill_padding", "is_large", "padded_load", "repeat_row_zero"]

Sizes = Mapping[sympy.Symbol, int]
#: Entries to take by (real, bucket) sizes of the padded dimensions.
RowsOf = dict[tuple[tuple[int, int], ...], list[torch.Tensor]]

#: Entries of an index that is expanded, 8 bytes each. A graph keeps some hundred programs, one index each.
_MOST_EXPANDED = 2**13


@dataclass(frozen=True, eq=False)
class PaddedLoad:
    """Copies an argument into static memory and pads it, in one launch; many arguments of one shape in two.

    An argument that is large and padded along several dimensions takes a launch for each of these.

    Attributes:
        specs: of the arguments. target: static memory, its padded dimensions first where they are not neighbors.
        index: for each dimension the entries to take, None for all.
        tails: padding that is copied behind the gather, in order, and what it repeats.
        expanded: dimensions along which all entries of the static memory are one: the first entry is copied.
        stack: memory for the real rows of many arguments, whose static memory lies side by side.
    """

    specs: Sequence[InputSpec]
    target: torch.Tensor
    index: list[torch.Tensor | None]
    expanded: list[int]
    tails: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    stack: torch.Tensor | None = None

    def run(self, frame: Frame) -> None:
        """Loads."""
        if self.stack is not None:
            source = torch.stack([frame.args[spec.position] for spec in self.specs], out=self.stack)
        else:
            source = frame.args[self.specs[0].position]
            if self.expanded:
                source = unexpanded(source, self.expanded)
            if source.dtype is not self.target.dtype:
                source = source.to(self.target.dtype)
        torch.ops.aten.index.Tensor_out(source, self.index, out=self.target)
        for tail, first in self.tails:
            tail.copy_(first)

    def side_by_side(self, specs: Sequence[InputSpec], apart: int, stack: torch.Tensor) -> PaddedLoad:
        """The load of many arguments like its own, whose static memory lies ``apart`` elements from the next."""

        def all_of(one: torch.Tensor) -> torch.Tensor:
            return one.as_strided((len(specs), *one.shape), (apart, *one.stride()))

        tails = [(all_of(tail), all_of(first)) for tail, first in self.tails]
        return PaddedLoad(specs, all_of(self.target), [None, *self.index], [], tails, stack)


def padded_load(
    spec: InputSpec, target: torch.Tensor, real: tuple[int, ...], expanded: list[int], rows: RowsOf
) -> PaddedLoad | None:
    """The load of an argument of shape ``real`` into ``target``, of the bucket's; None where nothing is padded.

    Args:
        rows: what :func:`rows_to_take` has made for the program's other inputs.
    """
    target = unexpanded(target, expanded)
    padded = [d for d, n in enumerate(real) if d not in expanded and n != target.shape[d]]
    if not padded:
        return None
    tails: list[tuple[torch.Tensor, torch.Tensor]] = []
    if len(padded) > 1 and is_large(target.shape[d] for d in padded):
        *outer, inner = padded
        for d in outer:
            tail = target.narrow(d, real[d], target.shape[d] - real[d])
            tails.insert(0, (tail, target.narrow(d, 0, 1).expand_as(tail)))
            target = target.narrow(d, 0, real[d])
        padded = [inner]
    key = tuple((real[d], target.shape[d]) for d in padded)
    if key not in rows:
        rows[key] = rows_to_take(key, target.device)
    index: list[torch.Tensor | None] = [None] * target.dim()
    for d, entries in zip(padded, rows[key], strict=True):
        index[d] = entries
    if padded != list(range(padded[0], padded[-1] + 1)):
        # Indexed dimensions with others between them come first in the result.
        target = target.permute(*padded, *(d for d in range(target.dim()) if d not in padded))
    return PaddedLoad([spec], target, index, expanded, tails)


def is_large(shape: Iterable[int]) -> bool:
    """Whether an index of several dimensions of a bucket would be too large to expand."""
    return prod(shape) > _MOST_EXPANDED


def rows_to_take(sizes: Sequence[tuple[int, int]], device: torch.device) -> list[torch.Tensor]:
    """For each padded dimension of (real, bucket) sizes the entries to gather: the real ones, then the first again.

    On a GPU, a gather along several dimensions first copies indices whose strides differ, so they are expanded here.
    """
    entries = []
    for i, (real, bucket) in enumerate(sizes):
        rows = torch.arange(bucket, device=device)
        rows[real:] = 0
        entries.append(rows.view(-1, *[1] * (len(sizes) - 1 - i)))
    if len(entries) > 1 and device.type == "cuda":
        return [rows.contiguous() for rows in torch.broadcast_tensors(*entries)]
    return entries


def repeat_row_zero(static: torch.Tensor, fake: torch.Tensor, sizes: Sizes) -> list[Callable[[], Any]]:
    """What pads a bucket-sized tensor whose real rows are written, in order: one launch for each padded dimension."""
    calls: list[Callable[[], Any]] = []
    empty = 0 in shape_at(fake, sizes)
    for dim, tail, rest in reversed(tails(static, fake, sizes)):
        shared = expanded_dims(rest)
        tail, first = unexpanded(tail, shared), unexpanded(rest.narrow(dim, 0, 1), shared)
        calls.append(tail.zero_ if empty else partial(tail.copy_, first.expand_as(tail)))
    return calls


def fill_padding(
    static: torch.Tensor, fake: torch.Tensor, sizes: Sizes, value: float, dims: Collection[int] | None = None
) -> list[Callable[[], Any]]:
    """What fills the padding with a value instead, along all dimensions or along ``dims``."""
    return [partial(tail.fill_, value) for _, tail, _ in tails(static, fake, sizes, dims)]
