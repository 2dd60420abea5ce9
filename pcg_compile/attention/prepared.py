"""The metadata of one step on the device."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from ..batch import Batch
from ..padding_request import Layout, PaddedBatch

__all__ = ["Prepared"]


class Prepared:
    """The metadata of one batch on the device. Valid while ``cache.current`` is this object.

    The batches that :meth:`Batch.advance` makes of it take it over: see Note [advance].

    Attributes:
        batch: whose metadata they are. made_for: bucket, rows and request entries (None: as many as there are).
        static: whether all of it lies at addresses that stay.
        bucket: tokens that ``slots`` covers. rows: of q that are attended. requests: entries in the metadata.
        longest: most new tokens of a request. spans: ``[rows, 2]`` int32 on the device, positions from and up to which
            a token sees keys beside those of the mask; None where the batch has none.
        slots: ``[bucket]`` int64, static. tokens: ``[3, tokens]`` int64, slots, positions and ids. copied: of these the
            last two.
        arrays: int32 on the cache's device, in the order of ``padded.array()``; kv_indices with room behind them. With
            ``spare`` pages, kv_indptr says where the pages of a request begin, kv_lens how many count.
        last: age of the last batch that the listed pages have room for.
        plans: by attention shape, what computes it and what that planned. enqueued: shapes whose plan's work on the
            device is under way.
    """

    def __init__(
        self, batch: Batch, made_for: tuple[int, int, int | None], layout: Layout, page_size: int, slots: torch.Tensor,
        tokens: tuple[torch.Tensor, torch.Tensor], arrays: tuple[torch.Tensor, ...], static: bool,
    ) -> None:  # fmt: skip
        self.batch, self.made_for, self.slots, self.arrays = batch, made_for, slots, arrays
        self.tokens, self.copied = tokens
        self.bucket, self.rows, _ = made_for
        self.static, self.requests, self.spare = static, layout.requests, layout.spare
        self.longest = batch.longest
        self.last = batch.age
        self.spans: torch.Tensor | None = None
        self.plans: dict[str, tuple[Any, Any]] = {}
        self.enqueued: set[str] = set()
        self._sizes, self._page_size = layout.sizes, page_size

    def array(self, index: int) -> torch.Tensor:
        """On the device, what ``padded.array(index)`` is on the host, where no pages are to spare."""
        return self.arrays[index][: self._sizes[index]]

    @cached_property
    def padded(self) -> PaddedBatch:
        """The same on the host, for attention that plans there."""
        return self.batch.padded(self.rows, self._page_size, self.made_for[2])
