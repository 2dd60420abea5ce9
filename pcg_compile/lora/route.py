"""Which tokens belong to which adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


class Routing(NamedTuple):
    """Tokens sorted by adapter: ``permutation`` int32 ``[tokens]``, ``seg_indptr`` int32 ``[max_adapters + 1]``."""

    permutation: torch.Tensor
    seg_indptr: torch.Tensor


def route(slots: torch.Tensor | Sequence[int], max_adapters: int, out: Routing | None = None) -> Routing:
    """Sorts tokens into one segment for each adapter slot, maybe empty; base tokens come last.

    Shapes follow from those of the arguments alone, nothing is written by a host scalar, and nothing waits for the
    device: the call can be captured.

    Args:
        slots: ``[tokens]`` int32 or int64, the adapter slot of each token, -1 for the base model; or a list of them.
            What is no slot, below 0 or from ``max_adapters`` on, is the base model's.
        max_adapters: number of slots. out: an earlier result of the same sizes, filled in place.

    Raises:
        ValueError: ``slots`` is not one-dimensional or holds other than int32 or int64, ``max_adapters`` is no number
            of slots, or ``out`` has other sizes.
    """
    if not isinstance(slots, torch.Tensor):
        slots = torch.tensor(slots) if len(slots) else torch.tensor([], dtype=torch.int64)
    if slots.dim() != 1:
        raise ValueError(f"slots has {slots.dim()} dimensions; it is [tokens]")
    if slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slots holds {slots.dtype}; slots are int32 or int64")
    if isinstance(max_adapters, bool) or not isinstance(max_adapters, int) or max_adapters < 0:
        raise ValueError(f"max_adapters is {max_adapters!r}; it is a number of slots")
    keys = torch.where(slots < 0, max_adapters, slots).clamp_(max=max_adapters)
    ordered, permutation = torch.sort(keys, stable=True)
    edges = torch.arange(max_adapters + 1, device=slots.device, dtype=ordered.dtype)
    seg_indptr = torch.searchsorted(ordered, edges, out_int32=True)
    if out is None:
        return Routing(permutation.to(torch.int32), seg_indptr)
    if out.permutation.shape != permutation.shape or out.seg_indptr.shape != seg_indptr.shape:
        raise ValueError(f"out is for {out.permutation.shape[0]} tokens and {out.seg_indptr.shape[0] - 1} adapters")
    out.permutation.copy_(permutation)
    out.seg_indptr.copy_(seg_indptr)
    return out


def route_requests(
    lengths: Sequence[int], slots: np.ndarray[Any, Any], max_adapters: int, out: np.ndarray[Any, Any]
) -> None:
    """What :func:`route` gives, from requests on the host.

    Args:
        lengths: tokens by request. slots: the adapter slot by request, -1 for the base model.
        out: int32 ``[max_adapters + 1 + rows]``: becomes ``seg_indptr``, then ``permutation``; rows beyond the
            requests' tokens are padding.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    keys = np.where((slots < 0) | (slots >= max_adapters), max_adapters, slots)
    order = np.argsort(keys, kind="stable")
    tokens = int(counts.sum())
    out[0] = 0
    np.cumsum(
        np.bincount(keys, weights=counts, minlength=max_adapters + 1)[:max_adapters], out=out[1 : max_adapters + 1]
    )
    permutation = out[max_adapters + 1 :]
    # The tokens of a request are neighbours, so sorting requests sorts tokens: each goes where its request begins.
    starts = np.cumsum(counts) - counts
    sorted_counts = counts[order]
    shift = starts[order] - (np.cumsum(sorted_counts) - sorted_counts)
    np.add(np.arange(tokens), np.repeat(shift, sorted_counts), out=permutation[:tokens], casting="unsafe")
    permutation[tokens:] = np.arange(tokens, len(permutation))
