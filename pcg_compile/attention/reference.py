"""Paged attention in plain PyTorch, for any device and dtype.

Requests are grouped by the powers of two that their lengths lie below, and each group is computed at once, padded
to its longest request; there is no loop over tokens. ``scaled_dot_product_attention`` computes a group where it can:
there is no soft cap, no sink, no fp8 cache. The padding request is a group of its own, so the real
rows are the same numbers with and without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..metadata import Ints
from .base import AttentionCall, AttentionImpl, AttentionShape, CacheMemory

if TYPE_CHECKING:
    from .prepared import Prepared

__all__ = ["ReferenceAttention"]

#: Most scores that are in memory at once.
_MOST_SCORES = 1 << 25


class _Requests(NamedTuple):
    """A batch on the host: cumulative and single query lengths, KV lengths, pages and where each request's begin."""

    qo: Ints
    lengths: Ints
    kv_lens: Ints
    pages: Ints
    first_page: Ints
    spans: torch.Tensor | None


@dataclass
class _Group:
    """Requests computed at once: g of them, Q query rows and K keys each.

    Attributes:
        rows: ``[g * Q]`` rows of q; rows past a request's end repeat its last.
        slots: ``[g * K]`` slots of its keys; those past its end repeat its last.
        mask: ``[g, 1, 1, Q, K]`` bool, True where a query sees a key; no row is all False.
        at: ``[g, 1, 1, Q, 1]`` int64, the positions of the queries.
        take: ``[results]`` which of the g * Q results are rows of their own; None for all.
        targets: ``[results]`` the rows of ``out`` that they go to; None where they are all of them in order.
    """

    size: tuple[int, int, int]
    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor
    at: torch.Tensor
    take: torch.Tensor | None
    targets: torch.Tensor | None


class ReferenceAttention(AttentionImpl):
    """Correct everywhere, fast nowhere: keys and values are gathered in every layer."""

    name, auto_on = "reference", ()

    def __init__(self, shape: AttentionShape, memory: CacheMemory) -> None:
        super().__init__(shape, memory)
        # A replay on the CPU runs it again, with the plan of its step.
        self.capturable = self.device.type == "cpu"
        #: Whether PyTorch's fused attention computes the shape.
        self._fused = shape.softcap is None

    @classmethod
    def why_not(cls, shape: AttentionShape, device: torch.device, kv_dtype: torch.dtype) -> str | None:
        floats = shape.dtype.is_floating_point
        return None if floats else f"attention computes floating point numbers, not {shape.dtype}"

    def plan(self, prepared: Prepared) -> list[_Group]:
        padded = prepared.padded
        qo, kv_lens, first_page = (padded.array(i).astype(np.int64) for i in (0, 3, 1))
        lengths = np.diff(qo)
        # Entries that are not used have no tokens; what is last of the others is the padding, where there is any.
        lengths = lengths[: int(np.flatnonzero(lengths)[-1]) + 1]
        batch = _Requests(qo, lengths, kv_lens[: len(lengths)], padded.array(4), first_page[:-1], prepared.spans)
        order = np.arange(len(lengths))
        is_padding = order == (len(lengths) - 1 if padded.bucket > padded.tokens else -1)
        keys = np.stack([is_padding, _power(lengths), _power(batch.kv_lens)])
        groups: list[_Group | None] = []
        for key in np.unique(keys, axis=1).T:
            members = order[(keys == key[:, None]).all(0)]
            longest_q, longest_k = int(lengths[members].max()), int(batch.kv_lens[members].max())
            scores = self.shape.num_heads * longest_k
            q_chunk = max(1, min(longest_q, _MOST_SCORES // scores))
            g_chunk = max(1, _MOST_SCORES // (scores * q_chunk))
            for g in range(0, len(members), g_chunk):
                for q in range(0, longest_q, q_chunk):
                    groups.append(self._group(batch, members[g : g + g_chunk], q, min(q + q_chunk, longest_q)))
        return [group for group in groups if group is not None]

    def _group(self, batch: _Requests, members: Ints, begin: int, end: int) -> _Group | None:
        """The query rows ``begin`` to ``end`` of the members."""
        qo, lengths, kv_lens, pages, first_page, spans = batch
        members = members[lengths[members] > begin]
        if not len(members):
            return None
        qo_lens, lens = lengths[members], kv_lens[members]
        i = np.minimum(np.arange(begin, end), (qo_lens - 1)[:, None])
        real = np.arange(begin, end) < qo_lens[:, None]
        positions = (lens - qo_lens)[:, None] + i
        rows = qo[members][:, None] + i
        j = np.minimum(np.arange(int(lens.max())), (lens - 1)[:, None])
        slots = pages[first_page[members][:, None] + j // self.page_size].astype(np.int64) * self.page_size
        slots += j % self.page_size
        targets = rows[real]
        in_order = len(targets) == qo[-1] and bool((targets == np.arange(qo[-1])).all())
        at = self._device(positions)[:, None, None, :, None]
        on_device = self._device(rows.ravel())
        key = torch.arange(slots.shape[1], device=self.device)
        own = None if spans is None else spans.index_select(0, on_device).view(*rows.shape, 2)[:, None, None, :, None]
        # A row of a request that is shorter than the longest has keys behind its end: they repeat its last.
        behind = key >= self._device(lens)[:, None, None, None, None]
        return _Group(
            (len(members), end - begin, slots.shape[1]),
            on_device,
            self._device(slots.ravel()),
            self._seen(key, at, own) & ~behind,
            at,
            None if real.all() else self._device(np.flatnonzero(real.ravel())),
            None if in_order else self._device(targets),
        )

    def _seen(self, key: torch.Tensor, at: torch.Tensor, spans: torch.Tensor | None) -> torch.Tensor:
        """Which keys the tokens at some positions see."""
        shape = self.shape
        seen = key <= at if shape.causal else (key >= 0).expand(*at.shape[:-1], len(key))
        if shape.window is not None:
            seen = seen & ((key - at).abs() < shape.window)
        if shape.chunk is not None:
            seen = seen & (key // shape.chunk == at // shape.chunk)
        if spans is not None:
            seen = seen | ((key >= spans[..., 0]) & (key <= spans[..., 1]))
        return seen

    def _device(self, values: Ints) -> torch.Tensor:
        values = np.ascontiguousarray(values)
        if self.device.type == "cpu":
            return torch.from_numpy(values)
        target = torch.empty(values.shape, dtype=torch.int64, device=self.device)
        self.memory.staging.send(values, target)
        return target

    def run(self, call: AttentionCall, plan: list[_Group]) -> None:
        with torch.no_grad():
            for group in plan:
                self._attend(group, call)

    def _attend(self, group: _Group, call: AttentionCall) -> None:
        q, out = call.q, call.out
        shape = self.shape
        (g, queries, length), kv_heads, repeat = group.size, shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
        fused = self._fused and call.sinks is None and call.k_scale is None
        dtype = shape.dtype if fused or shape.dtype == torch.float64 else torch.float32
        k = _taken(call.k_cache, group.slots, call.k_scale, dtype).view(g, length, kv_heads, shape.head_dim)
        v = _taken(call.v_cache, group.slots, call.v_scale, dtype).view(g, length, kv_heads, shape.v_dim)
        slopes, bias = call.slopes, None
        if slopes is not None:
            distance = torch.arange(length, device=self.device) - group.at
            bias = slopes.to(dtype).view(kv_heads, repeat, 1, 1) * distance
        if fused:
            mask = group.mask[:, 0]
            if bias is not None:
                mask = bias.masked_fill(~group.mask, -torch.inf).view(g, shape.num_heads, queries, length).to(dtype)
            rows = q.index_select(0, group.rows).view(g, queries, shape.num_heads, shape.head_dim)
            rows, k, v = (one.transpose(1, 2) for one in (rows, k, v))
            result = F.scaled_dot_product_attention(rows, k, v, mask, scale=shape.scale, enable_gqa=repeat > 1)
            result = result.transpose(1, 2)
            self._store(group, result.reshape(g * queries, shape.num_heads, shape.v_dim), out)
            return
        rows = q.index_select(0, group.rows).to(dtype).view(g, queries, kv_heads, repeat, shape.head_dim)
        rows = rows.permute(0, 2, 3, 1, 4).reshape(g, kv_heads, repeat * queries, shape.head_dim)
        scores = torch.matmul(rows, k.permute(0, 2, 3, 1)) * shape.scale
        if shape.softcap is not None:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        scores = scores.view(g, kv_heads, repeat, queries, length)
        if bias is not None:
            scores = scores + bias
        scores = scores.masked_fill(~group.mask, -torch.inf)
        if call.sinks is not None:
            # A key without a value.
            sinks = call.sinks.to(dtype).view(kv_heads, repeat, 1, 1).expand(g, kv_heads, repeat, queries, 1)
            scores = torch.cat([scores, sinks], -1)
        weights = torch.softmax(scores, -1)[..., :length].reshape(g, kv_heads, repeat * queries, length)
        result = torch.matmul(weights, v.transpose(1, 2)).view(g, kv_heads, repeat, queries, shape.v_dim)
        self._store(group, result.permute(0, 3, 1, 2, 4).reshape(g * queries, shape.num_heads, shape.v_dim), out)

    def _store(self, group: _Group, result: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the results of a group ``[g * Q, num_heads, v_dim]`` to their rows."""
        result = result.to(out.dtype)
        if group.take is not None:
            result = result.index_select(0, group.take)
        if group.targets is None:
            out.copy_(result)
        else:
            out.index_copy_(0, group.targets, result)


def _taken(stored: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The keys or values of some slots."""
    stored = stored.flatten(0, 1)
    if scale is None:
        return stored.index_select(0, slots).to(dtype)
    # PyTorch has no index_select for fp8 on every device: bytes are taken.
    taken = stored.view(torch.uint8).index_select(0, slots).view(stored.dtype)
    return taken.to(dtype) * scale.to(dtype)[:, None]


def _power(lengths: Ints) -> Ints:
    """The exponent of the power of two that each length is at most."""
    return np.ceil(np.log2(lengths)).astype(np.int64)
