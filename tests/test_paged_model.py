"""A model with paged attention, compiled: ragged batches, every size, both kinds of padding."""

from __future__ import annotations

import pytest
import torch
from paged_model import LAYERS, STEPS, VOCAB, Model, Traffic

import pcg_compile as pcg
from pcg_compile.attention.reference import ReferenceAttention
from pcg_compile.errors import BatchError, PCGError


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


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
    assert found.count == len(sizes) and "paged_model.py" in found.where
    assert "0.0.1 is installed" in str(pcg.explain(compiled))


def test_attention_in_plain_pytorch_is_an_error_under_strict(plain):
    model = Model().eval()
    options = {"compiler": "eager", "buckets": [8], "strict": True}
    compiled = torch.compile(model, backend="pcg", options=options, dynamic=True)
    with pytest.raises(PCGError, match="attention in plain PyTorch"):
        Traffic().check(model, compiled, {1: 5})
