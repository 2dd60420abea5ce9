"""The paged KV cache, and the static device memory that a step's metadata go to."""

from __future__ import annotations

import logging
import threading

import torch
from torch.utils._pytree import tree_leaves

from ..errors import BatchError, OptionsError, message
from .base import AttentionCall, AttentionImpl, AttentionShape, CacheMemory
from .choose import BACKENDS, choose_impl
from .step_metadata import StepMetadata

__all__ = ["PagedKVCache"]

_LOG = logging.getLogger("pcg_compile")

#: Stored with scales.
_FP8 = (torch.float8_e4m3fn,)


class PagedKVCache(StepMetadata):
    """Keys and values of all layers, in pages.

    Page 0 is reserved: padding tokens are written there, and no request may use it. A cache serves one step at a
    time.

    Attributes:
        k, v: one ``[num_pages, page_size, num_kv_heads, head_dim]`` tensor a layer. Their addresses never change.
        k_scale, v_scale: of an fp8 cache, one ``[num_kv_heads]`` float32 tensor a layer: a stored number times its
            head's scale is the key or value. Change them in place, ahead of what is stored. None for other dtypes.
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
        self.num_layers = num_layers
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
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
        super().__init__(num_pages, page_size, max_requests, self.k[0].device)
        self.k_scale = self._scales("k_scale", k_scale)
        self.v_scale = self._scales("v_scale", v_scale)
        #: Identity of the static memory: what is captured with one cache serves no other.
        self.key = object()
        #: Held by the step that the cache is in: taking it and asking whether it is free are one thing.
        self.step_lock = threading.Lock()
        #: Whether a user was told that no attention uses it.
        self.warned = False
        self.memory = CacheMemory(self.device, page_size, self.dtype, self.staging)
        self._impls: dict[tuple[str, str], AttentionImpl] = {}
        #: Names of the implementations, by encoded shape; by shape and rows of q, those that warm-up found faster.
        self._names: dict[str, str] = {}
        self.faster: dict[tuple[str, int], str] = {}
        #: Why an attention shape is not computed by the device's fast implementation, by encoded shape.
        self.reasons: dict[str, str] = {}
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

    def call(self, layer: int, q: torch.Tensor, out: torch.Tensor, *extra: torch.Tensor | None) -> AttentionCall:
        """Attention of one layer; ``extra``: its sinks and ALiBi slopes, where it has them."""
        sinks, slopes = (*extra, None, None)[:2]
        k_scale, v_scale = (None if s is None else s[layer] for s in (self.k_scale, self.v_scale))
        return AttentionCall(q, self.k[layer], self.v[layer], out, sinks, slopes, k_scale, v_scale)

    def workspace_nbytes(self) -> int:
        """Bytes that attention has taken for partial results and plans, beside the cache itself."""
        held = tree_leaves([self.memory.workspaces, *(impl.workspaces() for impl in self._impls.values())])
        return sum(tensor.nbytes for tensor in held)

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
                raise BatchError(f"page {page} is not in use, so it cannot be freed")
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

    def impl(self, text: str, rows: int = 0) -> AttentionImpl:
        """The implementation for an encoded attention shape, with q of so many rows."""
        name = self.faster.get((text, rows)) or self._names.get(text)
        if name is None:
            kind, reason = choose_impl(AttentionShape.decode(text), self.device, self.dtype)
            name = self._names[text] = kind.name
            if reason is not None:
                self.reasons[text] = f"attention in plain PyTorch: {reason}"
                _LOG.warning("attention %s runs in plain PyTorch on %s: %s", text, self.device, reason)
        impl = self.impl_named(text, name)
        if impl.exact_pages and not self.exact_pages:
            # What is prepared may list more.
            self.exact_pages = True
            self.current = None
        return impl

    def impl_named(self, text: str, name: str) -> AttentionImpl:
        """One implementation for an encoded attention shape, made once."""
        impl = self._impls.get((text, name))
        if impl is None:
            impl = self._impls[text, name] = BACKENDS[name](AttentionShape.decode(text), self.memory)
        return impl
