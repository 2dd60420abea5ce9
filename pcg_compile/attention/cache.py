"""The paged KV cache, and the static device memory that a step's metadata go to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import BatchError, OptionsError, message
from ..memory.staging import StagingRing
from ..metadata import Ints, Tables
from ..padding_request import Layout, PaddedBatch
from .advance import advance
from .base import AttentionImpl, AttentionShape, Layer
from .choose import choose_impl

if TYPE_CHECKING:
    from ..batch import Batch

__all__ = ["PagedKVCache", "Prepared"]

_LOG = logging.getLogger("pcg_compile")

#: Stored with scales.
_FP8 = (torch.float8_e4m3fn,)

#: Words that the size of a step's metadata is rounded up to.
_ROUND = 64
#: Sets of views kept, and sizes whose last bucket is remembered.
_MOST_KEPT = 4096


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
        plans: what each attention shape planned. enqueued: shapes whose plan's work on the device is under way.
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
        self.plans: dict[str, Any] = {}
        self.enqueued: set[str] = set()
        self._sizes, self._page_size = layout.sizes, page_size

    def array(self, index: int) -> torch.Tensor:
        """On the device, what ``padded.array(index)`` is on the host, where no pages are to spare."""
        return self.arrays[index][: self._sizes[index]]

    @cached_property
    def padded(self) -> PaddedBatch:
        """The same on the host, for attention that plans there."""
        return self.batch.padded(self.rows, self._page_size, self.made_for[2])


class PagedKVCache:
    """Keys and values of all layers, in pages.

    Page 0 is reserved: padding tokens are written there, and no request may use it. A cache serves one step at a
    time.

    Attributes:
        k, v: one ``[num_pages, page_size, num_kv_heads, head_dim]`` tensor a layer. Their addresses never change.
        k_scale, v_scale: of an fp8 cache, one ``[num_kv_heads]`` float32 tensor a layer: a stored number times its
            head's scale is the key or value. Change them in place, ahead of what is stored. None for other dtypes.

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

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int = 16,
        max_requests: int = 256,
        *,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        k_scale: float | torch.Tensor = 1.0,
        v_scale: float | torch.Tensor = 1.0,
    ) -> None:
        """
        Args:
            num_layers: attention layers. num_pages: pages a layer, page 0 included. page_size: tokens a page.
            max_requests: requests that the static buffers hold, beside the padding request.
            num_kv_heads, head_dim: key heads, and elements of one. v_head_dim: elements of a value head, where they
                are others.
            dtype, device: of keys and values; torch's defaults where None. ``torch.float8_e4m3fn`` takes half the
                memory of bfloat16; what does not fit its range of -448 to 448 times the scale is clamped.
            k_scale, v_scale: scales of an fp8 cache, for all layers: a number, or ``[num_kv_heads]``.

        Raises:
            OptionsError: a size below 1, fewer than 2 pages, a scale that is not above 0.
        """
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = {
            "num_layers": num_layers, "num_pages": num_pages, "page_size": page_size, "max_requests": max_requests,
            "num_kv_heads": num_kv_heads, "head_dim": head_dim, "v_head_dim": v_head_dim,
        }  # fmt: skip
        for name, size in sizes.items():
            least = 2 if name == "num_pages" else 1
            if isinstance(size, bool) or not isinstance(size, int) or size < least:
                why = "Page 0 is reserved for padding tokens." if name == "num_pages" else None
                raise OptionsError(
                    message(f"PagedKVCache({name}={size!r}): it is a whole number from {least} on", why=why)
                )
        self.num_layers, self.num_pages, self.page_size = num_layers, num_pages, page_size
        self.max_requests, self.num_kv_heads, self.head_dim = max_requests, num_kv_heads, head_dim
        self.v_head_dim = v_head_dim
        self.dtype = dtype if dtype is not None else torch.get_default_dtype()
        pages, slots = (num_pages, page_size, num_kv_heads), (num_pages * page_size, num_kv_heads)
        with torch.inference_mode(False):
            self.k = [torch.zeros((*pages, head_dim), dtype=self.dtype, device=device) for _ in range(num_layers)]
            self.v = [torch.zeros((*pages, v_head_dim), dtype=self.dtype, device=device) for _ in range(num_layers)]
            # Rows of fp8 are written as bytes: PyTorch has no index_copy for it.
            stored = torch.uint8 if self.dtype in _FP8 else self.dtype
            self.flat_k = [k.view(stored).view(*slots, head_dim) for k in self.k]
            self.flat_v = [v.view(stored).view(*slots, v_head_dim) for v in self.v]
        self.device = self.k[0].device
        self.k_scale = self._scales("k_scale", k_scale)
        self.v_scale = self._scales("v_scale", v_scale)
        self.staging = StagingRing(self.device)
        #: Identity of the static memory: what is captured with one cache serves no other.
        self.key = object()
        self.current: Prepared | None = None
        #: Held by the step that the cache is in: taking it and asking whether it is free are one thing.
        self.step_lock = threading.Lock()
        #: Whether a user was told that no attention uses it.
        self.warned = False
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
        self._spans: dict[int, torch.Tensor] = {}
        self._impls: dict[str, AttentionImpl] = {}
        #: Why an attention shape is not computed by the device's fast implementation, by encoded shape.
        self.reasons: dict[str, str] = {}
        #: Memory that implementations share on this cache's device, by name.
        self.workspaces: dict[str, Any] = {}
        self._free = list(range(num_pages - 1, 0, -1))

    def _scales(self, name: str, given: float | torch.Tensor) -> list[torch.Tensor] | None:
        if self.dtype not in _FP8:
            return None
        with torch.inference_mode(False):
            scale = torch.as_tensor(given, dtype=torch.float32).detach()
            if scale.shape not in ((), (self.num_kv_heads,)) or not bool((scale > 0).all() and scale.isfinite().all()):
                why = f"It is a number above 0, or {self.num_kv_heads} of them."
                raise OptionsError(message(f"PagedKVCache({name}={given!r})", why=why))
            per_head = scale.to(self.device).expand(self.num_kv_heads)
            return [per_head.clone() for _ in range(self.num_layers)]

    def layer(self, index: int, sinks: torch.Tensor | None, slopes: torch.Tensor | None) -> Layer:
        """What attention reads of a layer beside its keys and values."""
        k_scale, v_scale = (None if s is None else s[index] for s in (self.k_scale, self.v_scale))
        return Layer(sinks, slopes, k_scale, v_scale)

    def __repr__(self) -> str:
        return (
            f"PagedKVCache({self.num_layers} layers, {self.num_pages} pages of {self.page_size} tokens, "
            f"{self.num_kv_heads} x {self.head_dim}, {self.dtype}, {self.device})"
        )

    @property
    def in_step(self) -> bool:
        """Whether a step is running with it."""
        return self.step_lock.locked()

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` free pages.

        Raises:
            BatchError: fewer are free.
        """
        if count < 0 or count > len(self._free):
            raise BatchError(f"{count} pages wanted, {len(self._free)} of {self.num_pages - 1} are free")
        return [self._free.pop() for _ in range(count)]

    def free(self, pages: list[int]) -> None:
        """Gives pages back.

        Raises:
            BatchError: a page that is not in use.
        """
        free = set(self._free)
        for page in pages:
            if page in free or not 0 < page < self.num_pages:
                raise BatchError(f"page {page} is not in use, so that it cannot be freed")
            free.add(page)
        self._free.extend(pages)

    @property
    def free_pages(self) -> int:
        """Pages that :meth:`allocate` has left."""
        return len(self._free)

    def check(self, layer: int, shape: AttentionShape, device: torch.device) -> None:
        """Raises :class:`BatchError` where a module does not fit the cache."""
        if not 0 <= layer < self.num_layers:
            raise BatchError(
                message(
                    f"attention layer {layer} has no place in a cache of {self.num_layers} layers",
                    cure=f"Make the cache with PagedKVCache(num_layers={layer + 1}, ...) or more",
                )
            )
        stored = self.dtype if self.dtype in _FP8 else shape.dtype
        theirs = (shape.num_kv_heads, shape.head_dim, shape.v_dim, stored, device)
        ours = (self.num_kv_heads, self.head_dim, self.v_head_dim, self.dtype, self.device)
        if theirs == ours:
            return
        names = ("num_kv_heads", "head_dim", "v_head_dim", "dtype", "device")
        wrong = [i for i in range(len(names)) if theirs[i] != ours[i]]
        raise BatchError(
            message(
                f"attention layer {layer} and the cache differ: "
                + ", ".join(f"{names[i]} is {theirs[i]} in the layer, {ours[i]} in the cache" for i in wrong),
                cure="Make the cache with " + ", ".join(f"{names[i]}={theirs[i]}" for i in wrong),
            )
        )

    def impl(self, text: str) -> AttentionImpl:
        """The implementation for an encoded attention shape."""
        impl = self._impls.get(text)
        if impl is None:
            shape = AttentionShape.decode(text)
            kind, reason = choose_impl(shape, self.device, self.dtype)
            if reason is not None:
                self.reasons[text] = f"attention in plain PyTorch: {reason}"
                _LOG.warning("attention %s runs in plain PyTorch on %s: %s", text, self.device, reason)
            impl = self._impls[text] = kind(shape, self)
            if impl.exact_pages and not self.exact_pages:
                # What is prepared may list more.
                self.exact_pages, self.current = True, None
        return impl

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
        advance(prepared.tokens, kv_lens, kv_indptr, kv_indices, batch.num_requests, steps, self.page_size)
        prepared.batch = batch
        prepared.__dict__.pop("padded", None)
        for text in [text for text in prepared.plans if not self._impls[text].plan_lasts]:
            del prepared.plans[text]

    def _write(self, batch: Batch, made_for: tuple[int, int, int | None], forced: bool) -> Prepared:
        bucket, rows, entries = made_for
        tables, capacity = self.tables(batch), _capacity(bucket)
        layout = Layout(tables, rows, entries, spare=not self.exact_pages)
        # A batch of padding has none.
        area, begin, tokens = self._area(capacity), 6 * capacity, len(tables.positions)
        words = begin + layout.words
        # A little more is copied than there is, so that steps of about one size share their views, which cost as much
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
