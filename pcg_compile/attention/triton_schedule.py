"""The Triton kernel that lists a step's work items; see the notes in :mod:`triton_kernels`."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["HEADER", "ITEM", "schedule"]

#: int32 words ahead of the items (the first is their number), and of one item: first row of q, tokens, position of the
#: first token, KV length, first page entry, part, parts, first workspace slot of the tile.
HEADER, ITEM = 8, 8
_HEADER = tl.constexpr(HEADER)
_ITEM = tl.constexpr(ITEM)


@triton.jit
def _most_keys(
    kv, BLOCK_Q: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SPANS: tl.constexpr
):
    """Upper bound of the number of keys that one tile of a request reads."""
    keys = kv
    if not SPANS:
        if WINDOW > 0:
            keys = tl.minimum(keys, (WINDOW if CAUSAL else 2 * WINDOW) + BLOCK_Q)
        if CHUNK > 0:
            keys = tl.minimum(keys, (CHUNK if CAUSAL else 2 * CHUNK) + BLOCK_Q)
    return keys


@triton.jit(do_not_specialize=["requests", "budget", "num_counters"])
def schedule(
    items, counters, qo_indptr, kv_indptr, kv_lens, requests, budget, num_counters,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, MIN_BLOCKS: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SPANS: tl.constexpr, REQUESTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the work items of one request; see Note [Parts]. Grid: one program per request entry.

    Args:
        items: ``[HEADER + ITEM * n]`` int32, written. counters: ``[num_counters]`` int32, set to zero.
        qo_indptr, kv_indptr: ``[requests + 1]`` int32. kv_lens: ``[requests]`` int32.
        budget: number of parts that fill the GPU, per KV head.
    """
    r = tl.program_id(0)
    i = tl.arange(0, REQUESTS)
    inside = i < requests
    begin = tl.load(qo_indptr + i, mask=inside, other=0)
    end = tl.load(qo_indptr + i + 1, mask=inside, other=0)
    kv = tl.load(kv_lens + i, mask=inside, other=0)
    tiles = (end - begin + BLOCK_Q - 1) // BLOCK_Q
    # A tile's first block may begin ahead of its first key.
    keys = _most_keys(kv, BLOCK_Q, CAUSAL, WINDOW, CHUNK, SPANS)
    blocks = (keys + BLOCK_N - 1) // BLOCK_N + (1 if WINDOW > 0 or CHUNK > 0 else 0)
    total = tl.sum((tiles.to(tl.int64) * blocks).to(tl.int64), 0)
    part = tl.maximum((total + budget - 1) // budget, MIN_BLOCKS).to(tl.int32)
    parts = tl.maximum((blocks + part - 1) // part, 1)
    count = tiles * parts
    shared = tl.where(parts > 1, count, 0)
    # Longest first: later tiles of a prompt see more keys, and prompts tend to follow decode requests.
    last = tl.sum(tl.where(i >= r, count, 0), 0) - 1
    slot = tl.sum(tl.where(i < r, shared, 0), 0)
    mine = i == r
    my_count = tl.sum(tl.where(mine, count, 0), 0)
    my_parts = tl.sum(tl.where(mine, parts, 0), 0)
    my_begin = tl.sum(tl.where(mine, begin, 0), 0)
    my_tokens = tl.sum(tl.where(mine, end - begin, 0), 0)
    my_kv = tl.sum(tl.where(mine, kv, 0), 0)
    pages = tl.load(kv_indptr + r)
    j = tl.arange(0, BLOCK)
    if r == 0:
        tl.store(items, tl.sum(count, 0))
        for start in range(0, num_counters, BLOCK):
            tl.store(counters + start + j, tl.zeros([BLOCK], tl.int32), mask=start + j < num_counters)
    for start in range(0, my_count, BLOCK):
        k = start + j
        mask = k < my_count
        tile = k // my_parts
        token = tile * BLOCK_Q
        to = items + _HEADER + (last - k) * _ITEM
        tl.store(to, my_begin + token, mask=mask)
        tl.store(to + 1, tl.minimum(my_tokens - token, BLOCK_Q), mask=mask)
        tl.store(to + 2, my_kv - my_tokens + token, mask=mask)
        tl.store(to + 3, tl.zeros([BLOCK], tl.int32) + my_kv, mask=mask)
        tl.store(to + 4, tl.zeros([BLOCK], tl.int32) + pages, mask=mask)
        tl.store(to + 5, k - tile * my_parts, mask=mask)
        tl.store(to + 6, tl.zeros([BLOCK], tl.int32) + my_parts, mask=mask)
        tl.store(to + 7, slot + tile * my_parts, mask=mask)
