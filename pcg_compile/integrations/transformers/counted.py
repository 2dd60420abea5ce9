"""Positions for layers that count them by themselves, from the cache of the call."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["CountedPositions", "counts_positions"]


def counts_positions(config: Any) -> bool:
    """Whether layers scale queries by positions that they count by themselves, as those of Llama 4 without rotation."""
    layers = getattr(config, "no_rope_layers", None) or [1]
    return bool(getattr(config, "attn_temperature_tuning", None)) and not all(layers)


class CountedPositions:
    """Stands for the cache of a call: holds no keys, and tells each token's position.

    A layer that counts takes ``arange(tokens) + cache.get_seq_length()``. The length is a tensor here, one number a
    token, so the sum is the step's positions.

    Attributes:
        positions: ``[1, tokens]``.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self.positions = positions

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """What is to be added to 0, 1, 2, ... for the positions."""
        positions = self.positions[0]
        return positions - torch.arange(positions.shape[0], device=positions.device)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """For masks, of which the rule alone is read."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """For masks, of which the rule alone is read."""
        return query_length, 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values alone: the step's cache takes them."""
        return keys, values
