"""Which implementation computes an attention shape."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import OptionsError, message
from . import flashinfer, reference, triton
from .base import AttentionImpl, AttentionShape

__all__ = ["BACKENDS", "choose_impl"]

WhyNot = Callable[[AttentionShape, torch.device, torch.dtype], "str | None"]

#: Values of the option ``attention_backend`` beside "auto": what computes it, and why it does not on a device.
BACKENDS: dict[str, tuple[Callable[[], type[AttentionImpl]], WhyNot]] = {
    "triton": (lambda: triton.TritonAttention, triton.why_not),
    "flashinfer": (flashinfer.implementation, flashinfer.why_not),
    "reference": (lambda: reference.ReferenceAttention, reference.why_not),
}


def choose_impl(
    shape: AttentionShape, device: torch.device, kv_dtype: torch.dtype | None = None
) -> tuple[type[AttentionImpl], str | None]:
    """The implementation for a shape, and why it is not the one that the device is meant to have, or None.

    ``kv_dtype`` is the cache's; None: the shape's.

    "auto" is Triton on CUDA, FlashInfer where Triton cannot, else plain PyTorch; on other devices plain PyTorch.

    Raises:
        OptionsError: the backend that the options name cannot compute the shape here.
    """
    kv_dtype = shape.dtype if kv_dtype is None else kv_dtype
    if shape.backend != "auto":
        kind, why_not = BACKENDS[shape.backend]
        reason = why_not(shape, device, kv_dtype)
        if reason is not None:
            raise OptionsError(
                message(
                    f"attention_backend={shape.backend!r} cannot compute this attention",
                    why=reason,
                    cure='Write: options={"attention_backend": "auto"}',
                )
            )
        return kind(), None
    reasons = []
    if device.type == "cuda":
        for name in ("triton", "flashinfer"):
            kind, why_not = BACKENDS[name]
            reason = why_not(shape, device, kv_dtype)
            if reason is None:
                return kind(), None
            reasons.append(reason)
    reason = reference.why_not(shape, device, kv_dtype)
    if reason is not None:
        raise OptionsError(message("nothing computes this attention", why="; ".join([*reasons, reason])))
    return reference.ReferenceAttention, "; ".join(reasons) or None
