"""Triton kernels for paged attention over ragged batches, without a plan on the host.

Note [Two kernels]. ``schedule`` runs once per step and attention shape: it reads the batch's lengths from device memory
and writes a list of work items, one per tile of query tokens and part of the tile's keys. ``attend`` runs once per
layer: a program loads an item and computes it for one KV head; programs beyond the list return at once. Both grids
follow from the number of query rows and of request entries alone, so one captured graph serves every batch that fits.

Note [Tiles]. A tile is up to BLOCK_Q consecutive tokens of one request. The GROUP query heads that share a KV head are
packed into the rows of the tile's matrix products (row m is token ``m // GROUP``, head ``m % GROUP``), so a decode
token loads each key once for all of its heads. A request of q tokens has ``ceil(q / BLOCK_Q)`` tiles, hence R requests
of T tokens in all have at most ``(T + R * (BLOCK_Q - 1)) // BLOCK_Q``.

Note [Parts]. Where there are too few tiles to fill the GPU, the keys of a tile are divided into parts. With W the
number of key blocks of all tiles, a part has at least ``W / budget`` blocks. So there are at most ``tiles + budget``
items, and fewer than ``2 * budget`` of them belong to a tile with several parts: the size of the workspace does not
depend on the batch. Each part of such a tile writes its unnormalized result and its softmax statistics to the
workspace; the part that finishes last, as an atomic counter tells, merges them in the order of the parts. The result
therefore does not depend on which part is last. This is the split of Flash-Decoding (Dao et al., 2023), with the merge
inside the kernel as in stream-K (Osama et al., arXiv 2301.03598).

Note [Visible keys]. Each token sees one interval of positions. Causal masks, windows, chunks and blocks of tokens that
see each other (``spans``) differ only in its ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_schedule import HEADER, ITEM

__all__ = ["attend"]

# Finite, so differences of two of them are not NaN; masked scores are -inf.
_LOWEST = tl.constexpr(-1.0e30)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_HEADER = tl.constexpr(HEADER)
_ITEM = tl.constexpr(ITEM)


@triton.jit
def _interval(position, kv, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """First and last position that the token at ``position`` sees."""
    low = position * 0
    high = low + kv - 1
    if CAUSAL:
        high = tl.minimum(high, position)
    if WINDOW > 0:
        low = tl.maximum(low, position - (WINDOW - 1))
        high = tl.minimum(high, position + (WINDOW - 1))
    if CHUNK > 0:
        chunk = position // CHUNK * CHUNK
        low = tl.maximum(low, chunk)
        high = tl.minimum(high, chunk + (CHUNK - 1))
    return low, high


@triton.jit
def _finish(
    acc, top, total, m, ok, row, head, d, out, lse, sinks, v_scale, out_row, out_head, lse_row,
    V_DIM: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Normalizes and stores rows: ``acc`` is the weighted sum of values, ``total`` the sum of weights 2^(s - top)."""
    if SINKS:
        sink = tl.load(sinks + head, mask=ok, other=0.0).to(tl.float32) * _LOG2E
        highest = tl.maximum(top, sink)
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.exp2(sink - highest)
        acc = acc * shrink[:, None]
        top = highest
    if FP8:
        acc = acc * v_scale
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    to = out + row.to(tl.int64)[:, None] * out_row + head[:, None] * out_head + d[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=ok[:, None] & (d < V_DIM)[None, :])
    if LSE:
        value = tl.where(total > 0, (top + tl.log2(total)) * _LN2, float("-inf"))
        tl.store(lse + row.to(tl.int64) * lse_row + head, value, mask=ok)


@triton.jit
def _block(
    q, acc, top, total, j, n, d, e, begin, end, low, high, position, slope, factor, softcap,
    k_head, v_head, pages, k_page, k_token, v_page, v_token,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr, PAGE: tl.constexpr,
    ALIKE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, LOWER: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: the softmax statistics and the sum of values after it."""
    p = j + n
    if PAGE % BLOCK_N == 0:
        # The block lies in one page.
        page = tl.load(pages + j // PAGE).to(tl.int64)
        k_at = page * k_page + (j % PAGE + n) * k_token
        v_at = k_at if ALIKE else page * v_page + (j % PAGE + n) * v_token
    else:
        if MASKED:
            page = tl.load(pages + p // PAGE, mask=p < end, other=0).to(tl.int64)
        else:
            page = tl.load(pages + p // PAGE).to(tl.int64)
        k_at = page * k_page + (p % PAGE) * k_token
        v_at = k_at if ALIKE else page * v_page + (p % PAGE) * v_token
    # What lies outside may not be finite: zero weights would not remove it.
    here = (p >= begin) & (p < end) if LOWER else p < end
    if MASKED:
        k = tl.load(k_head + k_at[:, None] + d[None, :], mask=here[:, None] & (d < K_DIM)[None, :], other=0.0)
    elif K_PAD != K_DIM:
        k = tl.load(k_head + k_at[:, None] + d[None, :], mask=(d < K_DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_head + k_at[:, None] + d[None, :])
    s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
    if SOFTCAP:
        # softcap * tanh(s * factor), in units of log 2; ``factor`` has the cap in it.
        s = (1.0 - 2.0 / (tl.exp2(s * factor * (2.0 * _LOG2E)) + 1.0)) * (softcap * _LOG2E)
    elif ALIBI or NEGATIVE:
        s = s * factor
    if ALIBI:
        s += slope[:, None] * (p[None, :] - position[:, None]).to(tl.float32)
    if MASKED:
        seen = p[None, :] <= high[:, None]
        if LOWER:
            seen = seen & (p[None, :] >= low[:, None])
        s = tl.where(seen, s, float("-inf"))
    if SOFTCAP or ALIBI or NEGATIVE:
        highest = tl.maximum(top, tl.max(s, 1))
        weights = tl.exp2(s - highest[:, None])
    else:
        # A multiplication and a subtraction that become one instruction.
        highest = tl.maximum(top, tl.max(s, 1) * factor)
        weights = tl.exp2(s * factor - highest[:, None])
    shrink = tl.exp2(top - highest)
    total = total * shrink + tl.sum(weights, 1)
    if MASKED:
        v = tl.load(v_head + v_at[:, None] + e[None, :], mask=here[:, None] & (e < V_DIM)[None, :], other=0.0)
    elif V_PAD != V_DIM:
        v = tl.load(v_head + v_at[:, None] + e[None, :], mask=(e < V_DIM)[None, :], other=0.0)
    else:
        v = tl.load(v_head + v_at[:, None] + e[None, :])
    acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision=PRECISION)
    return acc, highest, total


@triton.jit
def attend(
    q, k_cache, v_cache, out, lse, items, kv_indices, spans, sinks, slopes, k_scales, v_scales,
    partial, stats, counters, scale, softcap, q_row, q_head, k_page, k_token, k_head, v_page, v_token, v_head,
    out_row, out_head, lse_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_PAD: tl.constexpr,
    V_PAD: tl.constexpr, PAGE: tl.constexpr, ALIKE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SPANS: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, ALIBI: tl.constexpr, NEGATIVE: tl.constexpr, LSE: tl.constexpr, FP8: tl.constexpr,
    WIDE: tl.constexpr, PHASES: tl.constexpr, MERGE_PARTS: tl.constexpr, MERGE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one work item for one KV head. Grid: items times KV heads; see the notes above.

    Args:
        q: ``[rows, heads, K_DIM]``. k_cache, v_cache: ``[pages, page size, KV heads, K_DIM or V_DIM]``.
        out: ``[rows, heads, V_DIM]``. lse: ``[rows, heads]`` float32, natural logarithm, the sinks included.
        items: from :func:`schedule`. kv_indices: page lists, one after the other.
        spans: ``[rows, 2]`` int32, positions from and up to which a token sees keys beside those of the mask.
        sinks, slopes: ``[heads]`` float32. k_scales, v_scales: ``[KV heads]`` float32, for fp8 caches.
        partial, stats, counters: workspace; see Note [Parts].
    """
    # Heads first: programs that run side by side read neighbouring memory of the same pages.
    h = tl.program_id(0) % HEADS
    i = tl.program_id(0) // HEADS
    item = items + _HEADER + i * _ITEM
    # One latency for all of them.
    number = tl.load(items)
    row0 = tl.load(item)
    tokens = tl.load(item + 1)
    first = tl.load(item + 2)
    kv = tl.load(item + 3)
    page0 = tl.load(item + 4)
    part = tl.load(item + 5)
    parts = tl.load(item + 6)
    slot = tl.load(item + 7)
    if i >= number:
        return
    pages = kv_indices + page0

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, K_PAD)
    e = tl.arange(0, V_PAD)
    ok = m < tokens * GROUP
    token = m // GROUP
    row = row0 + token
    head = h * GROUP + m % GROUP
    position = first + token

    low, high = _interval(position, kv, CAUSAL, WINDOW, CHUNK)
    if SPANS:
        low = tl.minimum(low, tl.load(spans + row * 2, mask=ok, other=2147483647))
        high = tl.minimum(tl.maximum(high, tl.load(spans + row * 2 + 1, mask=ok, other=-1)), kv - 1)
        begin = tl.min(tl.where(ok, low, 2147483647), 0)
        end = tl.max(tl.where(ok, high, -1), 0) + 1
        full_begin = tl.max(tl.where(ok, low, 0), 0)
        full_end = tl.min(tl.where(ok, high, 2147483647), 0) + 1
    else:
        begin, full_end = _interval(first, kv, CAUSAL, WINDOW, CHUNK)
        full_begin, end = _interval(first + tokens - 1, kv, CAUSAL, WINDOW, CHUNK)
        end += 1
        full_end += 1
    LOWER: tl.constexpr = SPANS or WINDOW > 0 or CHUNK > 0
    # The part's blocks of keys.
    origin = begin // BLOCK_N
    # One at least: a row that sees no key gets zeros.
    blocks = tl.maximum((end + BLOCK_N - 1) // BLOCK_N - origin, 1)
    share = (blocks + parts - 1) // parts
    parts = (blocks + share - 1) // share
    if part >= parts:
        return
    from_block = origin + part * share
    to_block = tl.minimum(origin + blocks, from_block + share)

    at = q + row.to(tl.int64)[:, None] * q_row + head[:, None] * q_head + d[None, :]
    queries = tl.load(at, mask=ok[:, None] & (d < K_DIM)[None, :], other=0.0)
    if WIDE:
        # The interpreter multiplies the bits of bfloat16 as whole numbers.
        queries = queries.to(tl.float32)
    factor = scale
    v_scale = 1.0
    if FP8:
        factor = factor * tl.load(k_scales + h)
        v_scale = tl.load(v_scales + h)
    if not SOFTCAP:
        factor = factor * _LOG2E
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(slopes + head, mask=ok, other=0.0).to(tl.float32) * _LOG2E
    acc = tl.zeros([BLOCK_M, V_PAD], tl.float32)
    top = tl.full([BLOCK_M], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # A cache may hold more than 2^31 elements: offsets of pages are 64 bits wide.
    k_base = k_cache + h * k_head
    v_base = v_cache + h * v_head

    if PHASES:
        # Blocks that all rows see need no mask. In front of them are some at a window's edge, behind them the diagonal.
        if LOWER:
            clear = tl.minimum(tl.maximum((full_begin + BLOCK_N - 1) // BLOCK_N, from_block), to_block)
            for b in range(from_block, clear):
                acc, top, total = _block(
                    queries, acc, top, total, b * BLOCK_N, n, d, e, begin, end, low, high, position, slope, factor,
                    softcap, k_base, v_base, pages, k_page, k_token, v_page, v_token,
                    K_DIM, V_DIM, K_PAD, V_PAD, PAGE, ALIKE, BLOCK_N, True, LOWER, SOFTCAP, ALIBI, NEGATIVE, PRECISION,
                )  # fmt: skip
            from_block = clear
        clear = tl.maximum(tl.minimum(full_end // BLOCK_N, to_block), from_block)
        for b in range(from_block, clear):
            acc, top, total = _block(
                queries, acc, top, total, b * BLOCK_N, n, d, e, begin, end, low, high, position, slope, factor,
                softcap, k_base, v_base, pages, k_page, k_token, v_page, v_token,
                K_DIM, V_DIM, K_PAD, V_PAD, PAGE, ALIKE, BLOCK_N, False, LOWER, SOFTCAP, ALIBI, NEGATIVE, PRECISION,
            )  # fmt: skip
        from_block = clear
    for b in range(from_block, to_block):
        acc, top, total = _block(
            queries, acc, top, total, b * BLOCK_N, n, d, e, begin, end, low, high, position, slope, factor,
            softcap, k_base, v_base, pages, k_page, k_token, v_page, v_token,
            K_DIM, V_DIM, K_PAD, V_PAD, PAGE, ALIKE, BLOCK_N, True, LOWER, SOFTCAP, ALIBI, NEGATIVE, PRECISION,
        )  # fmt: skip

    if parts == 1:
        _finish(
            acc, top, total, m, ok, row, head, e, out, lse, sinks, v_scale, out_row, out_head, lse_row,
            V_DIM, SINKS, LSE, FP8,
        )  # fmt: skip
    else:
        place = ((slot + part) * HEADS + h) * BLOCK_M + m
        values = partial + place.to(tl.int64)[:, None] * V_PAD + e[None, :]
        tl.store(values, acc, mask=ok[:, None])
        tl.store(stats + 2 * place, top, mask=ok)
        tl.store(stats + 2 * place + 1, total, mask=ok)
        # All of the program's stores come before its arrival.
        tl.debug_barrier()
        counter = counters + slot * HEADS + h
        arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if arrived == parts - 1:
            # The next layer counts from zero again.
            tl.store(counter, 0)
            s = tl.arange(0, MERGE_PARTS)
            for start in range(0, tokens * GROUP, MERGE_ROWS):
                m2 = start + tl.arange(0, MERGE_ROWS)
                ok2 = m2 < tokens * GROUP
                top2 = tl.full([MERGE_ROWS], _LOWEST, tl.float32)
                total2 = tl.zeros([MERGE_ROWS], tl.float32)
                acc2 = tl.zeros([MERGE_ROWS, V_PAD], tl.float32)
                for z in range(0, parts, MERGE_PARTS):
                    mask = (z + s < parts)[:, None] & ok2[None, :]
                    where = ((slot + z + s)[:, None] * HEADS + h) * BLOCK_M + m2[None, :]
                    # Other multiprocessors wrote them: past the L1 cache.
                    tops = tl.load(stats + 2 * where, mask=mask, other=_LOWEST, cache_modifier=".cg")
                    sums = tl.load(stats + 2 * where + 1, mask=mask, other=0.0, cache_modifier=".cg")
                    some = partial + where.to(tl.int64)[:, :, None] * V_PAD + e[None, None, :]
                    sums3 = tl.load(some, mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
                    highest = tl.maximum(top2, tl.max(tops, 0))
                    weights = tl.exp2(tops - highest[None, :])
                    shrink = tl.exp2(top2 - highest)
                    total2 = total2 * shrink + tl.sum(sums * weights, 0)
                    acc2 = acc2 * shrink[:, None] + tl.sum(sums3 * weights[:, :, None], 0)
                    top2 = highest
                _finish(
                    acc2, top2, total2, m2, ok2, row0 + m2 // GROUP, h * GROUP + m2 % GROUP, e, out, lse, sinks,
                    v_scale, out_row, out_head, lse_row, V_DIM, SINKS, LSE, FP8,
                )  # fmt: skip
