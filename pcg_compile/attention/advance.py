"""Makes a step's metadata those of the decode steps that follow, on the device."""

from __future__ import annotations

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
    """Gives each request ``steps`` more tokens, the last one its new token.

    Returns the kernel that it launched, for ``known`` in the next call for the same cache.

    Args:
        tokens: ``[3, requests]`` int64, slots and positions among them. kv_lens: int32. kv_indptr: int32, where the
            pages of each request begin in ``kv_indices``, which hold those of its new tokens already.
    """
    if tokens.is_cuda and importlib.util.find_spec("triton") is not None:
        from .advance_kernel import launch

        return launch(tokens, kv_lens, kv_indptr, kv_indices, requests, steps, page_size, known)
    slots, positions = tokens[0], tokens[1]
    positions += steps
    kv_lens[:requests] += steps
    pages = kv_indices[kv_indptr[:requests] + positions // page_size].long()
    torch.add(pages * page_size, positions % page_size, out=slots)
    return None
