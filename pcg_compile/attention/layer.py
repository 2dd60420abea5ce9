"""Paged attention as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..errors import BatchError, OptionsError, message
from . import ops as _ops  # noqa: F401 - defines the op

__all__ = ["PagedAttention"]


class PagedAttention(nn.Module):
    """Causal attention of one layer over the step's paged cache; it writes the new keys and values there too.

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
    ) -> None:
        """
        Args:
            layer: its place in the cache, from 0 on.
            num_heads, num_kv_heads, head_dim: query heads, key heads, elements a head.
            window: keys that a token sees, itself included; None for all before it.
            softcap: scores become ``softcap * tanh(score / softcap)``.
            scale: what scores are multiplied by; None: ``head_dim ** -0.5``.

        Raises:
            OptionsError: numbers out of range, or key heads that do not divide the query heads.
        """
        super().__init__()
        whole = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        if window is not None:
            whole["window"] = window
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
        self.layer = layer
        cap, factor = None if softcap is None else float(softcap), head_dim**-0.5 if scale is None else float(scale)
        #: All numbers but the layer's in one text: Dynamo guards what forward reads, at every step, once a layer.
        self._numbers = f"{num_heads},{num_kv_heads},{head_dim},{window},{cap},{factor}"

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q ``[tokens, num_heads, head_dim]``, k and v ``[tokens, num_kv_heads, head_dim]`` -> like q, contiguous.

        Raises:
            BatchError: no step or no cache, other shapes, another number of tokens than the batch's, or a cache that
                the layer does not fit.
        """
        numbers = self._numbers
        heads, kv_heads, head_dim, _, _, _ = numbers.split(",")
        check_qkv(q, k, v, int(heads), int(kv_heads), int(head_dim))
        return torch.ops.pcg.paged_attention(q, k, v, self.layer, f"{numbers},{q.dtype}")

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return int(self._numbers.split(",")[0])

    @property
    def num_kv_heads(self) -> int:
        """Key heads."""
        return int(self._numbers.split(",")[1])

    @property
    def head_dim(self) -> int:
        """Elements a head."""
        return int(self._numbers.split(",")[2])

    @property
    def window(self) -> int | None:
        """Keys that a token sees, itself included; None for all before it."""
        text = self._numbers.split(",")[3]
        return None if text == "None" else int(text)

    @property
    def softcap(self) -> float | None:
        """Scores become ``softcap * tanh(score / softcap)``; None for no cap."""
        text = self._numbers.split(",")[4]
        return None if text == "None" else float(text)

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(self._numbers.split(",")[5])

    def extra_repr(self) -> str:
        """Its numbers, for ``print(model)``."""
        return (
            f"layer={self.layer}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, window={self.window}, softcap={self.softcap}, scale={self.scale}"
        )


def _is_number(value: Any) -> bool:
    """Whether it is a finite number: a cap of infinity, for one, makes every score NaN."""
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False


def check_qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    """Raises :class:`BatchError` where q, k, v are not packed tokens of one dtype."""
    # Each look at a shape takes Dynamo some 3 ms, in every layer of a model.
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    if (
        of_k == of_v
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
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[1] != num_kv_heads or tensor.shape[2] != head_dim:
            raise BatchError(
                f"{name} has {tensor.shape[1]} heads of {tensor.shape[2]}, the layer {num_kv_heads} of {head_dim}"
            )
        if tensor.shape[0] != q.shape[0]:
            raise BatchError(f"{name} has {tensor.shape[0]} tokens, q has {q.shape[0]}")
        if tensor.dtype != q.dtype:
            raise BatchError(f"{name} is {tensor.dtype}, q is {q.dtype}")
