"""LoRA in plain PyTorch, for CPU runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["add_adapters"]


def add_adapters(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scalings: torch.Tensor, ranks: torch.Tensor,
    permutation: torch.Tensor, seg_indptr: torch.Tensor, slices: Sequence[int],
) -> None:  # fmt: skip
    rows_y, rows_x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    rank = b.shape[2]
    place = torch.empty_like(permutation)
    place[permutation.long()] = torch.arange(len(permutation), dtype=place.dtype, device=place.device)
    for slot in range(a.shape[0]):
        mine = (place >= seg_indptr[slot]) & (place < seg_indptr[slot + 1])
        used = torch.arange(rank, device=x.device) < ranks[slot]
        column = 0
        for j, width in enumerate(slices):
            down = torch.where(used[:, None], a[slot, j * rank : (j + 1) * rank].float(), 0)
            up = torch.where(used, b[slot, column : column + width].float(), 0)
            delta = (rows_x.float() @ down.t()) @ up.t() * scalings[slot]
            rows_y[:, column : column + width] += torch.where(mine[:, None], delta, 0).to(y.dtype)
            column += width
