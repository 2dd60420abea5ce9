"""The paged KV cache, and the static device memory that a step's metadata go to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import BatchError, OptionsError, message
from ..memory.staging import StagingRing
from ..padding_request import PaddedBatch
from .base import AttentionImpl, AttentionShape, Layer
from .choose import choose_impl

__all__ = ["PagedKVCache", "Prepared"]

_LOG = logging.getLogger("pcg_compile")

#: Stored with scales.
_FP8 = (torch.float8_e4m3fn,)

#: Words that the size of a step's metadata is rounded up to.
_ROUND = 64


class Prepared:
    """The metadata of one batch, padded, on the host and on the device. Valid while ``cache.current`` is this object.

    Attributes:
        made_for: bucket, rows and request entries. static: whether all of it lies at addresses that stay.
        bucket: tokens that ``slots`` covers. padded: the host side; ``padded.bucket`` rows of q are attended.
        longest: most new tokens of a request. spans: ``[rows, 2]`` int32 on the device, positions from and up to which
            a token sees keys beside those of the mask; None where the batch has none.
        slots: ``[bucket]`` int64, static.
        arrays: int32 on the cache's device, in the order of ``padded.array()``; kv_indices with room behind them.
        plans: what each attention shape planned. enqueued: shapes whose plan's work on the device is under way.
    """

    __slots__ = (
        "arrays", "bucket", "enqueued", "longest", "made_for", "padded", "plans", "rows", "slots", "spans", "static",
    )  # fmt: skip

    def __init__(
        self, padded: PaddedBatch, bucket: int, slots: torch.Tensor, arrays: Sequence[torch.Tensor], static: bool
    ) -> None:
        self.padded, self.bucket, self.slots, self.arrays = padded, bucket, slots, arrays
        self.rows, self.static = padded.bucket, static
        self.made_for = (bucket, padded.bucket, padded.request_slots)
        self.longest = padded.longest
        self.spans: torch.Tensor | None = None
        self.plans: dict[str, Any] = {}
        self.enqueued: set[str] = set()

    def array(self, index: int) -> torch.Tensor:
        """On the device, what ``padded.array(index)`` is on the host."""
        return self.arrays[index][: self.padded.sizes[index]]


class PagedKVCache:
    """Keys and values of all layers, in pages.

    Page 0 is reserved: padding tokens are written there, and no request may use it. A cache serves one step at a
    time.

    Attributes:
        k, v: one ``[num_pages, page_size, num_kv_heads, head_dim]`` tensor a layer. Their addresses never change.
        k_scale, v_scale: of an fp8 cache, one ``[num_kv_heads]`` float32 tensor a layer: a stored number times its
            head's scale is the key or value. Change them in place, ahead of what is stored. None for other dtypes.

    Captured graphs read, beside keys and values, only the slot mapping, which has one storage for each power of two of
    tokens that lives as long as the cache. The rest of the metadata are read by attention, between the graphs: where
    a batch has more than ``max_requests`` requests (or more page entries than the cache has pages), they go to a
    buffer that doubles, and nothing need be captured again.
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
        #: By capacity in tokens: the slots as int64, behind them the other metadata; and views of the slots.
        self._areas: dict[int, torch.Tensor] = {}
        self._slots: dict[int, torch.Tensor] = {}
        #: Views of both, by the words or the tokens that they begin with.
        self._heads: dict[tuple[int, int], torch.Tensor] = {}
        self._mappings: dict[int, torch.Tensor] = {}
        #: Views of them, by the words of the slots and the number of requests.
        self._arrays: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
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
        return impl

    def slot_mapping(self, bucket: int) -> torch.Tensor:
        """``[bucket]`` int64: the slot of every token, 0 for padding. Its address never changes."""
        mapping = self._mappings.get(bucket)
        if mapping is None:
            capacity = _capacity(bucket)
            self._area(capacity)
            mapping = self._mappings[bucket] = self._slots[capacity][:bucket]
        return mapping

    def _area(self, capacity: int) -> torch.Tensor:
        area = self._areas.get(capacity)
        if area is None:
            requests = min(capacity, self.max_requests) + 1
            words = 2 * capacity + 4 * (requests + 4) + self.num_pages - (-capacity // self.page_size) + _ROUND
            with torch.inference_mode(False):
                area = self._areas[capacity] = torch.zeros(words, dtype=torch.int32, device=self.device)
                self._slots[capacity] = area.narrow(0, 0, 2 * capacity).view(torch.int64)
        return area

    def write(self, padded: PaddedBatch, bucket: int) -> Prepared:
        """Brings a batch's metadata to the device, in one copy where they fit. What was prepared before is invalid.

        Args:
            padded: the batch at the number of rows that attention sees. bucket: tokens that pieces see, which get
                slot 0 from the real tokens on.
        """
        capacity, flat = _capacity(bucket), padded.flat
        area = self._area(capacity)
        slot_words, tokens = 2 * capacity, padded.tokens
        words = slot_words + len(flat)
        # A little more is copied than there is, so that steps of about one size share their views, which cost as much
        # as the copy.
        rounded = -(-words // _ROUND) * _ROUND
        static = rounded <= area.numel()
        buffer = self.staging.take(4 * rounded)
        slots = buffer.long_array
        slots[:tokens] = padded.slots
        slots[tokens:capacity] = 0
        buffer.word_array[slot_words:words] = flat
        if static:
            head = self._heads.get((capacity, rounded))
            if head is None:
                head = self._heads[capacity, rounded] = area[:rounded]
            head.copy_(buffer.first(rounded, longs=False), True)
            arrays = self._arrays.get((slot_words, padded.requests))
            if arrays is None:
                arrays = self._arrays[slot_words, padded.requests] = _split(area[slot_words:], padded)
        else:
            area[:slot_words].copy_(buffer.words[:slot_words], non_blocking=True)
            device = self._overflow_of(len(flat))
            device.copy_(buffer.words[slot_words:words], non_blocking=True)
            arrays = _split(device, padded)
        buffer.sent()
        prepared = Prepared(padded, bucket, self.slot_mapping(bucket), arrays, static)
        if padded.spans is not None:
            prepared.spans = self._write_spans(padded, capacity)
        self.current = prepared
        return prepared

    def _write_spans(self, padded: PaddedBatch, capacity: int) -> torch.Tensor:
        """Spans of all rows, those of the padding request its own positions; at an address that stays."""
        assert padded.spans is not None
        area = self._spans.get(capacity)
        if area is None:
            with torch.inference_mode(False):
                area = self._spans[capacity] = torch.zeros((capacity, 2), dtype=torch.int32, device=self.device)
        rows = padded.bucket
        own = np.arange(rows - padded.tokens, dtype=np.int32)[:, None].repeat(2, 1)
        self.staging.send(np.concatenate([padded.spans, own]), area[:rows])
        return area[:rows]

    def _overflow_of(self, words: int) -> torch.Tensor:
        if self._overflow is None or self._overflow.numel() < words:
            with torch.inference_mode(False):
                self._overflow = torch.zeros(1 << (words - 1).bit_length(), dtype=torch.int32, device=self.device)
        return self._overflow.narrow(0, 0, words)


def _split(device: torch.Tensor, padded: PaddedBatch) -> tuple[torch.Tensor, ...]:
    *fixed, indices = padded.starts
    return (*(device[start : start + size] for start, size in zip(fixed, padded.sizes, strict=False)), device[indices:])


def _capacity(bucket: int) -> int:
    """Tokens that the storage for a bucket's slots holds: a power of two."""
    return max(16, 1 << (bucket - 1).bit_length())
