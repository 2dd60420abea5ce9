"""Capturing ahead of time has no effects and covers every bucket."""

from __future__ import annotations

import pytest
import torch
from models import ToyLlama
from torch import nn

import pcg_compile as pcg


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_all_buckets_are_captured_and_then_only_replayed():
    model = ToyLlama(layers=2).eval()
    compiled = torch.compile(model, backend="pcg", options={"buckets": [2, 4, 8], "compiler": "eager"})
    with pcg.expect(graphs=1, pieces=3, captured=9, steps=0):
        pcg.warmup(compiled, torch.randint(0, 128, (3,)), progress=False)
    with pcg.expect(compiled, captured=0, graphs=0, replays=4 * 3):
        for n in (8, 3, 2, 1):
            ids = torch.randint(0, 128, (n,))
            torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_no_effects(capsys):
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):
            self.seen.add_(x[0])
            x.mul_(2)
            y = torch.ops.silly.fresh(x)
            return y + 1

    model = Stateful()
    run = pcg.piecewise(dynamic={"x": 0}, buckets=[2, 4], compiler="eager")(model.forward)
    x = torch.randn(3, 4)
    before, state = x.clone(), torch.get_rng_state()
    pcg.warmup(run, x)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.seen, torch.zeros(4))
    assert "bucket" in capsys.readouterr().err
    with pcg.expect(run, captured=0):
        run(x)
    assert torch.equal(x, before * 2) and torch.equal(model.seen, before[0])


def test_only_some_buckets():
    run = pcg.piecewise(dynamic={"x": 0}, buckets=[2, 4, 8], compiler="eager")(lambda x: torch.ops.silly.fresh(x) + 1)
    with pcg.expect(captured=1):
        pcg.warmup(run, torch.randn(2, 2), buckets=[4], progress=False)
    with pytest.raises(ValueError, match="sizes"):
        pcg.warmup(run, torch.randn(2, 2), buckets=[(4, 4)], progress=False)


def test_first_call_captures_all():
    run = pcg.piecewise(dynamic={"x": 0}, buckets=[2, 4, 8], compiler="eager", capture="first_call")(
        lambda x: torch.ops.silly.fresh(x) + 1
    )
    with pcg.expect(captured=3, steps=1):
        x = torch.randn(3, 2)
        torch.testing.assert_close(run(x), x * 2 + 2)


@pytest.mark.parametrize("slow", [True, False])
def test_a_bucket_that_does_not_pay_is_not_used(monkeypatch, slow):
    """The measurement is made where a replay is a CUDA graph; here it is made to happen, with times made up."""
    from pcg_compile.runtime import ahead_of_time as ahead_of_time

    calls = []

    def seconds(step, run, device, runs=10):
        calls.append(run)
        run()
        # Replays are measured first, then the same without captured graphs; only the largest bucket loses.
        return 2.0 if slow and len(calls) == 1 else 1.0

    record = ahead_of_time._capture_bucket

    def doubtful(graph, args, real, bucket, _):
        return record(graph, args, real, bucket, len(calls) < (4 if slow else 2))

    monkeypatch.setattr(ahead_of_time, "seconds_of", seconds)
    monkeypatch.setattr(ahead_of_time, "_capture_bucket", doubtful)
    layer = torch.nn.Linear(4, 4)
    compiled = torch.compile(lambda x: layer(x) + 1, backend="pcg", options={"buckets": [2, 4, 8], "compiler": "eager"})
    with torch.no_grad():
        pcg.warmup(compiled, torch.randn(3, 4), progress=False)
        for n in (8, 7, 4, 2, 6):
            x = torch.randn(n, 4)
            torch.testing.assert_close(compiled(x), layer(x) + 1)
    stats = pcg.stats(compiled)
    assert len(calls) == (4 if slow else 2)
    if slow:
        (fallback,) = stats.fallbacks
        assert fallback.reason.startswith("bucket 8 does not pay: 2000.00 ms replayed") and fallback.count == 3
        assert stats.buckets[8].hits == 0 and stats.buckets[4].hits == 1
    else:
        assert stats.fallbacks == () and stats.buckets[8].hits == 3


def test_addresses_are_compared_at_their_inputs_positions():
    from pcg_compile.torch_compat.cuda import data_ptrs_equal

    a, b, c = (torch.ones(3) for _ in range(3))
    assert data_ptrs_equal([a, b, c], [0, b.data_ptr(), c.data_ptr()], [1, 2])
    assert not data_ptrs_equal([a, b, c], [0, b.data_ptr(), a.data_ptr()], [1, 2])
    assert data_ptrs_equal([a, 3, c], [], [])


def test_a_mark_does_not_outlast_the_call():
    x = torch.randn(3, 4)
    marked = pcg.piecewise(dynamic={"x": 0}, buckets=[4, 8], compiler="eager")(lambda x: x + 1)
    with torch.no_grad():
        marked(x)
        assert not [name for name in vars(x) if name.startswith("_dynamo_")]
        own = torch.randn(5, 4)
        torch._dynamo.mark_dynamic(own, 0)
        marked(own)
        assert own._dynamo_dynamic_indices == {0}
        marked(torch.randn(7, 4))
    assert pcg.stats(marked).graphs == 1


def test_a_model_that_is_not_compiled_is_an_error():
    with pytest.raises(ValueError, match="Linear ran, and nothing in it is compiled by pcg"):
        pcg.warmup(torch.nn.Linear(2, 2), torch.randn(3, 2), progress=False)


def test_a_second_start_compiles_nothing(tmp_path, monkeypatch):
    from models import ToyLlama
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, found = ToyLlama(layers=2).eval(), []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend="pcg", options={"buckets": [4, 8]}, dynamic=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(torch.arange(3)), model(torch.arange(3)))
        found.append(dict(counters["aot_autograd"]))
    assert found[0]["autograd_cache_miss"] == 3 and "autograd_cache_hit" not in found[0]
    assert found[1]["autograd_cache_hit"] == 3 and "autograd_cache_miss" not in found[1]


def test_cached_code_is_not_used_where_memory_is_shared_otherwise(tmp_path, monkeypatch):
    """Of two pieces of the same ops and shapes, one has a second name for what it writes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def separate(x):
        z = x + 1
        q = z.clone()
        z = torch.ops.silly.fresh(z).add_(0)
        return q.add_(1), z * 2

    def shared(x):
        z = x + 1
        q = z.view(z.shape)
        torch.ops.silly.fresh(z)
        return q.add_(1), z * 2

    for kinds in ((separate, shared), (shared, separate)):
        for function in kinds:
            torch._dynamo.reset()
            compiled = torch.compile(function, backend="pcg", options={"buckets": [4, 8]}, dynamic=True)
            with torch.no_grad():
                for n in (3, 5):
                    x = torch.randn(n, 4)
                    torch.testing.assert_close(compiled(x), function(x))


def test_a_model_that_was_called_before_is_captured_for_all_sizes_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    compiled = torch.compile(model, backend="pcg", options={"buckets": [4, 8, 16], "compiler": "eager"})
    x = torch.randn(16, 8)
    with torch.no_grad():
        compiled(x)
        pcg.warmup(compiled, x, progress=False)
        with pcg.expect(compiled, captured=0, graphs=0):
            for n in (3, 7, 15, 16):
                compiled(torch.randn(n, 8))


def test_a_model_of_one_size_that_was_called_before(caplog):
    options = {"buckets": [4, 8, 16], "compiler": "eager"}
    compiled = torch.compile(lambda x: x.view(4, 4, -1) + 1, backend="pcg", options=options)
    x = torch.randn(16, 8)
    with torch.no_grad():
        compiled(x)
        pcg.warmup(compiled, x, progress=False)
        torch.testing.assert_close(compiled(x), x.view(4, 4, -1) + 1)
    (fallback,) = pcg.stats(compiled).fallbacks
    assert "the size of the example alone" in fallback.reason and fallback.reason in caplog.text
