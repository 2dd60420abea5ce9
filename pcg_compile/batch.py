"""What the requests of one step look like."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import BatchError, message
from .metadata import (
    MOST,
    Ints,
    check_adapters,
    check_count,
    positions_of,
    read_ids,
    read_lengths,
    spans_of,
)
from .padding_request import PaddedBatch
from .page_tables import PageTable, Tables, make_tables
from .running import RUNNING, Running

__all__ = ["Batch", "PaddedBatch"]


class Batch:
    """The requests of one step, their tokens one after the other.

    Attributes:
        qo_lens, kv_lens: lengths by request.
        adapters: an adapter's name or None by request, or a tensor of slots by token; None where none were given.
        num_requests, num_tokens: numbers.
        line, age: batches of one line come from each other by :meth:`advance`; the age counts the steps.
        spans, host_ids: of groups and ids, or None.
    """

    def __init__(
        self,
        qo_lens: Sequence[int] | npt.NDArray[Any],
        kv_lens: Sequence[int] | npt.NDArray[Any] | None = None,
        page_table: Sequence[Sequence[int]] | Any = None,
        adapters: Sequence[str | None] | torch.Tensor | None = None,
        *,
        groups: Sequence[int] | Any = None,
        page_counts: Sequence[int] | npt.NDArray[Any] | None = None,
        ids: Sequence[int] | npt.NDArray[Any] | None = None,
    ) -> None:
        """
        Args:
            qo_lens: new tokens of each request.
            kv_lens: tokens of each request that attention sees, the new ones included; None: only the new ones.
                A request's first new token has position ``kv_len - qo_len``.
            page_table: the pages of each request, in order; more than its KV length needs are allowed. A sequence of
                sequences, or an int array ``[requests, most pages]`` on the host, which is read faster, and not copied:
                it is read until the step is over.
            adapters: a LoRA adapter's name for each request, None for the base model; or, where only the device knows,
                an int tensor ``[tokens]`` of adapter slots (:meth:`pcg_compile.lora.AdapterPool.slots_of`), -1 for the
                base model.
            groups: a number for each new token, on the host. Neighbours of one request with the same number, from 0 on,
                see each other in every attention layer, whatever its mask and window: the tokens of an image. -1 for
                none.
            page_counts: where ``page_table`` is an array, how many entries of each row are the request's. Those that it
                does not need yet let steps advance on the device. Lists say so themselves.
            ids: token ids ``[tokens]`` on the host, for :attr:`ids`: they travel with the metadata. Batches of requests
                with one token each pass them on when they :meth:`advance`.

        Raises:
            BatchError: no requests, a length below 1 or beyond int32, a KV length below the query length, another
                number of entries than requests, page 0 given to a request.
        """
        self._qo = read_lengths("qo_lens", qo_lens)
        if not len(self._qo):
            raise BatchError(
                message("the batch has no requests", why="A step has at least one token.", cure="Skip the empty step.")
            )
        self._kv = self._qo if kv_lens is None else read_lengths("kv_lens", kv_lens)
        if len(self._kv) != len(self._qo):
            raise BatchError(f"kv_lens has {len(self._kv)} entries for {len(self._qo)} requests")
        short = self._kv < self._qo
        if short[request := int(short.argmax())]:
            raise BatchError(
                message(
                    f"request {request} has a KV length of {self._kv[request]} and {self._qo[request]} new tokens",
                    why="kv_lens count the new tokens too.",
                    cure="Write: kv_lens=[cached + new for each request]",
                )
            )
        self._pages = None if page_table is None else PageTable(page_table, len(self._qo), page_counts)
        self._begin(int(self._qo.sum()))
        if self.num_tokens > MOST or self._kv[self._kv.argmax()] > MOST:
            name, lengths = ("qo_lens", self.qo_lens) if max(self.qo_lens) > MOST else ("kv_lens", self.kv_lens)
            request = lengths.index(max(lengths))
            raise BatchError(
                message(
                    f"request {request} has {name}[{request}] = {lengths[request]}, "
                    f"the batch {sum(self.qo_lens)} tokens",
                    why=f"At most {MOST}: metadata are int32.",
                )
            )
        self.spans = None if groups is None else spans_of(groups, self._qo, self._kv)
        self.host_ids = None if ids is None else read_ids(ids, self.num_tokens)
        self.adapters = check_adapters(adapters, self.num_requests, self.num_tokens)

    def _begin(self, tokens: int) -> None:
        self.num_requests, self.num_tokens = len(self._qo), tokens
        self.line, self.age = object(), 0
        self._tables: dict[int, Tables] = {}

    @cached_property
    def qo_lens(self) -> tuple[int, ...]:
        """New tokens of each request."""
        return tuple(self._qo.tolist())

    @cached_property
    def kv_lens(self) -> tuple[int, ...]:
        """Tokens of each request that attention sees."""
        return tuple(self._kv.tolist())

    @classmethod
    def of_padding(cls, tokens: int) -> Batch:
        """A batch without requests, whose ``tokens`` tokens are all padding."""
        batch = cls.__new__(cls)
        batch._qo = batch._kv = np.zeros(0, dtype=np.int64)
        batch._pages = PageTable(np.zeros((0, 1), dtype=np.int32), 0)
        batch.adapters = batch.spans = batch.host_ids = None
        batch._begin(tokens)
        return batch

    def advance(self) -> Batch:
        """The decode step that follows: the same requests on the same pages, each with one more token.

        Nothing is read from lists. While every request has pages to spare, its metadata are made on the device from
        those of this step; see Note [advance]. A request whose pages are full is a ``BatchError`` when the step is
        entered: make a new batch then.

        Raises:
            BatchError: adapters given as a tensor of slots, where a request has several tokens.
        """
        batch = Batch.__new__(Batch)
        batch._kv = self._kv + 1
        batch._pages, batch.adapters, batch.spans, batch.host_ids = self._pages, self.adapters, None, None
        if self.num_tokens == self.num_requests:
            batch.host_ids = self.host_ids
            batch._qo, batch.line, batch.age = self._qo, self.line, self.age + 1
            batch.num_requests, batch.num_tokens, batch._tables = self.num_requests, self.num_tokens, {}
            return batch
        batch._qo = np.ones(self.num_requests, dtype=np.int64)
        batch._begin(self.num_requests)
        if isinstance(self.adapters, torch.Tensor) and self.num_tokens != self.num_requests:
            raise BatchError(
                message("the adapters of the next step are unknown", why="The tensor of slots has one for each token.")
            )
        return batch

    @property
    def longest(self) -> int:
        """Most new tokens of a request; 0 where there is none."""
        return int(self._qo.max(initial=0)) if self.num_tokens != self.num_requests else 1

    def __repr__(self) -> str:
        return f"Batch({self.num_requests} requests, {self.num_tokens} tokens)"

    def tables(self, page_size: int) -> Tables:
        """Pages and slots for pages of one size, computed once.

        Raises:
            BatchError: see :func:`pcg_compile.page_tables.make_tables`.
        """
        tables = self._tables.get(page_size)
        if tables is None:
            tables = self._tables[page_size] = make_tables(self._qo, self._kv, self._pages, page_size)
        return tables

    def host_positions(self) -> Ints:
        """``[tokens]`` int64: the position of every token in its request."""
        tables = next(iter(self._tables.values()), None)
        return positions_of(self._qo, self._kv) if tables is None else tables.positions

    def padded(self, bucket: int, page_size: int, slots: int | None = None) -> PaddedBatch:
        """The batch padded to ``bucket`` tokens by one more request, as int32 CPU tensors.

        With ``slots``, requests of no length behind it make the number of requests ``slots``.

        Raises:
            BatchError: ``bucket`` is below the number of tokens, or the page table does not fit.
        """
        return PaddedBatch(self.tables(check_count("page_size", page_size)), bucket, slots)

    @property
    def has_pages(self) -> bool:
        """Whether a page table was given."""
        return self._pages is not None

    @property
    def positions(self) -> torch.Tensor:
        """``[tokens]`` int64 on the cache's device (the default device without a cache); inside :func:`step` only."""
        return self._state("positions").user_positions()

    @property
    def ids(self) -> torch.Tensor:
        """``[tokens]`` int64 on the cache's device: the ids that the batch was made with; inside :func:`step` only."""
        if self.host_ids is None:
            raise BatchError(message("the batch has no ids", cure="Write: pcg.Batch(..., ids=[5, 9, 2])"))
        return self._state("ids").user_ids()

    @property
    def slot_mapping(self) -> torch.Tensor:
        """``[tokens]`` int64 on the cache's device, the slot of each token; inside :func:`step` with a cache only."""
        slots = self._state("slot_mapping").user_slots()
        if slots is None:
            raise BatchError(
                message("batch.slot_mapping needs a cache", cure="Enter the step as: with pcg.step(batch, cache):")
            )
        return slots

    def _state(self, name: str) -> Running:
        state = RUNNING.get()
        while state is not None and state.batch is not self:
            state = state.outer
        if state is None or state.closed:
            raise BatchError(
                message(
                    f"batch.{name} exists inside the batch's step only", cure="Enter it: with pcg.step(batch, cache):"
                )
            )
        return state
