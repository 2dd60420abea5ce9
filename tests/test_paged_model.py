"""A model with paged attention, compiled: ragged batches, every size, both kinds of padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pcg_compile as pcg
from pcg_compile.attention.reference import ReferenceAttention
from pcg_compile.errors import BatchError, PCGError

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


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


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


@pytest.mark.parametrize("padding", ["request", "slice"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_ragged_batches(padding, page_size):
    model = Model(window=6).eval()
    compiled = pcg.piecewise(
        dynamic={"ids": 0, "positions": 0}, buckets=[2, 4, 8, 16], compiler="eager", padding=padding
    )(model.forward)
    traffic = Traffic(page_size)
    for qo_lens in STEPS:
        traffic.check(model, compiled, qo_lens)
    stats = pcg.stats(compiled)
    assert stats.graphs == 1 and stats.pieces == LAYERS + 1 and stats.compiled == 3
    assert stats.captured == (LAYERS + 1) * len(stats.buckets) and all(u.hits for u in stats.buckets.values())


def test_inductor():
    model = Model().eval()
    compiled = torch.compile(model, backend="pcg", options={"buckets": [2, 4, 8, 16]})
    traffic = Traffic()
    for qo_lens in STEPS:
        traffic.check(model, compiled, qo_lens)
    assert pcg.stats(compiled).replays > 0


def test_warmup_writes_no_page_but_0():
    model = Model().eval()
    compiled = torch.compile(model, backend="pcg", options={"buckets": [2, 4, 8], "compiler": "eager"})
    traffic = Traffic()
    batch = traffic.batch({1: 5})
    cache = traffic.caches[1]
    with pcg.step(batch, cache):
        pcg.warmup(compiled, torch.randint(0, VOCAB, (5,)), batch.positions, progress=False)
    assert all(torch.equal(t[1:], torch.zeros_like(t[1:])) for t in cache.k + cache.v)
    assert pcg.stats(compiled).captured == 3 * (LAYERS + 1)
    with pcg.expect(compiled, captured=0, graphs=0):
        traffic.lengths.clear()
        traffic.check(model, compiled, {1: 5})
        traffic.check(model, compiled, {1: 1, 2: 3})


def test_each_cache_has_its_own_captured_graphs():
    model = Model().eval()
    compiled = torch.compile(model, backend="pcg", options={"buckets": [4], "compiler": "eager"})
    first, second = Traffic(), Traffic()
    for traffic in (first, second, first, second):
        traffic.check(model, compiled, {1: 2})
        traffic.check(model, compiled, {1: 1, 2: 1})


def test_outside_a_step_and_wrong_sizes():
    model = Model().eval()
    compiled = pcg.piecewise(dynamic={"ids": 0, "positions": 0}, buckets=[8], compiler="eager")(model.forward)
    ids, positions = torch.zeros(3, dtype=torch.long), torch.arange(3)
    with torch.no_grad(), pytest.raises(Exception, match=r"pcg\.step\(batch, cache\)"):
        compiled(ids, positions)
    traffic = Traffic()
    traffic.check(model, compiled, {1: 3})
    with torch.no_grad(), pytest.raises(BatchError, match=r"pcg\.step\(batch, cache\)"):
        compiled(ids, positions)
    with pcg.step(traffic.batch({1: 1}), traffic.caches[1]), pytest.raises(BatchError, match="3 tokens.* 1"):
        compiled(ids, positions)
    traffic.check(model, compiled, {2: 3})


def test_an_exception_in_a_step_leaves_the_next_right():
    model = Model().eval()
    compiled = pcg.piecewise(dynamic={"ids": 0, "positions": 0}, buckets=[8], compiler="eager")(model.forward)
    traffic = Traffic()
    with pytest.raises(RuntimeError, match="mine"), pcg.step(traffic.batch({9: 2}), traffic.caches[1]):
        raise RuntimeError("mine")
    traffic.check(model, compiled, {1: 3})


@pytest.fixture
def plain(monkeypatch):
    """A device that attends by other means than it is meant to."""
    reason = "flashinfer-python 0.0.1 is installed"
    monkeypatch.setattr("pcg_compile.attention.cache.choose_impl", lambda *args: (ReferenceAttention, reason))
    return f"attention in plain PyTorch: {reason}"


@pytest.mark.parametrize("cudagraph_mode", ["piecewise", "full"])
def test_attention_in_plain_pytorch_is_counted_at_each_step(plain, cudagraph_mode):
    traffic, model = Traffic(), Model().eval()
    options = {"compiler": "eager", "buckets": [8], "cudagraph_mode": cudagraph_mode}
    compiled = torch.compile(model, backend="pcg", options=options, dynamic=True)
    sizes = [5, 6, 5, 7, 20]
    for request, n in enumerate(sizes):
        traffic.check(model, compiled, {request: n})
    (found,) = [f for f in pcg.stats(compiled).fallbacks if f.reason == plain]
    # Once for all layers; at sizes of one bucket, which share its program, and beyond the largest bucket too.
    assert found.count == len(sizes) and "test_paged_model.py" in found.where
    assert "0.0.1 is installed" in str(pcg.explain(compiled))


def test_attention_in_plain_pytorch_is_an_error_under_strict(plain):
    model = Model().eval()
    options = {"compiler": "eager", "buckets": [8], "strict": True}
    compiled = torch.compile(model, backend="pcg", options=options, dynamic=True)
    with pytest.raises(PCGError, match="attention in plain PyTorch"):
        Traffic().check(model, compiled, {1: 5})
