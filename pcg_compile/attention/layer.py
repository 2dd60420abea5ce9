"""Paged attention as a module."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from ..errors import BatchError, OptionsError, message
from . import ops as _ops  # noqa: F401 - defines the op
from .base import AttentionShape

__all__ = ["PagedAttention"]


class PagedAttention(nn.Module):
    """Attention of one layer over the step's paged cache; it writes the new keys and values there too.

    It works inside :func:`pcg_compile.step`, compiled or not. The number of key heads may divide that of query heads
    (grouped queries).
    """

    def __init__(
        self,
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        *,
        causal: bool = True,
        chunk: int | None = None,
        v_head_dim: int | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            layer: its place in the cache, from 0 on.
            num_heads, num_kv_heads, head_dim: query heads, key heads, elements a head.
            window: keys that a token sees, itself included; None for all before it. Without ``causal``, as many on each
                side.
            softcap: scores become ``softcap * tanh(score / softcap)``.
            scale: what scores are multiplied by; None: ``head_dim ** -0.5``.
            causal: whether a token sees no later ones; without it, all tokens of its request that are in the cache.
            chunk: a token sees only keys of its own chunk of as many positions.
            v_head_dim: elements of a value head; None: ``head_dim``.
            sinks: ``[num_heads]``, a score per head that takes part in the softmax without a value.
            alibi_slopes: ``[num_heads]``; a score grows by ``slope * (key position - query position)``.

        Raises:
            OptionsError: numbers out of range, key heads that do not divide the query heads, tensors of another size.
        """
        super().__init__()
        whole = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, value in (("window", window), ("chunk", chunk), ("v_head_dim", v_head_dim)):
            if value is not None:
                whole[name] = value
        for name, value in (("layer", layer), *whole.items()):
            least = 0 if name == "layer" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionsError(f"PagedAttention({name}={value!r}): it is a whole number from {least} on")
        if num_heads % num_kv_heads:
            raise OptionsError(
                message(
                    f"{num_heads} query heads cannot share {num_kv_heads} key heads",
                    why="The number of key heads divides that of query heads.",
                )
            )
        if softcap is not None and not (_is_number(softcap) and softcap > 0):
            raise OptionsError(f"PagedAttention(softcap={softcap!r}): it is a number above 0, or None")
        if scale is not None and not _is_number(scale):
            raise OptionsError(f"PagedAttention(scale={scale!r}): it is a number, or None")
        if not isinstance(causal, bool):
            raise OptionsError(f"PagedAttention(causal={causal!r}): it is True or False")
        for name, tensor in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
            if tensor is not None and (not isinstance(tensor, torch.Tensor) or tensor.shape != (num_heads,)):
                given = list(tensor.shape) if isinstance(tensor, torch.Tensor) else tensor
                raise OptionsError(f"PagedAttention({name}={given!r}): it is a tensor [{num_heads}], one number a head")
        self.layer = layer
        #: Parameters stay what they are; plain tensors become buffers.
        self.sinks: torch.Tensor | None
        self.alibi_slopes: torch.Tensor | None
        for name, tensor in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        cap, factor = None if softcap is None else float(softcap), head_dim**-0.5 if scale is None else float(scale)
        #: All numbers but the layer's in one text: Dynamo guards what forward reads, at every step, once a layer.
        self._numbers = f"{num_heads},{num_kv_heads},{head_dim},{window},{cap},{factor}"
        extras = ("" if sinks is None else "s") + ("" if alibi_slopes is None else "a")
        self._more = f"{causal},{chunk},{None if v_head_dim == head_dim else v_head_dim},auto,{extras}"

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q ``[tokens, num_heads, head_dim]``, k and v ``[tokens, num_kv_heads, head_dim]`` -> like q, contiguous.

        With another ``v_head_dim`` v and the result have heads of that size.

        Raises:
            BatchError: no step or no cache, other shapes, another number of tokens than the batch's, or a cache that
                the layer does not fit.
        """
        numbers = self._numbers
        heads, kv_heads, head_dim, _, _, _ = numbers.split(",")
        v_dim = self._more.split(",")[2]
        check_qkv(q, k, v, int(heads), int(kv_heads), int(head_dim), int(head_dim if v_dim == "None" else v_dim))
        shape = f"{numbers},{q.dtype},{self._more}"
        if self.sinks is None and self.alibi_slopes is None:
            result: torch.Tensor = torch.ops.pcg.paged_attention(q, k, v, self.layer, shape)
        else:
            result = torch.ops.pcg.paged_attention(q, k, v, self.layer, shape, self.sinks, self.alibi_slopes)
        return result

    @property
    def _shape(self) -> AttentionShape:
        return AttentionShape.decode(f"{self._numbers},torch.float32,{self._more}")

    num_heads = property(lambda self: self._shape.num_heads, doc="Query heads.")
    num_kv_heads = property(lambda self: self._shape.num_kv_heads, doc="Key heads.")
    head_dim = property(lambda self: self._shape.head_dim, doc="Elements a head.")
    window = property(lambda self: self._shape.window, doc="Keys that a token sees, itself included; None for all.")
    softcap = property(lambda self: self._shape.softcap, doc="``softcap * tanh(score / softcap)``; None for no cap.")
    scale = property(lambda self: self._shape.scale, doc="What scores are multiplied by.")
    causal = property(lambda self: self._shape.causal, doc="Whether a token sees no later ones.")
    chunk = property(lambda self: self._shape.chunk, doc="Positions of a chunk that a token sees; None for all.")
    v_head_dim = property(lambda self: self._shape.v_dim, doc="Elements of a value head.")

    def extra_repr(self) -> str:
        """Its numbers, for ``print(model)``."""
        shape, more = self._shape, []
        for one in fields(shape)[7:10]:
            if getattr(shape, one.name) != one.default:
                more.append(f"{one.name}={getattr(shape, one.name)}")
        more += [name for name in ("sinks", "alibi_slopes") if getattr(self, name) is not None]
        first = [f"{one.name}={getattr(shape, one.name)}" for one in fields(shape)[:6]]
        return ", ".join([f"layer={self.layer}", *first, *more])


def _is_number(value: Any) -> bool:
    """Whether it is a finite number: a cap of infinity, for one, makes every score NaN."""
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False


def check_qkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
) -> None:
    """Raises :class:`BatchError` where q, k, v are not packed tokens of one dtype."""
    # Each look at a shape takes Dynamo some 3 ms, in every layer of a model.
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    v_dim = head_dim if v_head_dim is None else v_head_dim
    if (
        (of_k == of_v if v_dim == head_dim else of_v == (of_k[0], num_kv_heads, v_dim))
        and of_q[1:] == (num_heads, head_dim)
        and of_k[1:] == (num_kv_heads, head_dim)
        and of_q[0] == of_k[0]
        and q.dtype == k.dtype == v.dtype
    ):
        return
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise BatchError("paged attention takes q, k, v of 3 dimensions: [tokens, heads, head_dim], requests packed")
    if q.shape[1] != num_heads or q.shape[2] != head_dim:
        raise BatchError(f"q has {q.shape[1]} heads of {q.shape[2]}, the layer {num_heads} of {head_dim}")
    for name, tensor, size in (("k", k, head_dim), ("v", v, v_dim)):
        if tensor.shape[1] != num_kv_heads or tensor.shape[2] != size:
            raise BatchError(
                f"{name} has {tensor.shape[1]} heads of {tensor.shape[2]}, the layer {num_kv_heads} of {size}"
            )
        if tensor.shape[0] != q.shape[0]:
            raise BatchError(f"{name} has {tensor.shape[0]} tokens, q has {q.shape[0]}")
        if tensor.dtype != q.dtype:
            raise BatchError(f"{name} is {tensor.dtype}, q is {q.dtype}")
