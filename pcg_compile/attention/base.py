"""What an attention implementation is: it plans once a step and shape, and runs with arguments bound."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import guard_scalar

if TYPE_CHECKING:
    from .cache import PagedKVCache, Prepared

__all__ = ["PLAIN", "AttentionImpl", "AttentionShape", "Layer"]


@dataclass(frozen=True)
class AttentionShape:
    """Everything that one attention plan depends on, beside the batch.

    Attributes:
        num_heads, num_kv_heads, head_dim: numbers of heads and elements a head.
        window: keys that a token sees, itself included; None for all. As ``sliding_window`` in transformers. Without
            ``causal``, as many on each side.
        softcap: scores become ``softcap * tanh(score / softcap)``; None for no cap.
        scale: what scores are multiplied by.
        dtype: of queries and results, and of new keys and values.
        causal: whether a token sees no later ones.
        chunk: a token sees only keys of its own chunk of as many positions; None for all. As ``attention_chunk_size``.
        v_head_dim: elements of a value head; None for ``head_dim``.
        backend: the option ``attention_backend``.
        extras: what layers have beside: "s" for sinks, "a" for ALiBi slopes; see :class:`Layer`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    softcap: float | None
    scale: float
    dtype: torch.dtype
    causal: bool = True
    chunk: int | None = None
    v_head_dim: int | None = None
    backend: str = "auto"
    extras: str = ""

    @property
    def v_dim(self) -> int:
        """Elements of a value head."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def encode(self) -> str:
        """As text, which an op can take as an argument; :meth:`decode` reads it."""
        return encode_shape(*(getattr(self, field.name) for field in fields(self)))

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(text: str) -> AttentionShape:
        """The shape that :meth:`encode` wrote; the same object for the same text."""
        return AttentionShape(*map(_read, text.split(",")))


def _read(text: str) -> Any:
    """A field of an encoded shape."""
    if text in _WORDS:
        return _WORDS[text]
    if text.startswith("torch."):
        return getattr(torch, text.removeprefix("torch."))
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        return text


_WORDS = {"None": None, "True": True, "False": False}


def encode_shape(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype,
    causal: bool = True,
    chunk: int | None = None,
    v_head_dim: int | None = None,
    backend: str = "auto",
    extras: str = "",
) -> str:
    """:meth:`AttentionShape.encode` as a plain function, which Dynamo traces to a constant.

    With ``dynamic=True``, or where layers that share their code differ in it, a number is symbolic: it is specialized.
    """
    heads, kv_heads, size = guard_scalar(num_heads), guard_scalar(num_kv_heads), guard_scalar(head_dim)
    seen = None if window is None else guard_scalar(window)
    cap = None if softcap is None else guard_scalar(softcap)
    piece = None if chunk is None else guard_scalar(chunk)
    value = None if v_head_dim is None else guard_scalar(v_head_dim)
    numbers = f"{heads},{kv_heads},{size},{seen},{cap},{guard_scalar(scale)},{dtype}"
    return f"{numbers},{causal},{piece},{value},{backend},{extras}"


class Layer(NamedTuple):
    """Tensors of one layer that attention reads, None where it has none.

    Attributes:
        sinks: ``[num_heads]``, a score per head that takes part in the softmax without a value (gpt-oss).
        slopes: ``[num_heads]``, ALiBi: a score grows by ``slope * (key position - query position)``.
        k_scale, v_scale: ``[num_kv_heads]`` float32, what stored fp8 keys and values are multiplied by.
    """

    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


#: A layer that has none of them.
PLAIN = Layer()


class AttentionImpl(ABC):
    """Paged attention for one shape over one cache.

    A step calls :meth:`plan` and :meth:`enqueue` once, then what :meth:`bind` returned for each layer. What a plan
    reads stays as it is until the cache is prepared for another batch.

    Attributes:
        capturable: whether a full CUDA graph may hold :meth:`enqueue` and what :meth:`bind` returns: both read whatever
            changes from batch to batch from device memory at fixed addresses, for the same :meth:`capture_key`.
        plan_lasts: whether a plan serves the decode steps that follow as well, all of which it reads from the device.
        exact_pages: whether the device's page lists must hold no page that a request does not need yet.
    """

    capturable = plan_lasts = exact_pages = False

    def __init__(self, shape: AttentionShape, cache: PagedKVCache) -> None:
        self.shape = shape
        self.device = cache.device
        self.page_size = cache.page_size
        self.staging = cache.staging

    def capture_key(self, prepared: Prepared) -> Hashable:
        """What a capture of :meth:`enqueue` and :meth:`bind`'s callable bakes in, beside the sizes of ``prepared``."""
        return None

    @abstractmethod
    def plan(self, prepared: Prepared) -> Any:
        """What :meth:`bind`'s callables need for one batch: from host arrays and device metadata, without a sync."""

    def workspaces(self) -> Sequence[Any]:
        """Tensors that this shape keeps for its plans, beside those that shapes share (``cache.workspaces``)."""
        return ()

    def enqueue(self, plan: Any) -> None:  # noqa: B027 - most implementations have none
        """The plan's own work on the device, ahead of all layers; part of a full CUDA graph."""

    @abstractmethod
    def bind(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        layer: Layer = PLAIN,
    ) -> Callable[[Any], None]:
        """A callable that takes a plan and writes ``out``.

        Args:
            q: ``[rows, num_heads, head_dim]``, the head's elements contiguous.
            k_cache, v_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, of ``v_dim`` for values.
            out: ``[rows, num_heads, v_dim]``, contiguous. Every row is written, those of the padding request too.
            layer: tensors of the layer.
        """
