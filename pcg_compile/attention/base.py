"""What an attention implementation is: it plans once a step and shape, and runs once a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx.experimental.symbolic_shapes import guard_scalar

from ..memory.staging import StagingRing

if TYPE_CHECKING:
    from .prepared import Prepared

__all__ = ["AttentionCall", "AttentionImpl", "AttentionShape", "CacheMemory", "encode_shape"]


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
        extras: what layers have beside: "s" for sinks, "a" for ALiBi slopes; see :class:`AttentionCall`.
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


def encode_shape(*values: Any) -> str:
    """:meth:`AttentionShape.encode` as a plain function of all fields in order, which Dynamo traces to a constant.

    With ``dynamic=True``, or where layers that share their code differ in it, a number is symbolic: it is specialized.
    """
    plain = [v if v is None or isinstance(v, (bool, str, torch.dtype)) else guard_scalar(v) for v in values]
    return ",".join([str(v) for v in plain])


@dataclass(eq=False)
class AttentionCall:
    """The tensors of one layer's attention. They are bound once, and serve every step that finds them at their place.

    Attributes:
        q: ``[rows, num_heads, head_dim]``.
        k_cache, v_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, of ``v_dim`` for values.
        out: ``[rows, num_heads, v_dim]``, contiguous. Every row is written, those of the padding request too.
        sinks: ``[num_heads]``, a score per head that takes part in the softmax without a value (gpt-oss), or None.
        slopes: ``[num_heads]``, ALiBi: a score grows by ``slope * (key position - query position)``, or None.
        k_scale, v_scale: ``[num_kv_heads]`` float32, what stored fp8 keys and values are multiplied by, or None.
        kept: what an implementation keeps for the call, such as compiled launches.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    out: torch.Tensor
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    kept: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(eq=False)
class CacheMemory:
    """What an implementation knows of its cache.

    Attributes:
        device, page_size, dtype: of keys and values. staging: pinned memory for copies to the device.
        workspaces: memory that implementations share, by name.
    """

    device: torch.device
    page_size: int
    dtype: torch.dtype
    staging: StagingRing
    workspaces: dict[str, Any] = field(default_factory=dict)


class AttentionImpl(ABC):
    """Paged attention for one shape over one cache.

    A step calls :meth:`plan` and :meth:`enqueue` once, then :meth:`run` for each layer. What a plan reads stays as it
    is until the cache is prepared for another batch.

    Attributes:
        name: value of the option ``attention_backend``. auto_on: types of devices where "auto" takes it.
        capturable: whether a full CUDA graph may hold :meth:`enqueue` and :meth:`run`: both read whatever changes from
            batch to batch from device memory at fixed addresses, for the same :meth:`capture_key`.
        plan_lasts: whether a plan serves the decode steps that follow as well, all of which it reads from the device.
        exact_pages: whether the device's page lists must hold no page that a request does not need yet.
    """

    name: ClassVar[str]
    auto_on: ClassVar[tuple[str, ...]] = ("cuda",)
    capturable = plan_lasts = exact_pages = False

    def __init__(self, shape: AttentionShape, memory: CacheMemory) -> None:
        self.shape, self.memory = shape, memory
        self.device, self.page_size = memory.device, memory.page_size

    @classmethod
    @abstractmethod
    def why_not(cls, shape: AttentionShape, device: torch.device, kv_dtype: torch.dtype) -> str | None:
        """Why it does not compute a shape over keys of ``kv_dtype`` on a device, None where it does."""

    @classmethod
    def why_not_timed(cls, shape: AttentionShape) -> str | None:
        """Why to time it for a choice would take long, None where it would not."""
        return None

    def capture_key(self, prepared: Prepared) -> Hashable:
        """What a capture of :meth:`enqueue` and :meth:`run` bakes in, beside the sizes of ``prepared``."""
        return None

    @abstractmethod
    def plan(self, prepared: Prepared) -> Any:
        """What :meth:`run` needs for one batch: from host arrays and device metadata, without a sync."""

    def workspaces(self) -> Sequence[Any]:
        """Tensors that this shape keeps for its plans, beside those that shapes share (``memory.workspaces``)."""
        return ()

    def enqueue(self, plan: Any) -> None:  # noqa: B027 - most implementations have none
        """The plan's own work on the device, ahead of all layers; part of a full CUDA graph."""

    @abstractmethod
    def run(self, call: AttentionCall, plan: Any) -> None:
        """Attends for one layer: writes ``call.out``."""
