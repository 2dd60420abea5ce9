"""The padding request: a batch with one more request that fills it up to a bucket."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from .errors import BatchError, message
from .metadata import MOST, Ints, Tables, check_count

__all__ = ["PaddedBatch"]


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
        spans: ``[tokens, 2]`` int32 array, positions from and up to which each token sees keys beside those of the
            mask; None where there are no groups.
    """

    def __init__(self, tables: Tables, bucket: int, slots: int | None = None, spans: Ints | None = None) -> None:
        """
        Raises:
            BatchError: ``bucket`` is smaller than the number of tokens, or ``slots`` than the number of requests.
        """
        bucket = check_count("bucket", bucket)
        tokens, page_size, real = len(tables.positions), tables.page_size, len(tables.qo)
        pad = bucket - tokens
        if pad < 0:
            raise BatchError(
                message(f"the batch has {tokens} tokens, the bucket {bucket}", why="A bucket is at least the tokens.")
            )
        requests = real + (pad > 0)
        if slots is not None:
            if slots < requests:
                raise BatchError(f"the batch has {requests} requests, its padding included, and {slots} slots")
            requests = slots
        self.request_slots, self.spans = slots, spans
        pad_pages = -(-pad // page_size)
        indices = 0 if tables.kv_indices is None else len(tables.kv_indices) + pad_pages
        self.bucket, self.page_size, self.requests, self.tokens = bucket, page_size, requests, tokens
        self._tables = tables
        # Every array begins at a multiple of 16 bytes.
        wide, narrow = (requests + 4) // 4 * 4, (requests + 3) // 4 * 4
        first = 2 * wide + 2 * narrow
        self.starts = (0, wide, 2 * wide, 2 * wide + narrow, first)
        self.sizes = (requests + 1, requests + 1, requests, requests, indices)
        flat = self.flat = np.zeros(first + indices, dtype=np.int32)
        qo, kv = flat[: requests + 1], flat[wide : wide + requests + 1]
        last, lens = flat[2 * wide : 2 * wide + requests], flat[2 * wide + narrow : first]
        # Not into int32 at once: numpy takes four times as long to sum and convert in one call.
        qo[1 : real + 1] = np.add.accumulate(tables.qo)
        kv[1 : real + 1] = np.add.accumulate(tables.counts)
        lens[:real] = tables.kv
        # (kv - 1) % page_size + 1
        last[:real] = tables.kv - (tables.counts - 1) * page_size
        if requests > real:
            # The padding request, and unused slots behind it, which have no tokens and no pages.
            qo[real + 1 :] = bucket
            kv[real + 1 :] = kv[real] + pad_pages
        if pad:
            lens[real] = pad
            last[real] = (pad - 1) % page_size + 1
        if tables.kv_indices is not None:
            flat[first : first + len(tables.kv_indices)] = tables.kv_indices
        if int(qo[requests]) != bucket:
            raise BatchError(f"the padded query lengths add up to {qo[requests]}, not to the bucket {bucket}")

    def array(self, index: int) -> Ints:
        """One of the arrays of ``flat``: 0 qo_indptr, 1 kv_indptr, 2 last_page_len, 3 kv_lens, 4 kv_indices."""
        return self.flat[self.starts[index] : self.starts[index] + self.sizes[index]]

    @property
    def longest(self) -> int:
        """Most new tokens of a real request; 0 where there is none."""
        qo = self._tables.qo
        return int(qo.max(initial=0)) if len(qo) != self.tokens else min(1, len(qo))

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
