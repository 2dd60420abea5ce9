"""Which implementation can compute an attention shape."""

from __future__ import annotations

import torch

from ..errors import OptionsError, message
from .base import AttentionImpl, AttentionShape
from .flashinfer import FlashInferAttention
from .reference import ReferenceAttention
from .triton import TritonAttention

__all__ = ["BACKENDS", "candidates", "choose_impl"]

#: Values of the option ``attention_backend`` beside "auto", in the order of preference.
BACKENDS: dict[str, type[AttentionImpl]] = {
    kind.name: kind for kind in (TritonAttention, FlashInferAttention, ReferenceAttention)
}


def candidates(
    shape: AttentionShape, device: torch.device, kv_dtype: torch.dtype
) -> tuple[list[type[AttentionImpl]], list[str]]:
    """What may compute a shape, the likely fastest first, and why others do not; plain PyTorch where nothing else does.

    Raises:
        OptionsError: the backend that the options name cannot compute the shape here, or nothing can.
    """
    if shape.backend != "auto":
        reason = BACKENDS[shape.backend].why_not(shape, device, kv_dtype)
        if reason is None:
            return [BACKENDS[shape.backend]], []
        what = f"attention_backend={shape.backend!r} cannot compute this attention"
        raise OptionsError(message(what, why=reason, cure='Write: options={"attention_backend": "auto"}'))
    found: list[type[AttentionImpl]] = []
    reasons = []
    kinds: list[type[AttentionImpl]] = [kind for kind in BACKENDS.values() if device.type in kind.auto_on]
    kinds.append(ReferenceAttention)
    for kind in kinds:
        if found and kind is ReferenceAttention:
            break
        reason = kind.why_not(shape, device, kv_dtype)
        if reason is None:
            found.append(kind)
        else:
            reasons.append(reason)
    if not found:
        raise OptionsError(message("nothing computes this attention", why="; ".join(reasons)))
    return found, reasons


def choose_impl(
    shape: AttentionShape, device: torch.device, kv_dtype: torch.dtype | None = None
) -> tuple[type[AttentionImpl], str | None]:
    """The implementation for a shape before anything is measured, and why it is not a fast one, or None.

    Args:
        kv_dtype: the cache's; None: the shape's.

    Raises:
        OptionsError: see :func:`candidates`.
    """
    found, reasons = candidates(shape, device, shape.dtype if kv_dtype is None else kv_dtype)
    return found[0], ("; ".join(reasons) or None) if found[0] is ReferenceAttention else None
