"""Which implementation computes an attention shape."""

from __future__ import annotations

import torch

from . import flashinfer
from .base import AttentionImpl, AttentionShape
from .reference import ReferenceAttention

__all__ = ["choose_impl"]


def choose_impl(shape: AttentionShape, device: torch.device) -> tuple[type[AttentionImpl], str | None]:
    """FlashInfer on CUDA where it can, else plain PyTorch with the reason; on other devices plain PyTorch.

    The reason is None where the implementation is the one that the device is meant to have.
    """
    if device.type != "cuda":
        return ReferenceAttention, None
    reason = flashinfer.why_not(shape, device)
    if reason is not None:
        return ReferenceAttention, reason
    return flashinfer.FlashInferAttention, None
