"""Triton kernels for many adapters in one batch: a segmented shrink (x A^T), then a segmented expand (h B^T).

A program works on one tile of tokens that share an adapter. Grids follow from shapes alone, so that a recording serves
every mix: a tile finds its segment from ``seg_indptr``, and tiles behind the last segment, where base and padding
tokens lie, end at once. The shrink may split its sum over several programs, each with a place of its own for its part,
which the expand adds up: two launches, no atomics, and the same sum in every run. The idea of grouping tokens by
adapter is that of Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["Blocks", "Launch", "add_adapters_on_gpu", "blocks_for", "launches"]

_MOST_SLICES = 4
#: Programs of the shrink that keep a large GPU's memory busy: two for each of 132 multiprocessors.
_PROGRAMS = 256


@triton.jit
def _find_tile(seg_indptr, tile, ADAPTERS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """The segment of a tile (ADAPTERS or more: none), its first row, and the end of the segment."""
    slots = tl.arange(0, PADDED)
    inside = slots < ADAPTERS
    starts = tl.load(seg_indptr + slots, mask=inside, other=0)
    ends = tl.load(seg_indptr + slots + 1, mask=inside, other=0)
    tiles = (ends - starts + ROWS - 1) // ROWS
    upto = tl.cumsum(tiles, 0)
    slot = tl.sum((upto <= tile).to(tl.int32), 0)
    mine = slots == slot
    first = tl.sum(tl.where(mine, starts + (tile - upto + tiles) * ROWS, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    return slot, first, end


@triton.jit
def _shrink(
    h, x, a, ranks, permutation, seg_indptr,
    x_row, in_features, h_split, h_row, split_size,
    SLICES: tl.constexpr, MAX_RANK: tl.constexpr, ADAPTERS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``h[split, row, i] = sum over the split's k of x[token(row), k] * a[slot, i, k]``, with i = j * MAX_RANK + r."""
    slot, first, end = _find_tile(seg_indptr, tl.program_id(0), ADAPTERS, PADDED, ROWS)
    if slot >= ADAPTERS:
        return
    blocks: tl.constexpr = (MAX_RANK + RANK - 1) // RANK
    block, split = tl.program_id(1), tl.program_id(2)
    rank = tl.load(ranks + slot)
    r = (block % blocks) * RANK + tl.arange(0, RANK)
    if (block % blocks) * RANK >= rank:
        return
    column = (block // blocks) * MAX_RANK + r
    # Up to a multiple of 8, so that a whole vector has one mask; between the rank and that are zeros.
    is_place = (r < (rank + 7) // 8 * 8) & (r < MAX_RANK)
    rows = first + tl.arange(0, ROWS)
    is_row = rows < end
    tokens = tl.load(permutation + rows, mask=is_row, other=0).to(tl.int64)
    sums = tl.zeros((ROWS, RANK), dtype=tl.float32)
    a_base = a + slot.to(tl.int64) * SLICES * MAX_RANK * in_features
    begin = split * split_size
    for start in range(begin, tl.minimum(begin + split_size, in_features), SUM):
        k = start + tl.arange(0, SUM)
        is_k = k < in_features
        inputs = tl.load(x + tokens[:, None] * x_row + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
        factors = tl.load(
            a_base + column[None, :].to(tl.int64) * in_features + k[:, None],
            mask=(r < rank)[None, :] & is_k[:, None],
            other=0.0,
        )
        sums = tl.dot(inputs, factors.to(inputs.dtype), sums, input_precision=PRECISION)
    place = h + split.to(tl.int64) * h_split + rows[:, None].to(tl.int64) * h_row + column[None, :]
    tl.store(place, sums, mask=is_row[:, None] & is_place[None, :])


@triton.jit
def _expand(
    y, h, b, scalings, ranks, permutation, seg_indptr,
    y_row, out_features, h_split, h_row,
    width0, width1, width2, width3,
    SPLITS: tl.constexpr, MAX_RANK: tl.constexpr, ADAPTERS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y[token(row), n] += scaling * sum over r of h[row, slice(n) * MAX_RANK + r] * b[slot, n, r]``."""
    slot, first, end = _find_tile(seg_indptr, tl.program_id(0), ADAPTERS, PADDED, ROWS)
    if slot >= ADAPTERS:
        return
    rank = tl.load(ranks + slot)
    if rank == 0:
        return
    # The block of columns, and the slice that it lies in; no block crosses from one slice to the next.
    block = tl.program_id(1)
    part = 0
    base = 0
    width = width0
    blocks = (width0 + COLUMNS - 1) // COLUMNS
    if block >= blocks:
        block -= blocks
        part, base, width = 1, width0, width1
        blocks = (width1 + COLUMNS - 1) // COLUMNS
        if block >= blocks:
            block -= blocks
            part, base, width = 2, width0 + width1, width2
            blocks = (width2 + COLUMNS - 1) // COLUMNS
            if block >= blocks:
                block -= blocks
                part, base, width = 3, width0 + width1 + width2, width3
    n = block * COLUMNS + tl.arange(0, COLUMNS)
    is_n = n < width
    n += base
    rows = first + tl.arange(0, ROWS)
    is_row = rows < end
    tokens = tl.load(permutation + rows, mask=is_row, other=0).to(tl.int64)
    place = y + tokens[:, None] * y_row + n[None, :]
    mask = is_row[:, None] & is_n[None, :]
    # Asked for first: it comes while the rest is loaded and multiplied.
    before = tl.load(place, mask=mask, other=0.0)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    b_base = b + slot.to(tl.int64) * out_features * MAX_RANK
    for start in range(0, rank, RANK):
        r = start + tl.arange(0, RANK)
        is_place = (r < (rank + 7) // 8 * 8) & (r < MAX_RANK)
        hidden = tl.zeros((ROWS, RANK), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            part_h = h + split * h_split + rows[:, None].to(tl.int64) * h_row + (part * MAX_RANK + r)[None, :]
            hidden += tl.load(part_h, mask=is_row[:, None] & is_place[None, :], other=0.0)
        factors = tl.load(
            b_base + n[None, :].to(tl.int64) * MAX_RANK + r[:, None], mask=is_n[None, :] & is_place[:, None], other=0.0
        )
        # Above the rank may be what another adapter left, and it may not be finite.
        factors = tl.where((r < rank)[:, None], factors, 0.0).to(before.dtype)
        sums = tl.dot(hidden.to(before.dtype), factors, sums, input_precision=PRECISION)
    scaling = tl.load(scalings + slot)
    tl.store(place, (before.to(tl.float32) + scaling * sums).to(before.dtype), mask=mask)


class Blocks(NamedTuple):
    """Sizes of tiles: rows (tokens), the shrink's sum and the parts that it is split into, the expand's columns."""

    rows: int
    sum: int
    splits: int
    columns: int


class Launch(NamedTuple):
    """One kernel with its grid, its arguments in order, and its compile-time constants and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[torch.Tensor | int, ...]
    constants: dict[str, Any]
    options: dict[str, int]


def blocks_for(tokens: int, in_features: int, out_features: int, itemsize: int = 2) -> Blocks:
    """Few tokens: short tiles, and the sum split so that the GPU is full. Many: tiles that fill the tensor cores.

    Args:
        itemsize: bytes of an element of x; wide ones get smaller tiles, for what they take of memory and registers.
    """
    if tokens <= 128:
        rows, most, columns = 16, 8, 64 if out_features <= 4096 else 128
    else:
        rows, most, columns = 32 if tokens <= 1024 else 64, 4, 128 if itemsize <= 2 else 64
    tiles = triton.cdiv(tokens, rows)
    splits = 1
    # Each part has two steps of the loop at least, or its start and end cost more than it saves.
    while splits < most and splits * tiles < _PROGRAMS and in_features >= 512 * splits:
        splits *= 2
    return Blocks(rows, (128 if rows < 64 else 64) * 2 // max(2, itemsize), splits, columns)


def launches(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scalings: torch.Tensor,
    ranks: torch.Tensor,
    permutation: torch.Tensor,
    seg_indptr: torch.Tensor,
    slices: Sequence[int],
    blocks: Blocks | None = None,
) -> tuple[Launch, Launch]:
    """The shrink and the expand of :func:`add_adapters_on_gpu`, to run in this order; ``blocks`` overrides the rule."""
    tokens, in_features = x.shape
    adapters, out_features, max_rank = b.shape
    if len(slices) > _MOST_SLICES:
        raise ValueError(f"a layer is fused of at most {_MOST_SLICES} slices, not {len(slices)}")
    if y.stride(1) != 1:
        raise ValueError("the columns of y are not contiguous")
    x = x if x.stride(1) == 1 else x.contiguous()
    blocks = blocks or blocks_for(tokens, in_features, out_features, x.element_size())
    rank = min(64, max(16, triton.next_power_of_2(max_rank)))
    tiles = triton.cdiv(tokens, blocks.rows) + adapters
    split_size = triton.cdiv(triton.cdiv(in_features, blocks.splits), blocks.sum) * blocks.sum
    splits = triton.cdiv(in_features, split_size)
    h = torch.empty((splits, tokens, len(slices) * max_rank), dtype=torch.float32, device=x.device)
    common = {
        "MAX_RANK": max_rank,
        "ADAPTERS": adapters,
        "PADDED": triton.next_power_of_2(adapters),
        "ROWS": blocks.rows,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
    }
    routing = (permutation, seg_indptr)
    shrink = Launch(
        _shrink,
        (tiles, len(slices) * triton.cdiv(max_rank, rank), splits),
        (h, x, a, ranks, *routing, x.stride(0), in_features, h.stride(0), h.stride(1), split_size),
        {"SLICES": len(slices), "RANK": rank, "SUM": blocks.sum, **common},
        {"num_warps": 4, "num_stages": 3},
    )
    widths = [*slices, *[0] * (_MOST_SLICES - len(slices))]
    expand = Launch(
        _expand,
        (tiles, sum(triton.cdiv(width, blocks.columns) for width in slices)),
        (y, h, b, scalings, ranks, *routing, y.stride(0), out_features, h.stride(0), h.stride(1), *widths),
        {"SPLITS": splits, "RANK": 16, "COLUMNS": blocks.columns, **common},
        # What keeps registers few enough for two programs or more at a time, which hide each other's waits.
        {"num_warps": 4 if blocks.rows == 16 else 8, "num_stages": 2},
    )
    return shrink, expand


def add_adapters_on_gpu(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scalings: torch.Tensor,
    ranks: torch.Tensor,
    permutation: torch.Tensor,
    seg_indptr: torch.Tensor,
    slices: Sequence[int],
) -> None:
    """:func:`pcg_compile.lora.apply.lora_apply` on rows: ``y [n, out]``, ``x [n, in]``. Can be recorded.

    Raises:
        ValueError: more than 4 slices; columns of y that are not contiguous.
    """
    if x.shape[0] == 0:
        return
    for launch in launches(y, x, a, b, scalings, ranks, permutation, seg_indptr, slices):
        launch.kernel[launch.grid](*launch.args, **launch.constants, **launch.options)
