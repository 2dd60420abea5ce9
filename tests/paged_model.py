"""A small model with paged attention, and requests that are prefilled in chunks and decoded."""

from __future__ import annotations

import torch
from torch import nn

import pcg_compile as pcg

LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 3, 4, 2, 8, 50


class Layer(nn.Module):
    def __init__(self, index, window=None):
        super().__init__()
        hidden = HEADS * DIM
        self.norm = nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.mlp = nn.Sequential(
            nn.RMSNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, hidden)
        )
        self.attention = pcg.PagedAttention(index, HEADS, KV_HEADS, DIM, window=window)

    def forward(self, x, positions):
        q, k, v = self.qkv(self.norm(x)).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
        angle = positions[:, None, None] * torch.arange(1, DIM + 1, device=x.device) / 50
        q = q.view(-1, HEADS, DIM) * angle.cos()
        k = k.view(-1, KV_HEADS, DIM) * angle.cos()
        attended = self.attention(q, k, v.view(-1, KV_HEADS, DIM))
        x = x + self.out(attended.view(-1, HEADS * DIM))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, window=None):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HEADS * DIM)
        self.layers = nn.ModuleList(Layer(i, window if i % 2 else None) for i in range(LAYERS))
        self.head = nn.Linear(HEADS * DIM, VOCAB, bias=False)

    def forward(self, ids, positions):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, positions)
        return self.head(x)


def make_cache(page_size=4, device="cpu", dtype=torch.float32, pages=128):
    return pcg.PagedKVCache(
        LAYERS, pages, page_size, num_kv_heads=KV_HEADS, head_dim=DIM, device=device, dtype=dtype, max_requests=8
    )


class Traffic:
    """Requests that are prefilled in chunks and decoded, with two caches fed alike: one for eager, one for pcg."""

    def __init__(self, page_size=4, device="cpu", dtype=torch.float32):
        self.caches = [make_cache(page_size, device, dtype) for _ in range(2)]
        self.page_size, self.device = page_size, device
        self.lengths: dict[int, int] = {}
        self.pages: dict[int, list[int]] = {}

    def batch(self, qo_lens: dict[int, int]):
        for request, new in qo_lens.items():
            self.lengths[request] = self.lengths.get(request, 0) + new
            pages = self.pages.setdefault(request, [])
            while len(pages) * self.page_size < self.lengths[request]:
                pages += self.caches[0].allocate(1)
                assert self.caches[1].allocate(1) == pages[-1:]
        return pcg.Batch(
            list(qo_lens.values()), [self.lengths[r] for r in qo_lens], [list(self.pages[r]) for r in qo_lens]
        )

    def check(self, model, compiled, qo_lens, tolerance=1e-4):
        ids = torch.randint(0, VOCAB, (sum(qo_lens.values()),), device=self.device)
        batch = self.batch(qo_lens)
        with pcg.step(batch, self.caches[0]):
            want = model(ids, batch.positions)
        with pcg.step(batch, self.caches[1]):
            got = compiled(ids, batch.positions)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(self.caches[1].k + self.caches[1].v, self.caches[0].k + self.caches[0].v, strict=True):
            # Page 0 is scratch.
            torch.testing.assert_close(ours[1:], theirs[1:], rtol=tolerance, atol=tolerance)


STEPS = [
    {1: 5}, {1: 1, 2: 7}, {1: 1, 2: 1}, {1: 1, 2: 1, 3: 11}, {1: 1}, {4: 1}, {1: 1, 2: 1, 3: 1, 4: 1}, {5: 30},
    {1: 1, 5: 1},
]  # fmt: skip
