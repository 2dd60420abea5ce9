"""Makes a step's metadata those of the decode steps that follow, on the device."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

__all__ = ["advance"]


def advance(
    tokens: torch.Tensor,
    kv_lens: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    requests: int,
    steps: int,
    page_size: int,
    known: Any = None,
) -> Any:
    """Gives each request ``steps`` more tokens, the last of which is its new one.

    Returns the kernel that it launched, for ``known`` in a next call with the same cache.

    Args:
        tokens: ``[3, requests]`` int64, slots and positions among them. kv_lens: int32. kv_indptr: int32, where the
            pages of each request begin in ``kv_indices``, which hold those of its new tokens already.
    """
    kernel = _kernel() if tokens.is_cuda else None
    if kernel is not None:
        return kernel(tokens, kv_lens, kv_indptr, kv_indices, requests, steps, page_size, known)
    slots, positions = tokens[0], tokens[1]
    positions += steps
    kv_lens[:requests] += steps
    pages = kv_indices[kv_indptr[:requests] + positions // page_size].long()
    torch.add(pages * page_size, positions % page_size, out=slots)
    return None


@functools.cache
def _kernel() -> Any:
    """The same in one launch, None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from .advance_kernel import launch

    return launch
