"""The state of a step: its batch, its cache, and what has been prepared for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from .errors import BatchError, message
from .memory.staging import StagingRing

if TYPE_CHECKING:
    from .attention.base import AttentionImpl
    from .attention.cache import PagedKVCache
    from .attention.prepared import Prepared
    from .batch import Batch

__all__ = ["DoesNotFit", "StepState"]

T = TypeVar("T")


class DoesNotFit(Exception):
    """Why no full CUDA graph can serve a batch; it then runs piecewise."""


class StepState:
    """A running step: its batch, its cache, and what has been prepared for it.

    Attributes:
        batch, cache: as given to :func:`step`.
        key: identity of the static memory that captured graphs read; None without a cache. It is the cache's for its
            whole life: nothing that a captured graph reads ever moves.
        prepared: the metadata now on the device, or None.
        scratch: True where all tokens are padding.
    """

    def __init__(
        self, batch: Batch, cache: PagedKVCache | None, outer: StepState | None, scratch: bool = False
    ) -> None:
        self.batch, self.cache, self.outer, self.scratch = batch, cache, outer, scratch
        self.key: Hashable = cache.key if cache is not None else None
        self.prepared: Prepared | None = None
        #: Whether anybody has asked for the metadata, for captured graphs ahead of time too.
        self.used = False
        #: Whether it is over, also for a task or thread that began inside it, or whose generator another one closed.
        self.closed = False
        #: Most new tokens of a request, as warm-up has it, whatever the batch has.
        self.longest: int | None = None
        self._memo: dict[Hashable, Any] = {}
        self._exits: list[Callable[[], None]] = []
        self._positions: torch.Tensor | None = None
        self._slots: torch.Tensor | None = None
        self._ids: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None

    def once(self, key: Hashable, fn: Callable[[], T]) -> T:
        """``fn()``, called once a step for a key."""
        if key not in self._memo:
            self._memo[key] = fn()
        result: T = self._memo[key]
        return result

    def on_exit(self, fn: Callable[[], None]) -> None:
        """Calls ``fn`` when the step is left, however that happens."""
        self._exits.append(fn)

    def adapters_unread(self) -> bool:
        """Whether the batch names adapters that nobody has asked for."""
        adapters = self.batch.adapters
        if adapters is None or (not isinstance(adapters, torch.Tensor) and not any(adapters)):
            return False
        return not any(isinstance(key, tuple) and key[0] == "lora" for key in self._memo)

    def close(self) -> None:
        """Ends the step, and runs what waits for that."""
        self.closed = True
        exits, self._exits = self._exits, []
        for fn in exits:
            fn()

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
        for shape in shapes:
            self.require_cache().impl(shape, rows)
        prepared = self._written(bucket, rows)
        for shape in shapes:
            self._planned(prepared, shape)
        return prepared

    def prepare_full_graph(self, bucket: int, shapes: Sequence[str]) -> Hashable:
        """Like :meth:`prepare` with a fixed number of request entries, for a full CUDA graph.

        Returns:
            What a capture bakes in.

        Raises:
            DoesNotFit: no capture can serve the batch.
        """
        cache = self.require_cache()
        entries = min(bucket, cache.max_requests + 1)
        needed = self.batch.num_requests + (bucket > self.batch.num_tokens)
        if needed > entries:
            raise DoesNotFit(f"{needed} requests, and the cache has max_requests={cache.max_requests}")
        impls = [cache.impl(shape, bucket) for shape in shapes]
        for shape, impl in zip(shapes, impls, strict=True):
            if not impl.capturable:
                raise DoesNotFit(f"attention {shape} runs in an implementation that cannot be captured")
        prepared = self._written(bucket, bucket, entries)
        if not prepared.static:
            raise DoesNotFit("the page tables are longer than the cache has pages")
        key = tuple([impl.capture_key(prepared) for impl in impls])
        if (prepared.made_for, key) not in cache.planned:
            # A capture finds the plan, and the memory that it takes; a replay reads neither.
            for shape in shapes:
                self._planned(prepared, shape)
            cache.planned.add((prepared.made_for, key))
        return key

    def plan(self, shape: str, rows: int) -> tuple[AttentionImpl, Any]:
        """What computes an attention shape for q of ``rows`` rows, and its plan; made now where it was not.

        The plan's work on the device, where it has any, is under way when this returns.
        """
        cache, prepared = self.require_cache(), self.prepared
        if prepared is None or prepared.rows != rows or prepared is not cache.current:
            prepared = self._written(max(rows, prepared.bucket if prepared is not None else 0), rows)
        planned = self._planned(prepared, shape)
        if shape not in prepared.enqueued:
            prepared.enqueued.add(shape)
            planned[0].enqueue(planned[1])
        return planned

    def each_kind(self, tokens: int) -> Iterator[None]:
        """Has the step look like one of short requests, then like one of long ones: attention has kernels for both."""
        # So many tokens are not all of short requests.
        shortest = max(1, tokens // (2 * self.require_cache().max_requests))
        for longest in dict.fromkeys((shortest, tokens)):
            self.longest, self.prepared = longest, None
            yield
        self.longest = self.prepared = None

    def enqueue_again(self) -> None:
        """Has plans do their work on the device once more: what is captured or replayed now must hold it."""
        if self.prepared is not None:
            self.prepared.enqueued.clear()

    def _written(self, bucket: int, rows: int, slots: int | None = None) -> Prepared:
        cache, prepared = self.require_cache(), self.prepared
        self.used = True
        wanted = (bucket, rows, slots)
        if prepared is None or prepared is not cache.current or prepared.made_for != wanted:
            if bucket < rows:
                raise BatchError(f"the batch has {rows} tokens, the bucket {bucket}")
            prepared = self.prepared = cache.prepare(self.batch, wanted, again=self.longest is not None)
            if self.longest is not None:
                prepared.longest = self.longest
        return prepared

    def _planned(self, prepared: Prepared, shape: str) -> tuple[AttentionImpl, Any]:
        planned = prepared.plans.get(shape)
        if planned is None:
            impl = self.require_cache().impl(shape, prepared.rows)
            planned = prepared.plans[shape] = (impl, impl.plan(prepared))
        return planned

    def slot_mapping(self, bucket: int) -> torch.Tensor:
        """``[bucket]`` int64 at an address that is the cache's forever; filled by :meth:`prepare`."""
        return self.require_cache().slot_mapping(bucket)

    def user_positions(self) -> torch.Tensor:
        """``[tokens]`` int64, fresh: a caller may keep it."""
        if self._positions is None:
            block = self._block()
            # Without a cache the size of a page is unknown, and whether the page table fits is nobody's concern.
            self._positions = self._to_user(self.batch.host_positions()) if block is None else block[0]
        return self._positions

    def user_slots(self) -> torch.Tensor | None:
        """The same for the slots; None without a cache."""
        if self._slots is None and self.cache is not None:
            slots = self.batch.tables(self.cache.page_size).slots
            self._slots = None if slots is None else self._to_user(slots)
        return self._slots

    def user_ids(self) -> torch.Tensor:
        """The same for the ids that the batch was made with."""
        if self._ids is None:
            block, ids = self._block(), self.batch.host_ids
            assert ids is not None
            self._ids = self._to_user(ids) if block is None else block[1]
        return self._ids

    def _block(self) -> torch.Tensor | None:
        """A copy of positions and ids on the device; None where a call must tell first what the step prepares.

        It prepares what the last step of as many tokens did: then this is the step's only copy from the host.
        """
        if self._tokens is None and self.cache is not None and not self.scratch:
            prepared = self.prepared
            if prepared is None or prepared is not self.cache.current:
                guess = self.cache.made_for.get(self.batch.num_tokens)
                if guess is None:
                    return None
                prepared = self._written(*guess)
            with torch.inference_mode(False):
                self._tokens = prepared.copied.clone()
        return self._tokens

    def _to_user(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        device = self.cache.device if self.cache is not None else torch.get_default_device()
        if torch.is_inference_mode_enabled():
            # A caller may keep them, for steps out of inference mode too.
            with torch.inference_mode(False):
                return self._sent(values, device)
        return self._sent(values, device)

    def _sent(self, values: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
        target = torch.empty(len(values), dtype=torch.int64, device=device)
        self.staging(target.device).send_longs(values, target)
        return target


def _few(lengths: Sequence[int]) -> str:
    shown = ", ".join(map(str, lengths[:8]))
    return f"{shown}, ..." if len(lengths) > 8 else shown
