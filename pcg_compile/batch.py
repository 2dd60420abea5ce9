"""What the requests of one step look like, and the step itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch

from .errors import BatchError, message
from .metadata import PaddedBatch, PageTable, Tables, check_names, make_tables, pad_tables, read_lengths
from .runtime.staging import StagingRing

if TYPE_CHECKING:
    from .attention.cache import PagedKVCache, Prepared

__all__ = ["Batch", "PaddedBatch", "StepState", "current_step", "require_step", "scratch_step", "step"]

T = TypeVar("T")


class Batch:
    """The requests of one step, their tokens one after the other.

    Attributes:
        qo_lens, kv_lens: lengths by request.
        adapters: an adapter's name or None by request; None where no adapters were given.
        num_requests, num_tokens: numbers.
    """

    def __init__(
        self,
        qo_lens: Sequence[int],
        kv_lens: Sequence[int] | None = None,
        page_table: Sequence[Sequence[int]] | Any = None,
        adapters: Sequence[str | None] | None = None,
    ) -> None:
        """
        Args:
            qo_lens: new tokens of each request.
            kv_lens: tokens of each request that attention sees, the new ones included; None: only the new ones.
                A request's first new token has position ``kv_len - qo_len``.
            page_table: the pages of each request, in order; more than its KV length needs are allowed. A sequence of
                sequences, or an int array ``[requests, most pages]`` on the host, which is read faster.
            adapters: a LoRA adapter's name for each request, None for the base model.

        Raises:
            BatchError: no requests, a length below 1, a KV length below the query length, another number of entries
                than requests, page 0 given to a request.
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
        if short.any():
            request = int(np.argmax(short))
            raise BatchError(
                message(
                    f"request {request} has a KV length of {self._kv[request]} and {self._qo[request]} new tokens",
                    why="kv_lens count the new tokens too.",
                    cure="Write: kv_lens=[cached + new for each request]",
                )
            )
        self._pages = None if page_table is None else PageTable(page_table, len(self._qo))
        self.adapters = check_names(adapters, len(self._qo))
        self._finish(int(self._qo.sum()))

    def _finish(self, tokens: int) -> None:
        self.num_tokens = tokens
        self.num_requests = len(self._qo)
        self.qo_lens: tuple[int, ...] = tuple(self._qo.tolist())
        self.kv_lens: tuple[int, ...] = self.qo_lens if self._kv is self._qo else tuple(self._kv.tolist())
        self._tables: dict[int, Tables] = {}

    @classmethod
    def _of_padding(cls, tokens: int) -> Batch:
        """A batch without requests, whose ``tokens`` tokens are all padding."""
        batch = cls.__new__(cls)
        batch._qo = batch._kv = np.zeros(0, dtype=np.int64)
        batch._pages = PageTable(np.zeros((0, 1), dtype=np.int32), 0)
        batch.adapters = None
        batch._finish(tokens)
        return batch

    def __repr__(self) -> str:
        return f"Batch({self.num_requests} requests, {self.num_tokens} tokens)"

    def tables(self, page_size: int) -> Tables:
        """Pages and slots for pages of one size, computed once.

        Raises:
            BatchError: see :func:`pcg_compile.metadata.make_tables`.
        """
        tables = self._tables.get(page_size)
        if tables is None:
            tables = self._tables[page_size] = make_tables(self._qo, self._kv, self._pages, page_size)
        return tables

    def padded(self, bucket: int, page_size: int) -> PaddedBatch:
        """The batch padded to ``bucket`` tokens by one more request, as int32 CPU tensors.

        Raises:
            BatchError: ``bucket`` is below the number of tokens, or the page table does not fit.
        """
        return pad_tables(self.tables(page_size), bucket)

    @property
    def has_pages(self) -> bool:
        """Whether a page table was given."""
        return self._pages is not None

    @property
    def positions(self) -> torch.Tensor:
        """``[tokens]`` int64 on the cache's device (the default device without a cache); inside :func:`step` only."""
        return self._state("positions").user_tensors()[0]

    @property
    def slot_mapping(self) -> torch.Tensor:
        """``[tokens]`` int64 on the cache's device, the slot of each token; inside :func:`step` with a cache only."""
        slots = self._state("slot_mapping").user_tensors()[1]
        if slots is None:
            raise BatchError(
                message("batch.slot_mapping needs a cache", cure="Enter the step as: with pcg.step(batch, cache):")
            )
        return slots

    def _state(self, name: str) -> StepState:
        state = _STEP.get()
        while state is not None and state.batch is not self:
            state = state.outer
        if state is None:
            raise BatchError(
                message(f"batch.{name} exists inside the batch's step only", cure="Enter it: with pcg.step(batch, cache):")
            )
        return state


class StepState:
    """A running step: its batch, its cache, and what has been prepared for it.

    Attributes:
        batch, cache: as given to :func:`step`.
        key: identity of the static memory that recordings read; None without a cache. It is the cache's for its
            whole life: nothing that a recording reads ever moves.
        prepared: the metadata now on the device, or None.
        scratch: True where all tokens are padding.
    """

    def __init__(self, batch: Batch, cache: PagedKVCache | None, outer: StepState | None, scratch: bool = False) -> None:
        self.batch, self.cache, self.outer, self.scratch = batch, cache, outer, scratch
        self.key: Hashable = cache.key if cache is not None else None
        self.prepared: Prepared | None = None
        self._memo: dict[Hashable, Any] = {}
        self._user: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def once(self, key: Hashable, fn: Callable[[], T]) -> T:
        """``fn()``, called once a step for a key."""
        if key not in self._memo:
            self._memo[key] = fn()
        return self._memo[key]

    def staging(self, device: torch.device) -> StagingRing:
        """Pinned memory for copies to a device in this step."""
        if self.cache is not None and self.cache.device == device:
            return self.cache.staging
        return self.once(("staging", device), lambda: StagingRing(device))

    def check_tokens(self, tokens: int) -> None:
        """Raises :class:`BatchError` where a call has another number of tokens than the batch."""
        if tokens != self.batch.num_tokens and not self.scratch:
            raise BatchError(
                message(
                    f"the model was called with {tokens} tokens, the batch of the step has {self.batch.num_tokens}",
                    why=f"Its {self.batch.num_requests} requests have {_few(self.batch.qo_lens)} new tokens.",
                    cure="Pass the new tokens of all requests, one request after the other.",
                )
            )

    def require_cache(self) -> PagedKVCache:
        """The step's cache.

        Raises:
            BatchError: the step has none.
        """
        if self.cache is None:
            raise BatchError(
                message(
                    "paged attention needs a cache, and the step has none",
                    cure="Enter the step as: with pcg.step(batch, cache):",
                )
            )
        return self.cache

    def prepare(self, bucket: int, mode: Literal["request", "slice"], shapes: Sequence[str] = ()) -> Prepared:
        """Brings the metadata for a bucket to the device and plans attention, unless that is already done.

        Args:
            bucket: tokens that pieces see. mode: "request": attention sees them too, the padding being a request;
                "slice": attention sees the real tokens.
            shapes: encoded attention shapes to plan.

        Raises:
            BatchError: no cache, a bucket below the number of tokens.
        """
        rows = bucket if mode == "request" or self.scratch else self.batch.num_tokens
        prepared = self._written(bucket, rows)
        for shape in shapes:
            self._planned(prepared, shape)
        return prepared

    def plan(self, shape: str, rows: int) -> Any:
        """The plan of an attention shape for q of ``rows`` rows; made now where :meth:`prepare` was not for it."""
        prepared = self.prepared
        if prepared is None or prepared.rows != rows or prepared is not self.require_cache().current:
            prepared = self._written(max(rows, prepared.bucket if prepared is not None else 0), rows)
        return self._planned(prepared, shape)

    def _written(self, bucket: int, rows: int) -> Prepared:
        cache, prepared = self.require_cache(), self.prepared
        if prepared is None or prepared is not cache.current or prepared.bucket != bucket or prepared.rows != rows:
            if bucket < rows:
                raise BatchError(f"the batch has {rows} tokens, the bucket {bucket}")
            prepared = self.prepared = cache.write(self.batch.padded(rows, cache.page_size), bucket)
        return prepared

    def _planned(self, prepared: Prepared, shape: str) -> Any:
        plan = prepared.plans.get(shape)
        if plan is None:
            plan = prepared.plans[shape] = self.require_cache().impl(shape).plan(prepared)
        return plan

    def slot_mapping(self, bucket: int) -> torch.Tensor:
        """``[bucket]`` int64 at an address that is the cache's for ever; filled by :meth:`prepare`."""
        return self.require_cache().slot_mapping(bucket)

    def user_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions and slots ``[tokens]`` int64, fresh: a caller may keep them."""
        if self._user is None:
            cache, batch = self.cache, self.batch
            device = cache.device if cache is not None else torch.get_default_device()
            tables = batch.tables(cache.page_size if cache is not None else 1)
            slots = tables.slots if cache is not None else None
            both = tables.positions if slots is None else np.concatenate([tables.positions, slots])
            with torch.inference_mode(False), torch.no_grad():
                target = torch.empty(len(both), dtype=torch.int64, device=device)
                self.staging(target.device).send(both, target)
                n = len(tables.positions)
                self._user = (target[:n], None if slots is None else target[n:])
        return self._user


def _few(lengths: Sequence[int]) -> str:
    shown = ", ".join(map(str, lengths[:8]))
    return f"{shown}, ..." if len(lengths) > 8 else shown


_STEP: ContextVar[StepState | None] = ContextVar("pcg_step", default=None)


def current_step() -> StepState | None:
    """The running step of this thread or task, or None."""
    return _STEP.get()


def require_step(what: str) -> StepState:
    """The running step.

    Raises:
        BatchError: none is running; ``what`` needs it.
    """
    state = _STEP.get()
    if state is None:
        raise BatchError(
            message(
                f"{what} needs to know the batch, and no step is running",
                why="Lengths, pages and adapters of the requests come from the step, not from the call.",
                cure="Call it inside: with pcg.step(batch, cache):",
            )
        )
    return state


@contextmanager
def step(batch: Batch, cache: PagedKVCache | None = None) -> Iterator[Batch]:
    """Runs model calls for a batch, without gradients.

    Args:
        batch: the requests. cache: where their keys and values lie; None for a model without paged attention.

    Raises:
        BatchError: a step is running already, the cache is in another step, the batch does not fit the cache.
    """
    if not isinstance(batch, Batch):
        raise BatchError(message(f"pcg.step() takes a Batch, not {type(batch).__name__}", cure="Write: pcg.step(pcg.Batch(...))"))
    if _STEP.get() is not None:
        raise BatchError(message("a step is running already", cure="Leave it before you enter the next one."))
    if cache is not None:
        if not batch.has_pages:
            raise BatchError(
                message("the batch has no page table, and the step has a cache", cure="Write: Batch(..., page_table=[[3, 4], ...])")
            )
        batch.tables(cache.page_size).check_limit(cache.num_pages)
        if cache.in_step:
            raise BatchError(
                message("the cache is in a step of another thread", why="A cache serves one step at a time.")
            )
        cache.in_step = True
    token = _STEP.set(StepState(batch, cache, None))
    try:
        with torch.no_grad():
            yield batch
    finally:
        _STEP.reset(token)
        if cache is not None:
            cache.in_step = False


@contextmanager
def scratch_step(tokens: int, cache: PagedKVCache | None) -> Iterator[StepState]:
    """A step of padding alone, for recording: it writes no page but 0. Inside a step it takes its place."""
    state = StepState(Batch._of_padding(tokens), cache, _STEP.get(), scratch=True)
    token = _STEP.set(state)
    try:
        with torch.no_grad():
            yield state
    finally:
        _STEP.reset(token)
