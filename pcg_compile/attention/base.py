"""What an attention implementation is: it plans once a step and shape, and runs with arguments bound."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental.symbolic_shapes import guard_scalar

if TYPE_CHECKING:
    from .cache import PagedKVCache, Prepared

__all__ = ["AttentionImpl", "AttentionShape"]


@dataclass(frozen=True)
class AttentionShape:
    """Everything that one attention plan depends on, beside the batch.

    Attributes:
        num_heads, num_kv_heads, head_dim: numbers of heads and elements a head.
        window: keys that a token sees, itself included; None for all. As ``sliding_window`` in transformers.
        softcap: scores become ``softcap * tanh(score / softcap)``; None for no cap.
        scale: what scores are multiplied by.
        dtype: of queries, keys, values and results.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    softcap: float | None
    scale: float
    dtype: torch.dtype

    def encode(self) -> str:
        """As text, which an op can take as an argument; :meth:`decode` reads it."""
        return encode_shape(
            self.num_heads, self.num_kv_heads, self.head_dim, self.window, self.softcap, self.scale, self.dtype
        )

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(text: str) -> AttentionShape:
        """The shape that :meth:`encode` wrote; the same object for the same text."""
        heads, kv_heads, head_dim, window, softcap, scale, dtype = text.split(",")
        return AttentionShape(
            int(heads),
            int(kv_heads),
            int(head_dim),
            None if window == "None" else int(window),
            None if softcap == "None" else float(softcap),
            float(scale),
            getattr(torch, dtype.removeprefix("torch.")),
        )


def encode_shape(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype,
) -> str:
    """:meth:`AttentionShape.encode` as a plain function, which Dynamo traces to a constant.

    With ``dynamic=True``, or where layers that share their code differ in it, a number is symbolic: it is specialized.
    """
    heads, kv_heads, size = guard_scalar(num_heads), guard_scalar(num_kv_heads), guard_scalar(head_dim)
    seen = None if window is None else guard_scalar(window)
    cap = None if softcap is None else guard_scalar(softcap)
    return f"{heads},{kv_heads},{size},{seen},{cap},{guard_scalar(scale)},{dtype}"


class AttentionImpl(ABC):
    """Paged attention for one shape over one cache.

    A step calls :meth:`plan` once, then what :meth:`bind` returned for each layer. What a plan reads stays as it is
    until the cache is prepared for another batch.
    """

    def __init__(self, shape: AttentionShape, cache: PagedKVCache) -> None:
        self.shape = shape
        self.device = cache.device
        self.page_size = cache.page_size
        self.staging = cache.staging
        #: Whether a recording of the whole step may hold it: a plan made for fixed request slots then lies in static
        #: memory, and a recording serves every batch whose plan has the same :meth:`recording_key`.
        self.recordable = False

    def recording_key(self, plan: Any) -> Hashable:
        """What a recording of :meth:`bind`'s callable bakes in of a plan."""
        return None

    @abstractmethod
    def plan(self, prepared: Prepared) -> Any:
        """What :meth:`bind`'s callables need for one batch: from host arrays and device metadata, without a sync."""

    @abstractmethod
    def bind(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor
    ) -> Callable[[Any], None]:
        """A callable that takes a plan and writes ``out``.

        Args:
            q: ``[rows, num_heads, head_dim]``, the head's elements contiguous.
            k_cache, v_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``.
            out: like ``q``, contiguous. Every row is written, those of the padding request too.
        """
