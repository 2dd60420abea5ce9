"""Tokens of an image that see each other, as Gemma 3 has them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...batch import Batch
from ...errors import BatchError, message

__all__ = ["check_images", "has_image_blocks", "image_groups"]


def has_image_blocks(model: Any) -> bool:
    """Whether a model lets neighbours of token type 1 see each other, by its ``token_type_ids``."""
    return hasattr(sys.modules[type(model).__module__], "get_block_sequence_ids_for_mask")


def image_groups(token_type_ids: torch.Tensor | Sequence[int], qo_lens: Sequence[int]) -> list[int]:
    """The ``groups`` of a :class:`pcg_compile.Batch`: a number for each image block, -1 for other tokens.

    All tokens of an image belong in one step: those of a later step are unknown to it.

    Args:
        token_type_ids: of the new tokens of all requests, one request after the other; 1 for those of an image.
        qo_lens: new tokens of each request.
    """
    image = np.asarray(torch.as_tensor(token_type_ids).cpu()).ravel() == 1
    begins = image.copy()
    begins[1:] &= ~image[:-1]
    first = np.cumsum([0, *qo_lens[:-1]])
    begins[first] = image[first]
    return [int(group) for group in np.where(image, np.cumsum(begins) - 1, -1)]


def check_images(name: str, batch: Batch, token_type_ids: torch.Tensor, window: int | None) -> None:
    """Raises :class:`BatchError` where the batch's groups are not the model's image blocks."""
    wanted = Batch(batch.qo_lens, batch.kv_lens, groups=image_groups(token_type_ids, batch.qo_lens)).spans
    assert wanted is not None
    lengths = wanted[:, 1] - wanted[:, 0] + 1
    given = batch.spans
    if not np.array_equal(wanted, given) if given is not None else lengths.max() > 1:
        raise BatchError(
            message(
                f"{name} got token_type_ids with image tokens that the batch does not have as groups",
                why="Tokens of an image see each other: the step's attention takes that from the batch.",
                cure="Write: pcg.Batch(..., groups=image_groups(token_type_ids, qo_lens)); image_groups is in "
                "pcg_compile.integrations.transformers",
            )
        )
    if window is not None and lengths.max() > window:
        raise BatchError(f"{name} has an image of {lengths.max()} tokens, which a window of {window} would cut")
