"""The arithmetic of a ragged batch, on the host: positions, pages, slots, and the padding request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import BatchError, message

__all__ = ["PageTable", "PaddedBatch", "Tables", "make_tables", "pad_tables", "positions_of", "read_lengths"]

Ints = npt.NDArray[Any]


def read_lengths(name: str, values: Any) -> Ints:
    """``[requests]`` int64 from a sequence, an array or a CPU tensor of whole numbers of at least 1.

    Raises:
        BatchError: anything else, naming the request and the figure.
    """
    array = _integers(name, values)
    if array.ndim != 1:
        raise BatchError(message(f"{name} has {array.ndim} dimensions", why="It is one number a request."))
    if array.size and int(array.min()) < 1:
        request = int(np.argmin(array))
        raise BatchError(
            message(
                f"request {request} has {name}[{request}] = {array[request]}",
                why="A request of a batch has at least one token.",
                cure="Leave requests without tokens out of the batch.",
            )
        )
    return array.astype(np.int64, copy=False)


def _integers(name: str, values: Any) -> Ints:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(
            message(f"{name} is no list of whole numbers on the host", why=str(error).splitlines()[0])
        ) from None
    if array.size and array.dtype.kind not in "iu":
        raise BatchError(
            message(f"{name} holds {array.dtype} values", why="It holds whole numbers.", cure=f"Write: {name}=[1, 1, 57]")
        )
    return array


class PageTable:
    """The pages of all requests in one flat array.

    Attributes:
        flat: ``[entries]`` int32.
        starts, counts: ``[requests]`` int64, where each request's pages begin and how many are given.
    """

    __slots__ = ("counts", "flat", "starts")

    def __init__(self, table: Any, requests: int) -> None:
        """``table``: a sequence of pages for each request, or an int array ``[requests, most pages]`` whose unused
        entries may hold anything.

        Raises:
            BatchError: another number of rows than requests, a page below 1 in a sequence.
        """
        if isinstance(table, (np.ndarray, torch.Tensor)):
            array = _integers("page_table", table)
            if array.ndim != 2:
                raise BatchError(message(f"page_table has {array.ndim} dimensions", why="It is [requests, most pages]."))
            self.flat = np.ascontiguousarray(array, dtype=np.int32).ravel()
            self.counts = np.full(array.shape[0], array.shape[1], dtype=np.int64)
        else:
            try:
                self.counts = np.fromiter(map(len, table), np.int64)
                self.flat = _integers("page_table", list(chain.from_iterable(table))).astype(np.int32)
            except TypeError:
                raise BatchError(
                    message("page_table is no list of lists", cure="Write: page_table=[[3, 4], [5]]")
                ) from None
        if len(self.counts) != requests:
            raise BatchError(f"page_table has {len(self.counts)} rows for {requests} requests")
        self.starts = _exclusive(self.counts)
        if not isinstance(table, (np.ndarray, torch.Tensor)):
            _check_pages(self.flat, self.counts, None)


def _exclusive(counts: Ints) -> Ints:
    sums = np.zeros_like(counts)
    np.cumsum(counts[:-1], out=sums[1:])
    return sums


def _check_pages(pages: Ints, counts: Ints, limit: int | None) -> None:
    """Every page is at least 1 and below ``limit``; ``pages`` are ``counts[i]`` of each request i."""
    if not pages.size:
        return
    if int(pages.min()) < 1:
        at = int(np.argmin(pages))
        why = "Page 0 is the scratch page: padding tokens are written there." if pages[at] == 0 else None
        raise BatchError(
            message(
                f"request {_owner(at, counts)} uses page {pages[at]}",
                why=why,
                cure="Give requests pages from 1 on, as cache.allocate() does.",
            )
        )
    if limit is not None and int(pages.max()) >= limit:
        at = int(np.argmax(pages))
        raise BatchError(
            message(
                f"request {_owner(at, counts)} uses page {pages[at]}; the cache has pages 1 to {limit - 1}",
                cure=f"Make the cache larger: PagedKVCache(num_pages={int(pages[at]) + 1}, ...)",
            )
        )


def _owner(at: int, counts: Ints) -> int:
    return int(np.searchsorted(np.cumsum(counts), at, side="right"))


def positions_of(qo: Ints, kv: Ints) -> Ints:
    """``[tokens]`` int64: the position of every token in its request."""
    ends = np.cumsum(qo)
    tokens = int(ends[-1]) if len(ends) else 0
    if tokens == len(qo):
        return kv - 1
    return np.arange(tokens) + np.repeat(kv - ends, qo)


@dataclass(frozen=True)
class Tables:
    """What a batch looks like in pages of one size.

    Attributes:
        page_size: tokens a page.
        qo, kv: ``[requests]`` int64 lengths.
        counts: ``[requests]`` pages in use.
        kv_indices: ``[sum(counts)]`` int32, None without a page table.
        positions: ``[tokens]`` int64.
        slots: ``[tokens]`` int64, ``page * page_size + offset``; None without a page table.
    """

    page_size: int
    qo: Ints
    kv: Ints
    counts: Ints
    kv_indices: Ints | None
    positions: Ints
    slots: Ints | None

    @cached_property
    def highest_page(self) -> int:
        """The highest page in use, 0 for none."""
        return int(self.kv_indices.max()) if self.kv_indices is not None and self.kv_indices.size else 0

    def check_limit(self, num_pages: int) -> None:
        """Raises :class:`BatchError` where a request uses a page that a cache of ``num_pages`` does not have."""
        if self.kv_indices is not None and self.highest_page >= num_pages:
            _check_pages(self.kv_indices, self.counts, num_pages)


def make_tables(qo: Ints, kv: Ints, pages: PageTable | None, page_size: int) -> Tables:
    """The tables of a batch.

    Raises:
        BatchError: fewer pages than a request's KV length needs, page 0 in use, a page that one request
            writes and another one uses too.
    """
    if page_size < 1:
        raise BatchError(f"page_size is {page_size}; it is at least 1")
    counts = -(-kv // page_size)
    positions = positions_of(qo, kv)
    if pages is None:
        return Tables(page_size, qo, kv, counts, None, positions, None)
    short = counts > pages.counts
    if short.any():
        request = int(np.argmax(short))
        raise BatchError(
            message(
                f"request {request} has {pages.counts[request]} pages and needs {counts[request]}",
                why=f"Its KV length, new tokens included, is {kv[request]}, and a page holds {page_size}.",
                cure="Extend its row of page_table: row += cache.allocate(1)",
            )
        )
    if np.array_equal(counts, pages.counts):
        used = pages.flat
    else:
        total = int(counts.sum())
        used = pages.flat[np.arange(total) + np.repeat(pages.starts - _exclusive(counts), counts)]
    _check_pages(used, counts, None)
    row_starts = pages.starts if len(positions) == len(qo) else np.repeat(pages.starts, qo)
    token_pages = pages.flat[row_starts + positions // page_size].astype(np.int64)
    offsets = positions % page_size
    _check_writes(used, counts, token_pages, qo)
    return Tables(page_size, qo, kv, counts, used, positions, token_pages * page_size + offsets)


def _check_writes(used: Ints, counts: Ints, token_pages: Ints, qo: Ints) -> None:
    """A page may be shared by requests that only read it (a common prefix), never where one writes."""
    order = np.sort(used)
    shared = order[1:][order[1:] == order[:-1]]
    if not shared.size:
        return
    written = np.isin(token_pages, shared)
    if written.any():
        token = int(np.argmax(written))
        page, writer = int(token_pages[token]), _owner(token, qo)
        users = sorted({_owner(int(at), counts) for at in np.flatnonzero(used == page)})
        other = next((user for user in users if user != writer), None)
        raise BatchError(
            message(
                f"request {writer} writes page {page}, "
                + (f"which request {other} uses too" if other is not None else "which its row lists twice"),
                why="Requests may share pages that none of them writes in this step.",
                cure="Give the request a page of its own for its new tokens.",
            )
        )


class PaddedBatch:
    """A batch padded to a bucket by one more request, as int32 arrays on the host.

    For ``pad = bucket - tokens > 0`` the last request has query length ``pad`` and KV length ``pad``, all its
    pages are page 0, and its tokens have slot 0. With r requests, the padding request included:

    Attributes:
        bucket, page_size, requests: numbers; ``requests`` counts the padding request.
        flat: int32, all arrays below but the slots one after the other.
        qo_indptr, kv_indptr: ``[r + 1]`` int32 tensors. last_page_len, kv_lens: ``[r]``.
        kv_indices: ``[kv_indptr[-1]]``, None for a batch without a page table.
        slot_mapping: ``[bucket]``, None for a batch without a page table.
    """

    def __init__(self, tables: Tables, bucket: int) -> None:
        tokens, page_size, real = len(tables.positions), tables.page_size, len(tables.qo)
        pad = bucket - tokens
        if pad < 0:
            raise BatchError(
                message(f"the batch has {tokens} tokens, the bucket {bucket}", why="A bucket is at least the tokens.")
            )
        requests = real + (pad > 0)
        pad_pages = -(-pad // page_size)
        indices = 0 if tables.kv_indices is None else len(tables.kv_indices) + pad_pages
        self.bucket, self.page_size, self.requests, self.tokens = bucket, page_size, requests, tokens
        self._tables = tables
        # Every array begins at a multiple of 16 bytes.
        self.starts = starts = [0, 0, 0, 0, 0]
        sizes = (requests + 1, requests + 1, requests, requests)
        for i, size in enumerate(sizes):
            starts[i + 1] = starts[i] + (size + 3) // 4 * 4
        self.sizes = (*sizes, indices)
        flat = self.flat = np.zeros(starts[4] + indices, dtype=np.int32)
        qo, kv, last, lens = (flat[start : start + size] for start, size in zip(starts, sizes, strict=False))
        np.cumsum(tables.qo, out=qo[1 : real + 1])
        np.cumsum(tables.counts, out=kv[1 : real + 1])
        lens[:real] = tables.kv
        last[:real] = tables.kv - (tables.counts - 1) * page_size
        if pad:
            qo[requests] = bucket
            kv[requests] = kv[real] + pad_pages
            lens[real] = pad
            last[real] = (pad - 1) % page_size + 1
        if tables.kv_indices is not None:
            flat[starts[4] : starts[4] + len(tables.kv_indices)] = tables.kv_indices
        if int(qo[requests]) != bucket:
            raise BatchError(f"the padded query lengths add up to {qo[requests]}, not to the bucket {bucket}")

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
        slots = np.zeros(self.bucket, dtype=np.int32)
        slots[: self.tokens] = self._tables.slots
        return torch.from_numpy(slots)


def pad_tables(tables: Tables, bucket: int) -> PaddedBatch:
    """The tables with the padding request.

    Raises:
        BatchError: ``bucket`` is smaller than the number of tokens.
    """
    return PaddedBatch(tables, bucket)


def check_names(names: Sequence[Any] | None, requests: int) -> tuple[str | None, ...] | None:
    """One adapter name or None for each request.

    Raises:
        BatchError: another number of names, or something else than a name.
    """
    if names is None:
        return None
    result = tuple(names)
    if len(result) != requests:
        raise BatchError(f"adapters has {len(result)} entries for {requests} requests")
    for request, name in enumerate(result):
        if name is not None and not isinstance(name, str):
            raise BatchError(f"request {request} has the adapter {name!r}, which is no name (None: the base model)")
    return result
