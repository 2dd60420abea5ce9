"""LoRA in plain PyTorch, for CPU runs: every adapter over all tokens, without looking at what they hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["add_adapters"]


def add_adapters(
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
    """:func:`pcg_compile.lora.apply.lora_apply` on rows: ``y [n, out]``, ``x [n, in]``."""
    tokens, max_rank = len(permutation), b.shape[2]
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    place = torch.empty_like(permutation)
    place[permutation.long()] = torch.arange(tokens, dtype=place.dtype, device=place.device)
    columns = torch.arange(max_rank, device=x.device)
    inputs = x.to(dtype)
    for slot in range(a.shape[0]):
        mine = ((place >= seg_indptr[slot]) & (place < seg_indptr[slot + 1]))[:, None]
        used = columns < ranks[slot]
        first = 0
        for j, width in enumerate(slices):
            down = torch.where(used[:, None], a[slot, j * max_rank : (j + 1) * max_rank].to(dtype), 0)
            up = torch.where(used, b[slot, first : first + width].to(dtype), 0)
            part = y[:, first : first + width]
            added = part.to(dtype) + (inputs @ down.t()) @ up.t() * scalings[slot]
            part.copy_(torch.where(mine, added.to(y.dtype), part))
            first += width
