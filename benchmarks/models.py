"""Llamas of known sizes with random weights, and ragged batches for them."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import pcg_compile as pcg

__all__ = [
    "ATTEND",
    "PAGE_SIZE",
    "SHAPES",
    "Attend",
    "BoundAttention",
    "Lists",
    "Llama",
    "Shape",
    "dtype_of",
    "make_cache",
    "make_lists",
    "make_model",
    "shape_of",
    "share",
]

PAGE_SIZE = 16
#: Decode requests in a batch, at most; the other tokens are one prefill.
MOST_DECODES = 32


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int = 32000


SHAPES = {
    "1b": Shape("1b", 16, 2048, 32, 8, 64, 8192),
    "8b": Shape("8b", 32, 4096, 32, 8, 128, 14336),
    "tiny": Shape("tiny", 2, 64, 4, 2, 16, 128, 100),
}


def shape_of(args: Any) -> Shape:
    """The shape that a command's arguments name."""
    shape = SHAPES["tiny" if args.tiny else args.shape]
    return replace(shape, layers=args.layers) if args.layers else shape


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
#: What ``bench::attend`` calls, ``(q, k_cache, v_cache, layer) -> out``: set by the variant that runs.
ATTEND: ContextVar[Attend] = ContextVar("attend")

_LIBRARY = torch.library.Library("bench", "DEF")
_LIBRARY.define("attend(Tensor q, Tensor k_cache, Tensor v_cache, int layer) -> Tensor")


def _attend(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, layer: int) -> torch.Tensor:
    return ATTEND.get()(q, k_cache, v_cache, layer)


_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")


@torch.library.register_fake("bench::attend", lib=_LIBRARY)
def _fake_attend(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


class BoundAttention(nn.Module):
    """Attention as a hand-made server has it: the write to the cache is compiled with the rest, and one op calls what
    the step has bound. Nothing says that the op cannot be captured."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor

    def __init__(self, cache: pcg.PagedKVCache, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("k_cache", cache.flat_k[layer], persistent=False)
        self.register_buffer("v_cache", cache.flat_v[layer], persistent=False)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        self.k_cache.index_copy_(0, slots, k)
        self.v_cache.index_copy_(0, slots, v)
        return torch.ops.bench.attend(q, self.k_cache, self.v_cache, self.layer)


class Block(nn.Module):
    """One layer."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.shape = shape
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.input_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.qkv = nn.Linear(shape.hidden, width + 2 * kv_width, bias=False)
        self.attention: nn.Module = pcg.PagedAttention(layer, shape.heads, shape.kv_heads, shape.head_dim)
        self.out = nn.Linear(width, shape.hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor | None
    ) -> torch.Tensor:
        shape = self.shape
        qkv = self.qkv(self.input_norm(x)).view(-1, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = self.attention(q, k, v) if slots is None else self.attention(q, k, v, slots)
        x = x + self.out(attended.reshape(-1, shape.heads * shape.head_dim))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: x ``[n, heads, head_dim]``, cos and sin ``[n, 1, head_dim / 2]``."""
    one, other = x.chunk(2, dim=-1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)


class Llama(nn.Module):
    """ids ``[n]`` and positions ``[n]`` int64 -> hidden states ``[n, hidden]``; slots for BoundAttention."""

    frequencies: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        half = torch.arange(shape.head_dim // 2, dtype=torch.float32)
        self.register_buffer("frequencies", 500000.0 ** (-half / half.numel()))

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(ids)
        angles = positions[:, None, None].float() * self.frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, slots)
        return self.norm(x)


def make_model(shape: Shape, device: torch.device, seed: int = 0) -> Llama:
    """A Llama with random weights, made on the device: bfloat16 on CUDA, float32 elsewhere."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = Llama(shape)
    model.to_empty(device=device)
    dtype = dtype_of(device)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            if value.dim() == 1:
                value.fill_(1.0)
            else:
                # Scores of some spread: attention to the wrong keys then shows in the result.
                gain = 1.5 if parameter.shape[0] == _qkv_rows(shape) else 1.0
                value.normal_(std=1.0 if isinstance(module, nn.Embedding) else gain * parameter.shape[1] ** -0.5)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    half = torch.arange(shape.head_dim // 2, dtype=torch.float32, device=device)
    model.frequencies = 500000.0 ** (-half / half.numel())
    return model.eval()


def _qkv_rows(shape: Shape) -> int:
    return (shape.heads + 2 * shape.kv_heads) * shape.head_dim


def dtype_of(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def share(model: Llama, shape: Shape, cache: pcg.PagedKVCache | None = None) -> Llama:
    """Another model with the same weights in memory, and code of its own: Dynamo keeps what it compiled by code.

    With a cache its attention is :class:`BoundAttention`.
    """
    code = Llama.forward.__code__.replace()
    forward = types.FunctionType(code, Llama.forward.__globals__, "forward", Llama.forward.__defaults__)
    kind = type("Llama", (Llama,), {"forward": forward})
    with torch.device("meta"):
        other: Llama = kind(shape)
    other.load_state_dict(model.state_dict(), assign=True)
    if cache is not None:
        for layer, block in enumerate(other.blocks):
            block.attention = BoundAttention(cache, layer)
    return other.requires_grad_(False).eval()


def make_cache(shape: Shape, device: torch.device, tokens: int, max_requests: int = 256) -> pcg.PagedKVCache:
    """A cache for batches of :func:`make_lists` of up to ``tokens`` tokens, with random contents."""
    pages = 1 + MOST_DECODES * (_LONGEST // PAGE_SIZE + 1) + -(-tokens // PAGE_SIZE)
    cache = pcg.PagedKVCache(
        shape.layers, pages, PAGE_SIZE, max_requests, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim,
        dtype=dtype_of(device), device=device,
    )  # fmt: skip
    for tensor in cache.k + cache.v:
        tensor.normal_()
    return cache


_LONGEST = 512


@dataclass(frozen=True)
class Lists:
    """A batch as a server has it: Python lists of lengths and pages, and token ids ``[tokens]`` int64 on the device."""

    qo_lens: list[int]
    kv_lens: list[int]
    page_table: list[list[int]]
    ids: torch.Tensor

    def batch(self) -> pcg.Batch:
        """The same for :func:`pcg.step`."""
        return pcg.Batch(self.qo_lens, self.kv_lens, self.page_table)


def make_lists(shape: Shape, cache: pcg.PagedKVCache, tokens: int, seed: int) -> Lists:
    """Up to 32 decode requests with 64 to 512 cached tokens and one prefill, in an order and on pages drawn by seed."""
    draw = random.Random(1000 * tokens + seed)
    decodes = min(MOST_DECODES, max(1, tokens // 2))
    longest = min(_LONGEST, 64 if shape.name == "tiny" else _LONGEST)
    requests = [(1, draw.randint(longest // 8, longest)) for _ in range(decodes)]
    if tokens > decodes:
        requests.append((tokens - decodes, tokens - decodes))
    draw.shuffle(requests)
    free = list(range(1, cache.num_pages))
    draw.shuffle(free)
    table = [[free.pop() for _ in range(-(-kv // PAGE_SIZE))] for _, kv in requests]
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    ids = torch.randint(0, shape.vocab, (tokens,), generator=generator).to(cache.device)
    return Lists([q for q, _ in requests], [kv for _, kv in requests], table, ids)
