"""The op that adds each token's adapter: ``pcg::lora_apply``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .plain import add_adapters

__all__ = ["lora_apply"]

_LIBRARY = torch.library.Library("pcg", "FRAGMENT")
_LIBRARY.define(
    "lora_apply(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor scalings, Tensor ranks, Tensor permutation, "
    "Tensor seg_indptr, int[] slices) -> ()"
)


def lora_apply(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scalings: torch.Tensor, ranks: torch.Tensor,
    permutation: torch.Tensor, seg_indptr: torch.Tensor, slices: Sequence[int],
) -> None:  # fmt: skip
    add_adapters(y, x, a, b, scalings, ranks, permutation, seg_indptr, slices)


_LIBRARY.impl("lora_apply", lora_apply, "CompositeExplicitAutograd")
torch.library.register_fake("pcg::lora_apply", lambda *args: None, lib=_LIBRARY)
