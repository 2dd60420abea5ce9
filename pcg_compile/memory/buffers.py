"""Static memory: flat storages at fixed addresses, shared by all buckets."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

__all__ = ["FlatBuffers", "extent"]


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The number of elements from the first to past the last that a strided tensor touches."""
    if any(size == 0 for size in shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class FlatBuffers:
    """One flat storage per slot, grown to the largest tensor that was ever asked of it.

    A tensor handed out keeps its address for as long as somebody holds it: growing makes a new storage, and
    what was captured on the old one goes on using it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._storages: dict[Hashable, torch.Tensor] = {}

    def tensor(self, slot: Hashable, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the given shape and strides (in elements) at the start of the slot's storage."""
        needed = extent(shape, strides) * dtype.itemsize
        flat = self._storages.get(slot)
        if torch.is_inference_mode_enabled():
            # Not an inference tensor, whatever mode the caller is in: later steps must be able to write it.
            with torch.inference_mode(False), torch.no_grad():
                return self.tensor(slot, shape, strides, dtype)
        if flat is None or flat.numel() < needed:
            flat = self._storages[slot] = torch.zeros(max(needed, 16), dtype=torch.uint8, device=self.device)
        usable = flat[: flat.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        return usable.as_strided(tuple(shape), tuple(strides))
