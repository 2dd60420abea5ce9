"""The Triton kernel of :mod:`.advance`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["launch"]

_BLOCK = 128


@triton.jit(do_not_specialize=["requests", "steps", "stride"])
def _advance(tokens, kv_lens, kv_indptr, kv_indices, requests, steps, stride, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < requests
    positions = tl.load(tokens + stride + i, mask=inside, other=0) + steps
    tl.store(tokens + stride + i, positions, mask=inside)
    tl.store(kv_lens + i, (positions + 1).to(tl.int32), mask=inside)
    first = tl.load(kv_indptr + i, mask=inside, other=0)
    page = tl.load(kv_indices + first + positions // PAGE, mask=inside, other=0).to(tl.int64)
    tl.store(tokens + i, page * PAGE + positions % PAGE, mask=inside)


def launch(
    tokens: torch.Tensor, kv_lens: torch.Tensor, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, requests: int,
    steps: int, page_size: int, known: Any,
) -> Any:  # fmt: skip
    """Launches it; all pointers are multiples of 16 bytes.

    Triton takes some 50 us to find out which kernel arguments need; one that is known is launched in 10.

    Args:
        known: what a launch with the same device and page size returned; None at first.
    """
    grid = (triton.cdiv(requests, _BLOCK), 1, 1)
    args = (tokens, kv_lens, kv_indptr, kv_indices, requests, steps, tokens.stride(0), page_size, _BLOCK)
    elsewhere = torch.cuda.current_device() != tokens.device.index
    with torch.cuda.device(tokens.device) if elsewhere else nullcontext():
        if known is None:
            return _advance[grid](*args, num_warps=4)
        known[grid](*args)
    return known
