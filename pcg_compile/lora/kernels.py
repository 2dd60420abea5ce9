"""Triton kernels for many adapters in one batch: a segmented shrink (x A^T), then a segmented expand (h B^T).

A program works on one tile of tokens that share an adapter. Grids follow from shapes alone, so a capture serves
every mix: a tile finds its segment from ``seg_indptr``, and tiles behind the last segment, where base and padding
tokens lie, end at once. The shrink may split its sum over several programs, each with a place of its own for its part,
which the expand adds up: two launches, no atomics, and the same sum in every run. The idea of grouping tokens by
adapter is that of Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285).
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def _of_part(part, of0, of1, of2, of3, PARTS: tl.constexpr):
    """What belongs to a part: a pointer, or a number."""
    chosen = of0
    if PARTS > 1:  # noqa: SIM102 - the first is decided when it is compiled
        if part == 1:
            chosen = of1
    if PARTS > 2:  # noqa: SIM102 - the first is decided when it is compiled
        if part == 2:
            chosen = of2
    if PARTS > 3:  # noqa: SIM102 - the first is decided when it is compiled
        if part == 3:
            chosen = of3
    return chosen


@triton.jit
def shrink(
    h, x, a0, a1, a2, a3, ranks0, ranks1, ranks2, ranks3, permutation, seg_indptr,
    x_row, in_features, h_split, h_row, a_slot0, a_slot1, a_slot2, a_slot3, split_size,
    PARTS: tl.constexpr, MAX_RANK: tl.constexpr, ADAPTERS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``h[split, row, part * MAX_RANK + r] = sum over the split's k of x[token(row), k] * a_part[slot, r, k]``."""
    if OVERLAP:
        # The expand may start from here on: whatever it reads before its own wait is older than this kernel.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot, first, end = _find_tile(seg_indptr, tl.program_id(0), ADAPTERS, PADDED, ROWS)
    if slot >= ADAPTERS:
        return
    blocks: tl.constexpr = (MAX_RANK + RANK - 1) // RANK
    part, split = tl.program_id(1) // blocks, tl.program_id(2)
    rows = first + tl.arange(0, ROWS)
    is_row = rows < end
    # Ahead of the test of the rank: two loads that wait at the same time.
    tokens = tl.load(permutation + rows, mask=is_row, other=0).to(tl.int64)
    rank = tl.load(_of_part(part, ranks0, ranks1, ranks2, ranks3, PARTS) + slot)
    begin_rank = (tl.program_id(1) % blocks) * RANK
    if begin_rank >= rank:
        return
    r = begin_rank + tl.arange(0, RANK)
    # Up to a multiple of 8, so a whole vector has one mask; between the rank and that are zeros.
    is_place = (r < (rank + 7) // 8 * 8) & (r < MAX_RANK)
    sums = tl.zeros((ROWS, RANK), dtype=tl.float32)
    a_slot = _of_part(part, a_slot0, a_slot1, a_slot2, a_slot3, PARTS)
    a_base = _of_part(part, a0, a1, a2, a3, PARTS) + slot.to(tl.int64) * a_slot
    begin = split * split_size
    for start in range(begin, tl.minimum(begin + split_size, in_features), SUM):
        k = start + tl.arange(0, SUM)
        is_k = k < in_features
        inputs = tl.load(x + tokens[:, None] * x_row + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
        factors = tl.load(
            a_base + r[None, :].to(tl.int64) * in_features + k[:, None],
            mask=(r < rank)[None, :] & is_k[:, None],
            other=0.0,
        )
        sums = tl.dot(inputs, factors.to(inputs.dtype), sums, input_precision=PRECISION)
    column = part * MAX_RANK + r
    place = h + split.to(tl.int64) * h_split + rows[:, None].to(tl.int64) * h_row + column[None, :]
    tl.store(place, sums, mask=is_row[:, None] & is_place[None, :])


@triton.jit
def expand(
    h, y0, y1, y2, y3, b0, b1, b2, b3, scalings0, scalings1, scalings2, scalings3,
    ranks0, ranks1, ranks2, ranks3, permutation, seg_indptr,
    h_split, h_row, y_row0, y_row1, y_row2, y_row3, b_slot0, b_slot1, b_slot2, b_slot3,
    width0, width1, width2, width3,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, MAX_RANK: tl.constexpr, ADAPTERS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, TURNS: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """``y_part[token(row), n] += scaling * sum over r of h[row, part * MAX_RANK + r] * b_part[slot, n, r]``.

    A program has TURNS blocks of columns, one after the other: what it takes of h serves all of them.
    """
    slot, first, end = _find_tile(seg_indptr, tl.program_id(0), ADAPTERS, PADDED, ROWS)
    if slot >= ADAPTERS:
        return
    # The part that these columns lie in; no program crosses from one part to the next.
    SPAN: tl.constexpr = COLUMNS * TURNS
    block = tl.program_id(1)
    part = 0
    if PARTS > 1:
        upto0 = (width0 + SPAN - 1) // SPAN
        upto1 = upto0 + (width1 + SPAN - 1) // SPAN
        upto2 = upto1 + (width2 + SPAN - 1) // SPAN
        part = (block >= upto0).to(tl.int32) + (block >= upto1).to(tl.int32) + (block >= upto2).to(tl.int32)
        block -= _of_part(part, 0, upto0, upto1, upto2, PARTS)
    rows = first + tl.arange(0, ROWS)
    is_row = rows < end
    # Three loads that wait at the same time.
    tokens = tl.load(permutation + rows, mask=is_row, other=0).to(tl.int64)
    rank = tl.load(_of_part(part, ranks0, ranks1, ranks2, ranks3, PARTS) + slot)
    scaling = tl.load(_of_part(part, scalings0, scalings1, scalings2, scalings3, PARTS) + slot)
    if rank == 0:
        return
    width = _of_part(part, width0, width1, width2, width3, PARTS)
    y_row = _of_part(part, y_row0, y_row1, y_row2, y_row3, PARTS)
    y_base = _of_part(part, y0, y1, y2, y3, PARTS) + tokens[:, None] * y_row
    b_slot = _of_part(part, b_slot0, b_slot1, b_slot2, b_slot3, PARTS)
    b_base = _of_part(part, b0, b1, b2, b3, PARTS) + slot.to(tl.int64) * b_slot
    n = block * SPAN + tl.arange(0, COLUMNS)
    # Asked for first: it comes while the rest is loaded and multiplied.
    before = tl.load(y_base + n[None, :], mask=is_row[:, None] & (n < width)[None, :], other=0.0)
    if OVERLAP:
        # Where a program of the shrink has something to write, one of these comes here, and waits for all of it.
        tl.extra.cuda.gdc_wait()
    # Small ranks take the fewest places, which a load costs even where it is masked; the largest ones take turns.
    if rank <= 16:
        _add_columns(
            h, y_base, b_base, before, rows, n, width, part, rank, scaling, is_row, h_split, h_row,
            SPLITS, MAX_RANK, 16, COLUMNS, TURNS, True, PRECISION,
        )  # fmt: skip
    elif MAX_RANK > 16:
        if rank <= WIDE:
            _add_columns(
                h, y_base, b_base, before, rows, n, width, part, rank, scaling, is_row, h_split, h_row,
                SPLITS, MAX_RANK, WIDE, COLUMNS, TURNS, True, PRECISION,
            )  # fmt: skip
        elif MAX_RANK > WIDE:
            _add_columns(
                h, y_base, b_base, before, rows, n, width, part, rank, scaling, is_row, h_split, h_row,
                SPLITS, MAX_RANK, 16, COLUMNS, TURNS, False, PRECISION,
            )  # fmt: skip


@triton.jit
def _add_columns(
    h, y_base, b_base, before, rows, n, width, part, rank, scaling, is_row, h_split, h_row,
    SPLITS: tl.constexpr, MAX_RANK: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, TURNS: tl.constexpr,
    ONCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program's columns, beginning at ``n``, whose rows of y are ``before``; ONCE: no rank is above RANK."""
    r = tl.arange(0, RANK)
    hidden = _hidden(h, rows, r, part, rank, is_row, h_split, h_row, SPLITS, MAX_RANK).to(before.dtype)
    for turn in range(TURNS):
        ahead = before
        if TURNS > 1:
            behind = n + COLUMNS
            is_next = (turn + 1 < TURNS) & (behind < width)
            ahead = tl.load(y_base + behind[None, :], mask=is_row[:, None] & is_next[None, :], other=0.0)
        sums = tl.dot(hidden, _factors(b_base, n, r, width, rank, MAX_RANK).to(before.dtype), input_precision=PRECISION)
        if not ONCE:
            for start in range(RANK, rank, RANK):
                more = _hidden(h, rows, start + r, part, rank, is_row, h_split, h_row, SPLITS, MAX_RANK)
                factors = _factors(b_base, n, start + r, width, rank, MAX_RANK).to(before.dtype)
                sums = tl.dot(more.to(before.dtype), factors, sums, input_precision=PRECISION)
        result = (before.to(tl.float32) + scaling * sums).to(before.dtype)
        tl.store(y_base + n[None, :], result, mask=is_row[:, None] & (n < width)[None, :])
        before = ahead
        n += COLUMNS


@triton.jit
def _hidden(h, rows, r, part, rank, is_row, h_split, h_row, SPLITS: tl.constexpr, MAX_RANK: tl.constexpr):
    """What the shrink made of some rows, at some places of a part, summed over its splits."""
    is_place = (r < (rank + 7) // 8 * 8) & (r < MAX_RANK)
    place = h + rows[:, None].to(tl.int64) * h_row + (part * MAX_RANK + r)[None, :]
    mask = is_row[:, None] & is_place[None, :]
    hidden = tl.load(place, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        hidden += tl.load(place + split * h_split, mask=mask, other=0.0)
    return hidden


@triton.jit
def _factors(b_base, n, r, width, rank, MAX_RANK: tl.constexpr):
    """Some places and columns of b; zeros from the rank on."""
    is_place = (r < (rank + 7) // 8 * 8) & (r < MAX_RANK)
    place = b_base + n[None, :].to(tl.int64) * MAX_RANK + r[:, None]
    factors = tl.load(place, mask=(n < width)[None, :] & is_place[:, None], other=0.0)
    # Above the rank may be what another adapter left, and it may not be finite.
    return tl.where((r < rank)[:, None], factors, 0.0)
