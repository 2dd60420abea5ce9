"""The static device memory that a step's metadata go to."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch

from ..batch import Batch
from ..memory.staging import StagingRing
from ..metadata import Ints
from ..padding_request import Layout
from ..page_tables import Tables
from .advance import advance
from .prepared import Prepared

__all__ = ["StepMetadata"]

#: Words that the size of a step's metadata is rounded up to.
_ROUND = 64
#: Sets of views kept, and sizes whose last bucket is remembered.
_MOST_KEPT = 4096


class StepMetadata:
    """What a cache does for the steps that it serves, one at a time: it brings their metadata to the device.

    The metadata of a step are one block, which one copy from pinned memory brings to the device: slots, positions and
    ids of its tokens, lengths and pages of its requests. There is one block for each power of two of tokens, at an
    address that stays as long as the cache. Where a batch has more than ``max_requests`` requests, or more page entries
    than fit, what attention reads goes to a buffer that doubles; then no full CUDA graph can serve it.

    Note [advance]
    The decode step that follows another one on the same pages differs from it by one token a request. While the pages
    listed in the block have room, it is made of the block on the device, in one launch: nothing is read or written on
    the host. So a request should be given pages ahead. Attention takes part by ``plan_lasts`` (its plan reads what
    changes from the device), or plans again; attention that needs exact page lists (``exact_pages``) has the block
    written anew in each step.
    """

    def __init__(self, num_pages: int, page_size: int, max_requests: int, device: torch.device) -> None:
        self.num_pages, self.page_size, self.max_requests, self.device = num_pages, page_size, max_requests, device
        self.staging = StagingRing(device)
        self.current: Prepared | None = None
        #: By capacity in tokens: the block, and its slots, positions and ids, ``[3, capacity]`` int64.
        self._areas: dict[int, torch.Tensor] = {}
        self._tokens: dict[int, torch.Tensor] = {}
        #: Views of blocks, by the words or the tokens that they begin with.
        self._heads: dict[tuple[int, int], torch.Tensor] = {}
        self._rows: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._mappings: dict[int, torch.Tensor] = {}
        #: Views of the other arrays, by capacity and number of requests.
        self._arrays: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
        #: By number of tokens, what metadata were last made for: the next step is likely to want the same.
        self.made_for: dict[int, tuple[int, int, int | None]] = {}
        #: What metadata were made for, and the keys of captures, that attention has planned once.
        self.planned: set[Hashable] = set()
        #: Whether attention needs page lists without pages to spare.
        self.exact_pages = False
        self._overflow: torch.Tensor | None = None
        #: The kernel of :func:`advance`.
        self._kernel: Any = None
        self._spans: dict[int, torch.Tensor] = {}

    def slot_mapping(self, bucket: int) -> torch.Tensor:
        """``[bucket]`` int64: the slot of every token, 0 for padding. Its address never changes."""
        mapping = self._mappings.get(bucket)
        if mapping is None:
            capacity = _capacity(bucket)
            self._area(capacity)
            mapping = self._mappings[bucket] = self._tokens[capacity][0, :bucket]
        return mapping

    def _area(self, capacity: int) -> torch.Tensor:
        area = self._areas.get(capacity)
        if area is None:
            requests = min(capacity, self.max_requests) + 1
            # Room for prefixes that requests share, and for pages to spare.
            pages = 2 * self.num_pages + 8 * requests
            words = 6 * capacity + 4 * (requests + 4) + pages - (-capacity // self.page_size) + _ROUND
            with torch.inference_mode(False):
                area = self._areas[capacity] = torch.zeros(words, dtype=torch.int32, device=self.device)
                self._tokens[capacity] = area.narrow(0, 0, 6 * capacity).view(torch.int64).view(3, capacity)
        return area

    def tables(self, batch: Batch) -> Tables:
        """The batch in pages of this cache.

        Raises:
            BatchError: it does not fit them.
        """
        tables = batch.tables(self.page_size)
        tables.check_limit(self.num_pages)
        return tables

    def check_batch(self, batch: Batch) -> None:
        """Raises :class:`BatchError` where a batch does not fit the cache."""
        if not self._follows(batch):
            self.tables(batch)

    def _follows(self, batch: Batch) -> bool:
        """Whether the block holds the batch, or one that the batch comes from by advancing within the listed pages."""
        current = self.current
        return (
            current is not None and current.batch.line is batch.line and current.batch.age <= batch.age <= current.last
        )

    def prepare(self, batch: Batch, made_for: tuple[int, int, int | None], again: bool) -> Prepared:
        """Brings a batch's metadata to the device, unless they are there. What was prepared before is invalid.

        Args:
            made_for: tokens that pieces see, which get slot 0 from the real tokens on; rows that attention sees, those
                of the padding request included; entries for requests, None for as many as there are.
            again: whether to write what is there already.
        """
        current = self.current
        if not again and current is not None and current.made_for == made_for and self._follows(batch):
            self._advance(current, batch)
            return current
        if batch.num_requests:
            self.made_for[batch.num_tokens] = made_for
        if len(self.made_for) > _MOST_KEPT:
            self.made_for.clear()
        return self._write(batch, made_for, again)

    def _advance(self, prepared: Prepared, batch: Batch) -> None:
        """See Note [advance]."""
        steps = batch.age - prepared.batch.age
        prepared.enqueued.clear()
        if not steps:
            return
        _, kv_indptr, _, kv_lens, kv_indices = prepared.arrays
        numbers = (batch.num_requests, steps, self.page_size)
        self._kernel = advance(prepared.tokens, kv_lens, kv_indptr, kv_indices, *numbers, self._kernel)
        prepared.batch = batch
        prepared.__dict__.pop("padded", None)
        prepared.plans = {text: planned for text, planned in prepared.plans.items() if planned[0].plan_lasts}

    def _write(self, batch: Batch, made_for: tuple[int, int, int | None], forced: bool) -> Prepared:
        bucket, rows, entries = made_for
        tables, capacity = self.tables(batch), _capacity(bucket)
        layout = Layout(tables, rows, entries, spare=not self.exact_pages)
        # A batch of padding has none.
        area, begin, tokens = self._area(capacity), 6 * capacity, len(tables.positions)
        words = begin + layout.words
        # A little more is copied than there is, so steps of about one size share their views, which cost as much
        # as the copy.
        rounded = -(-words // _ROUND) * _ROUND
        static = rounded <= area.numel()
        buffer = self.staging.take(4 * rounded)
        longs = buffer.long_array
        if tables.slots is not None:
            longs[:tokens] = tables.slots
        longs[tokens:capacity] = 0
        longs[capacity : capacity + tokens] = tables.positions
        if batch.host_ids is not None:
            longs[2 * capacity : 2 * capacity + tokens] = batch.host_ids
        layout.fill(buffer.word_array[begin:words], tables)
        if static:
            head = self._heads.get((capacity, rounded))
            if head is None:
                head = self._heads[capacity, rounded] = area[:rounded]
            head.copy_(buffer.first(rounded, longs=False), True)
            arrays = self._arrays.get((capacity, layout.requests))
            if arrays is None:
                arrays = self._arrays[capacity, layout.requests] = _split(area[begin:], layout)
        else:
            area[:begin].copy_(buffer.words[:begin], non_blocking=True)
            device = self._overflow_of(layout.words)
            device.copy_(buffer.words[begin:words], non_blocking=True)
            arrays = _split(device, layout)
        buffer.sent()
        views = self.slot_mapping(bucket), self._first(capacity, tokens), arrays
        prepared = Prepared(batch, made_for, layout, self.page_size, *views, static)
        if batch.spans is not None:
            prepared.spans = self._write_spans(batch.spans, rows, capacity)
        if forced:
            # It is to look like another batch, and serves no other step.
            prepared.last = -1
        elif not self.exact_pages and prepared.longest == 1 and batch.spans is None:
            prepared.last += tables.room
        self.current = prepared
        return prepared

    def _first(self, capacity: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots, positions and ids of so many tokens; the last two."""
        views = self._rows.get((capacity, tokens))
        if views is None:
            if len(self._rows) >= _MOST_KEPT:
                self._rows.clear()
            every = self._tokens[capacity][:, :tokens]
            views = self._rows[capacity, tokens] = every, every[1:]
        return views

    def _write_spans(self, spans: Ints, rows: int, capacity: int) -> torch.Tensor:
        """Spans of all rows, those of the padding request its own positions; at an address that stays."""
        area = self._spans.get(capacity)
        if area is None:
            with torch.inference_mode(False):
                area = self._spans[capacity] = torch.zeros((capacity, 2), dtype=torch.int32, device=self.device)
        own = np.arange(rows - len(spans), dtype=np.int32)[:, None].repeat(2, 1)
        self.staging.send(np.concatenate([spans, own]), area[:rows])
        return area[:rows]

    def _overflow_of(self, words: int) -> torch.Tensor:
        if self._overflow is None or self._overflow.numel() < words:
            with torch.inference_mode(False):
                self._overflow = torch.zeros(1 << (words - 1).bit_length(), dtype=torch.int32, device=self.device)
        return self._overflow.narrow(0, 0, words)


def _split(device: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, ...]:
    *fixed, indices = layout.starts
    return (*(device[start : start + size] for start, size in zip(fixed, layout.sizes, strict=False)), device[indices:])


def _capacity(bucket: int) -> int:
    """Tokens that the storage for a bucket's slots holds: a power of two."""
    return max(16, 1 << (bucket - 1).bit_length())
