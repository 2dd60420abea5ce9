"""The padding request: a batch with one more request that fills it up to a bucket."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from .errors import BatchError, message
from .metadata import MOST, Ints, check_count
from .page_tables import Tables

__all__ = ["Layout", "PaddedBatch"]


class Layout:
    """Where the int32 arrays of a padded batch lie, one after the other; each begins at a multiple of 16 bytes.

    Attributes:
        requests: those of the batch, the padding request and unused entries. pad, pad_pages: of the padding request.
        starts, sizes: of qo_indptr, kv_indptr, last_page_len, kv_lens and kv_indices. words: all of them.
        spare: whether kv_indices hold the pages to spare, too.
    """

    __slots__ = ("bucket", "pad", "pad_pages", "requests", "sizes", "spare", "starts", "words")

    def __init__(self, tables: Tables, bucket: int, entries: int | None = None, spare: bool = False) -> None:
        """
        Raises:
            BatchError: ``bucket`` is smaller than the number of tokens, or ``entries`` than the number of requests.
        """
        bucket = check_count("bucket", bucket)
        tokens = len(tables.positions)
        pad = bucket - tokens
        if pad < 0:
            raise BatchError(
                message(f"the batch has {tokens} tokens, the bucket {bucket}", why="A bucket is at least the tokens.")
            )
        requests = len(tables.qo) + (pad > 0)
        if entries is not None:
            if entries < requests:
                raise BatchError(f"the batch has {requests} requests, its padding included, and {entries} slots")
            requests = entries
        self.bucket, self.pad, self.requests = bucket, pad, requests
        self.pad_pages = -(-pad // tables.page_size)
        self.spare = spare and tables.listed_counts is not tables.counts
        listed = tables.listed if self.spare else tables.kv_indices
        indices = 0 if listed is None else len(listed) + self.pad_pages
        wide, narrow = (requests + 4) // 4 * 4, (requests + 3) // 4 * 4
        first = 2 * wide + 2 * narrow
        self.starts = (0, wide, 2 * wide, 2 * wide + narrow, first)
        self.sizes = (requests + 1, requests + 1, requests, requests, indices)
        self.words = first + indices

    def fill(self, flat: Ints, tables: Tables) -> None:
        """Writes the arrays to ``flat`` ``[words]`` int32, which holds anything.

        With pages to spare, kv_indptr says where the pages of a request begin, and kv_lens how many of them count.
        """
        real, requests, bucket, pad = len(tables.qo), self.requests, self.bucket, self.pad
        _, wide, last_at, lens_at, first = self.starts
        counts, listed = tables.counts, tables.kv_indices
        if self.spare:
            counts, listed = tables.listed_counts, tables.listed
        flat[:first] = 0
        # Not into int32 at once: numpy takes four times as long to sum and convert in one call.
        decodes = len(tables.positions) == real <= len(_COUNT)
        flat[1 : real + 1] = _COUNT[:real] if decodes else np.add.accumulate(tables.qo)
        flat[wide + 1 : wide + real + 1] = ends = np.add.accumulate(counts)
        flat[lens_at : lens_at + real] = tables.kv
        # (kv - 1) % page_size + 1
        flat[last_at : last_at + real] = tables.kv - (tables.counts - 1) * tables.page_size
        if requests > real:
            # The padding request, and unused entries behind it, which have no tokens and no pages.
            flat[real + 1 : requests + 1] = bucket
            flat[wide + real + 1 : wide + requests + 1] = (int(ends[-1]) if real else 0) + self.pad_pages
        if pad:
            flat[lens_at + real] = pad
            flat[last_at + real] = (pad - 1) % tables.page_size + 1
        if listed is not None:
            flat[first : first + len(listed)] = listed
            flat[first + len(listed) : self.words] = 0
        if int(flat[requests]) != bucket:
            raise BatchError(f"the padded query lengths add up to {flat[requests]}, not to the bucket {bucket}")


#: 1, 2, 3, ...: the ends of requests of one token.
_COUNT = np.arange(1, 1 << 16, dtype=np.int32)


class PaddedBatch:
    """A batch padded to a bucket by one more request, as int32 arrays on the host.

    For ``pad = bucket - tokens > 0`` the last request has query length ``pad`` and KV length ``pad``, all its
    pages are page 0, and its tokens have slot 0. With r requests, the padding request included:

    Attributes:
        bucket, tokens, page_size, requests: numbers; ``requests`` counts the padding request.
        request_slots: the fixed number of requests, those of no length included, or None.
        flat: int32, all arrays below but the slots one after the other.
        qo_indptr, kv_indptr: ``[r + 1]`` int32 tensors. last_page_len, kv_lens: ``[r]``.
        kv_indices: ``[kv_indptr[-1]]``, None for a batch without a page table.
        slot_mapping: ``[bucket]``, None for a batch without a page table.
    """

    def __init__(self, tables: Tables, bucket: int, slots: int | None = None) -> None:
        """
        Raises:
            BatchError: ``bucket`` is smaller than the number of tokens, or ``slots`` than the number of requests.
        """
        layout = Layout(tables, bucket, slots)
        self.bucket, self.page_size, self.requests = layout.bucket, tables.page_size, layout.requests
        self.tokens, self.request_slots = len(tables.positions), slots
        self.starts, self.sizes = layout.starts, layout.sizes
        self._tables = tables
        self.flat = np.empty(layout.words, dtype=np.int32)
        layout.fill(self.flat, tables)

    def array(self, index: int) -> Ints:
        """One of the arrays of ``flat``: 0 qo_indptr, 1 kv_indptr, 2 last_page_len, 3 kv_lens, 4 kv_indices."""
        return self.flat[self.starts[index] : self.starts[index] + self.sizes[index]]

    @property
    def slots(self) -> Ints:
        """``[tokens]`` int64: the slots of the real tokens."""
        assert self._tables.slots is not None
        return self._tables.slots

    @cached_property
    def qo_indptr(self) -> torch.Tensor:
        return torch.from_numpy(self.array(0))

    @cached_property
    def kv_indptr(self) -> torch.Tensor:
        return torch.from_numpy(self.array(1))

    @cached_property
    def last_page_len(self) -> torch.Tensor:
        return torch.from_numpy(self.array(2))

    @cached_property
    def kv_lens(self) -> torch.Tensor:
        return torch.from_numpy(self.array(3))

    @cached_property
    def kv_indices(self) -> torch.Tensor | None:
        return None if self._tables.kv_indices is None else torch.from_numpy(self.array(4))

    @cached_property
    def slot_mapping(self) -> torch.Tensor | None:
        if self._tables.slots is None:
            return None
        if int(self._tables.slots.max(initial=0)) > MOST:
            raise BatchError(
                message(f"slot {self._tables.slots.max()} is in use", why=f"Slots are int32, up to {MOST}.")
            )
        slots = np.zeros(self.bucket, dtype=np.int32)
        slots[: self.tokens] = self._tables.slots
        return torch.from_numpy(slots)
