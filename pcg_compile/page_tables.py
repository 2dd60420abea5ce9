"""The pages of a batch's requests, on the host: those given, those in use, and the slots of new tokens."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import torch

from .errors import BatchError, message
from .metadata import MOST, Ints, integers, positions_of, read_lengths

__all__ = ["PageTable", "Tables", "make_tables"]

#: Pages of a request beyond its KV length that go to the device with the others, for steps that advance there.
_MOST_SPARE = 8


class PageTable:
    """The pages of all requests in one flat array.

    Attributes:
        flat: ``[entries]`` int32.
        starts, counts: ``[requests]`` int64, where each request's pages begin and how many are given.
        roomy: whether ``flat`` has entries beside those: they may hold anything.
        spare: whether all that are given belong to their request, also those that its KV length does not need.
    """

    __slots__ = ("counts", "flat", "roomy", "spare", "starts")

    def __init__(self, table: Any, requests: int, counts: Any = None) -> None:
        """``table``: a sequence of pages for each request, or an int array ``[requests, most pages]`` whose unused
        entries may hold anything. ``counts``: the entries of each row that belong to the request, None: unknown.

        Raises:
            BatchError: another number of rows than requests, a page below 1 in a sequence, a count beyond the row.
        """
        self.roomy = isinstance(table, (np.ndarray, torch.Tensor))
        self.spare = not self.roomy or counts is not None
        if self.roomy:
            array = integers("page_table", table)
            if array.ndim != 2:
                raise BatchError(
                    message(f"page_table has {array.ndim} dimensions", why="It is [requests, most pages].")
                )
            self.flat = _pages_of(array).ravel()
            self.starts = np.arange(0, array.size, array.shape[1]) if array.size else np.zeros(len(array), np.int64)
            self.counts = np.full(array.shape[0], array.shape[1], dtype=np.int64)
            if counts is not None:
                self.counts = read_lengths("page_counts", counts)
                if len(self.counts) != len(array) or self.counts.max(initial=0) > array.shape[1]:
                    raise BatchError(
                        message(f"page_counts does not fit a page_table of {list(array.shape)}",
                                why="It is one number a request, of entries in its row.")
                    )  # fmt: skip
        else:
            if counts is not None:
                raise BatchError(message("page_counts are given for a page_table of lists", cure="Leave them out."))
            try:
                self.counts = np.fromiter(map(len, table), np.int64)
                pages = integers("page_table", list(chain.from_iterable(table)))
            except TypeError:
                raise BatchError(
                    message("page_table is no list of lists", cure="Write: page_table=[[3, 4], [5]]")
                ) from None
            if pages.ndim != 1:
                raise BatchError(
                    message("page_table has lists within its rows", cure="Write: page_table=[[3, 4], [5]]")
                )
            self.flat = self._checked(pages)
            self.starts = _exclusive(self.counts)
        if len(self.counts) != requests:
            raise BatchError(f"page_table has {len(self.counts)} rows for {requests} requests")

    def _checked(self, pages: Ints) -> Ints:
        if not pages.size:
            return np.zeros(0, dtype=np.int32)
        if pages[pages.argmax()] >= MOST or pages[pages.argmin()] < 1:
            check_pages(_pages_of(pages), self.counts, None)
        return pages.astype(np.int32)

    def first(self, counts: Ints) -> Ints:
        """The first ``counts[i]`` pages of each request i, one request after the other."""
        # Usually the lists have no page to spare.
        if not self.roomy and counts.tobytes() == self.counts.tobytes():
            return self.flat
        ends = np.add.accumulate(counts)
        shift = self.starts - ends
        shift += counts
        return self.flat[np.arange(ends[-1] if len(ends) else 0) + shift.repeat(counts)]


def _pages_of(array: Ints) -> Ints:
    """Pages as int32; those beyond it become the least or the highest: no cache has them, and they stay errors."""
    pages = np.ascontiguousarray(array, dtype=np.int32)
    if array.dtype.itemsize > 4 and (pages != array).any():
        pages = np.clip(array, -MOST - 1, MOST).astype(np.int32)
    return pages


def _exclusive(counts: Ints) -> Ints:
    sums = np.add.accumulate(counts)
    sums -= counts
    return sums


def check_pages(pages: Ints, counts: Ints, limit: int | None) -> int:
    """The highest page, 0 for none; ``pages`` are ``counts[i]`` of each request i.

    Raises:
        BatchError: a page below 1, or not below ``limit``.
    """
    if not pages.size:
        return 0
    if pages[at := pages.argmin()] < 1:
        why = "Page 0 is the scratch page: padding tokens are written there." if pages[at] == 0 else None
        raise BatchError(
            message(
                f"request {_owner(int(at), counts)} uses page {pages[at]}",
                why=why,
                cure="Give requests pages from 1 on, as cache.allocate() does.",
            )
        )
    highest = int(pages[at := pages.argmax()])
    if limit is None and highest == MOST:
        raise BatchError(
            message(f"request {_owner(int(at), counts)} uses page {pages[at]} or a higher one", why="Pages are int32.")
        )
    if limit is not None and highest >= limit:
        raise BatchError(
            message(
                f"request {_owner(int(at), counts)} uses page {pages[at]}; the cache has pages 1 to {limit - 1}",
                cure=f"Make the cache larger: PagedKVCache(num_pages={highest + 1}, ...)",
            )
        )
    return highest


def _owner(at: int, counts: Ints) -> int:
    return int(np.searchsorted(np.cumsum(counts), at, side="right"))


class Tables:
    """What a batch looks like in pages of one size.

    Attributes:
        page_size: tokens a page.
        qo, kv: ``[requests]`` int64 lengths.
        counts: ``[requests]`` pages in use.
        listed: ``[sum(listed_counts)]`` int32, the first pages of each request: those in use and some to spare, which
            later tokens may be written to without another table. None without a page table.
        room: tokens that every request can take behind its last one in ``listed``.
        positions: ``[tokens]`` int64.
        slots: ``[tokens]`` int64, ``page * page_size + offset``; None without a page table.
        highest_page: the highest page in ``listed``, 0 for none.
    """

    __slots__ = (
        "_pages", "counts", "highest_page", "kv", "listed", "listed_counts", "page_size", "positions", "qo", "room",
        "slots",
    )  # fmt: skip

    def __init__(self, qo: Ints, kv: Ints, page_size: int) -> None:
        self.page_size, self.qo, self.kv = page_size, qo, kv
        self.counts = self.listed_counts = (kv + (page_size - 1)) // page_size
        self.positions = positions_of(qo, kv)
        self.listed: Ints | None = None
        self.slots: Ints | None = None
        self.highest_page = self.room = 0
        self._pages: PageTable | None = None

    @property
    def kv_indices(self) -> Ints | None:
        """``[sum(counts)]`` int32: the pages in use; None without a page table."""
        if self._pages is None or self.listed_counts is self.counts:
            return self.listed
        return self._pages.first(self.counts)

    def list_pages(self, pages: PageTable, spare: bool) -> None:
        """Reads ``listed``, with pages to spare where the table has some."""
        self._pages, self.listed_counts = pages, self.counts
        if spare and pages.counts.tobytes() != self.counts.tobytes():
            self.listed_counts = np.minimum(pages.counts, self.counts + _MOST_SPARE)
        listed = self.listed = pages.first(self.listed_counts)
        self.highest_page = int(listed[listed.argmax()]) if len(listed) else 0
        left = self.listed_counts * self.page_size
        left -= self.kv
        self.room = int(left[left.argmin()]) if len(left) else 0

    def check_limit(self, num_pages: int) -> None:
        """Raises :class:`BatchError` where a request uses a page that a cache of ``num_pages`` does not have."""
        if self.listed is not None and self.highest_page >= num_pages:
            assert self._pages is not None
            self.list_pages(self._pages, spare=False)
            check_pages(self.listed, self.counts, num_pages)


def make_tables(qo: Ints, kv: Ints, pages: PageTable | None, page_size: int) -> Tables:
    """The tables of a batch.

    Raises:
        BatchError: fewer pages than a request's KV length needs, page 0 in use, a page that one request
            writes and another one uses too.
    """
    if page_size < 1:
        raise BatchError(f"page_size is {page_size}; it is at least 1")
    tables = Tables(qo, kv, page_size)
    counts, positions = tables.counts, tables.positions
    if pages is None:
        if int(counts.sum()) > MOST:
            raise BatchError(message(f"the batch needs {counts.sum()} pages", why=f"At most {MOST}: int32."))
        return tables
    short = pages.counts - counts
    if len(short) and short[request := int(short.argmin())] < 0:
        request = int(np.argmax(short < 0))
        raise BatchError(
            message(
                f"request {request} has {pages.counts[request]} pages and needs {counts[request]}",
                why=f"Its KV length, new tokens included, is {kv[request]}, and a page holds {page_size}.",
                cure="Extend its row of page_table: row += cache.allocate(1)",
            )
        )
    tables.list_pages(pages, pages.spare)
    in_row = positions // page_size
    token_pages = pages.flat[(pages.starts if len(positions) == len(qo) else pages.starts.repeat(qo)) + in_row]
    if not _is_sound(tables, token_pages):
        tables.list_pages(pages, spare=False)
        assert tables.listed is not None
        tables.highest_page = check_pages(tables.listed, counts, None)
        _check_writes(tables.listed, counts, token_pages, qo)
    # page * page_size + position % page_size
    slots = token_pages.astype(np.int64)
    slots -= in_row
    slots *= page_size
    slots += positions
    tables.slots = slots
    return tables


def _is_sound(tables: Tables, token_pages: Ints) -> bool:
    """Whether the listed pages, to spare ones included, are pages of a cache, and nobody shares one that is written."""
    listed = tables.listed
    assert listed is not None
    if not len(listed):
        return True
    if listed[listed.argmin()] < 1 or tables.highest_page > max(64 * len(listed), 1 << 16):
        return False
    uses = np.bincount(listed)
    if uses[uses.argmax()] < 2:
        return True
    if (uses[token_pages] > 1).any():
        return False
    if tables.listed_counts is tables.counts:
        return True
    counts = tables.listed_counts
    in_row = np.arange(len(listed)) - _exclusive(counts).repeat(counts)
    return not bool((uses[listed[in_row >= tables.counts.repeat(counts)]] > 1).any())


def _check_writes(used: Ints, counts: Ints, token_pages: Ints, qo: Ints) -> None:
    """A page may be shared by requests that only read it (a common prefix), never where one writes."""
    order = used.copy()
    order.sort()
    written = np.isin(token_pages, order[1:][order[1:] == order[:-1]])
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
