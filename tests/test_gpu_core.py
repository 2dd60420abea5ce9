"""The core on CUDA graphs."""

from __future__ import annotations

import gc

import pytest
import torch
from models import ToyLlama, calls
from torch import nn

import pcg_compile as pcg
from pcg_compile.registry import runtimes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
COMPILERS = ["eager", "inductor"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    calls.clear()
    with torch.no_grad(), torch.device("cuda"):
        yield
    gc.collect()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_toy_llama_every_size(compiler):
    model = ToyLlama(layers=4).eval()
    run = pcg.piecewise(dynamic={"ids": 0}, buckets=[1, 4, 16, 64], compiler=compiler)(model.forward)
    sizes = (64, 3, 4, 63, 1, 17, 16, 2, 100, 64, 1)
    with pcg.expect(graphs=1, pieces=5, capturable=5, captured=20):
        for n in sizes:
            ids = torch.randint(0, 128, (n,))
            torch.testing.assert_close(run(ids), model(ids), rtol=1e-3, atol=1e-3)
    assert pcg.stats(run).replays == 5 * (len(sizes) - 1)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_steady_steps_neither_sync_nor_allocate(compiler):
    model = ToyLlama(layers=4).eval()
    run = pcg.piecewise(dynamic={"ids": 0}, buckets=[8, 16], compiler=compiler)(model.forward)
    batches = [torch.randint(0, 128, (n,)) for n in (8, 5, 16, 11)]
    for ids in batches * 2:
        run(ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        outputs = [run(ids) for ids in batches * 3]
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The toy attention itself allocates (q + k + v): two tensors a layer, and the output copy.
    assert after - before <= len(outputs) * (1 + 2 * 4)
    for ids, got in zip(batches * 3, outputs, strict=True):
        torch.testing.assert_close(got, model(ids), rtol=1e-3, atol=1e-3)


def test_in_place_results_and_views():
    def function(x):
        s = x.clone()
        out = torch.empty_like(x)
        torch.ops.silly.attention(x, x, x, out)
        x.add_(out)
        return s, x.view(-1)

    run = pcg.piecewise(dynamic={"x": 0}, buckets=[4, 8], compiler="eager")(function)
    for n in (3, 8, 1, 20, 3, 4):
        x = torch.randn(n, 4)
        before = x.clone()
        s, view = run(x)
        assert torch.equal(s, before) and view.data_ptr() == x.data_ptr()
        torch.testing.assert_close(x, before * 4)


def test_random_numbers_advance():
    def function(x):
        y = torch.ops.silly.fresh(x)
        return y + torch.rand(3, device=x.device)

    run = pcg.piecewise(dynamic={"x": 0}, buckets=[4], compiler="eager")(function)
    x = torch.zeros(4, 3)
    results = [run(x)[0].tolist() for _ in range(4)]
    assert len({tuple(r) for r in results}) == 4


def test_a_side_stream_is_ordered():
    model = ToyLlama(layers=2).eval()
    run = pcg.piecewise(dynamic={"ids": 0}, buckets=[16], compiler="eager")(model.forward)
    ids = torch.randint(0, 128, (16,))
    want = model(ids)
    run(ids)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = run(ids)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(run(ids), want, rtol=1e-3, atol=1e-3)


def test_changed_weights_are_seen():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager"})
    x = torch.randn(4, 8)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x))
    model[0].weight.mul_(2)
    torch.testing.assert_close(compiled(x), model(x))
    model[0].weight.data = torch.randn(8, 8)
    torch.testing.assert_close(compiled(x), model(x))


@torch.library.custom_op("gpu_core::waits", mutates_args=())
def waits(x: torch.Tensor) -> torch.Tensor:
    torch.cuda.synchronize()
    return x + 1


@waits.register_fake
def _(x):
    return torch.empty_like(x)


def test_a_capture_that_fails_leaves_no_trace():
    options = {"compiler": "eager", "buckets": [4, 8]}
    bad = torch.compile(lambda x: torch.ops.gpu_core.waits(x * 2) * 2, backend="pcg", options=options)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5))
    good = torch.compile(model.eval(), backend="pcg", options=options)
    for n in (3, 5, 3, 5, 6):
        x = torch.randn(n, 8)
        torch.testing.assert_close(bad(x), (x * 2 + 1) * 2)
        torch.testing.assert_close(good(x), model(x))
    reasons = [f.reason for f in pcg.stats(bad).fallbacks]
    assert any("capture failed" in r for r in reasons) and any("twice" in r for r in reasons), reasons
    assert not pcg.stats(good).fallbacks and pcg.stats(good).replays > 0
    before = torch.cuda.get_rng_state()
    assert not torch.equal(torch.rand(4), torch.rand(4)) and not torch.equal(before, torch.cuda.get_rng_state())


def test_captured_graphs_are_made_again_after_all_have_gone():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [4, 8]})
    for _ in range(4):
        for n in (3, 5, 8, 3):
            x = torch.randn(n, 8)
            torch.testing.assert_close(compiled(x), model(x))
        model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)
    stats = pcg.stats(compiled)
    assert not stats.fallbacks and stats.captured >= 8 and stats.replays > stats.captured


def test_captured_graphs_share_memory():
    model = ToyLlama(hidden=512, mlp=1024, layers=8).eval()
    compiled = torch.compile(
        model, backend="pcg", options={"buckets": [64, 128, 256, 512, 1024], "compiler": "inductor"}
    )
    pcg.warmup(compiled, torch.randint(0, 128, (64,)), progress=False)
    by_bucket = {size: use.bytes for size, use in pcg.stats(compiled).buckets.items()}
    largest = by_bucket.pop(1024)
    assert sum(by_bucket.values()) <= largest, (by_bucket, largest)
    assert runtimes(compiled)[0].nbytes() < 600 << 20
