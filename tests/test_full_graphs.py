"""cudagraph_mode="full": one CUDA graph for all of a step, right for every batch, and pieces where it does not fit."""

from __future__ import annotations

import weakref

import pytest
import torch
from paged_model import LAYERS, STEPS, VOCAB, Model, Traffic
from torch import nn

import pcg_compile as pcg
from pcg_compile.registry import runtimes
from pcg_compile.runtime.capture import StaticReplay

OPTIONS = {"compiler": "eager", "buckets": [2, 4, 8, 16], "cudagraph_mode": "full"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def piecewise(model, **options):
    return pcg.piecewise(dynamic={"ids": 0, "positions": 0}, **{**OPTIONS, **options})(model.forward)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_ragged_batches_are_one_replay_a_step(page_size):
    model = Model(window=6).eval()
    compiled = piecewise(model)
    traffic = Traffic(page_size)
    for qo_lens in STEPS:
        traffic.check(model, compiled, qo_lens)
    before = pcg.stats(compiled)
    # Sizes that were met, in other batches.
    for qo_lens in [{1: 1, 4: 1}, {1: 3, 2: 1}, {2: 1, 3: 1}]:
        traffic.check(model, compiled, qo_lens)
    for qo_lens in [{6: 2}, {1: 1, 2: 1, 3: 1, 4: 1}, {3: 2, 7: 2}]:
        with pcg.expect(compiled, replays=1, captured=0):
            traffic.check(model, compiled, qo_lens)
    assert all("beyond the largest bucket" in f.reason for f in before.fallbacks)


def test_more_requests_than_slots_run_piece_by_piece():
    model = Model().eval()
    compiled = piecewise(model)
    traffic = Traffic()
    for _ in range(3):
        traffic.check(model, compiled, dict.fromkeys(range(11), 1))
    stats = pcg.stats(compiled)
    assert stats.buckets[16].hits == 3 and stats.replays == 3 * (LAYERS + 1)
    assert any("max_requests=8" in f.reason for f in stats.fallbacks)


def test_warmup_captures_every_number_of_slots():
    model = Model().eval()
    compiled = torch.compile(model, backend="pcg", options=OPTIONS)
    traffic = Traffic()
    batch = traffic.batch({1: 5})
    cache = traffic.caches[1]
    with pcg.step(batch, cache):
        pcg.warmup(compiled, torch.randint(0, VOCAB, (5,)), batch.positions, progress=False)
    assert all(torch.equal(t[1:], torch.zeros_like(t[1:])) for t in cache.k + cache.v)
    traffic.lengths.clear()
    steps = [{1: 5}, {1: 1}, {1: 1, 2: 3}, {1: 1, 2: 1, 3: 1, 4: 1, 5: 4, 6: 2, 7: 3}]
    with pcg.expect(compiled, captured=0, graphs=0):
        for qo_lens in steps:
            traffic.check(model, compiled, qo_lens)
    with pcg.expect(compiled, captured=0, graphs=0, replays=4):
        for qo_lens in steps:
            traffic.check(model, compiled, qo_lens)


def test_buffers_that_a_step_changes_change_once():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Model()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, ids, positions):
            self.calls.add_(1)
            return self.inner(ids, positions) + self.calls

    eager, model = Counting().eval(), Counting().eval()
    model.load_state_dict(eager.state_dict())
    compiled = piecewise(model)
    traffic = Traffic()
    for step, qo_lens in enumerate([{1: 5}, {1: 1, 2: 4}, {2: 5}, {1: 1}, {3: 2}, {3: 5}]):
        ids = torch.randint(0, VOCAB, (sum(qo_lens.values()),))
        batch = traffic.batch(qo_lens)
        with pcg.step(batch, traffic.caches[0]):
            want = eager(ids, batch.positions)
        with pcg.step(batch, traffic.caches[1]):
            got = compiled(ids, batch.positions)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert model.calls.item() == step + 1
    assert pcg.stats(compiled).fallbacks == ()


def test_a_capture_that_fails_leaves_pieces(monkeypatch):
    from pcg_compile.runtime.full_graph import FullGraph

    def broken(self):
        raise RuntimeError("no memory")

    monkeypatch.setattr(FullGraph, "_run_all", broken)
    model = Model().eval()
    compiled = piecewise(model)
    traffic = Traffic()
    for qo_lens in [{1: 5}, {1: 1, 2: 4}, {2: 5}, {1: 1, 3: 6}, {3: 5}]:
        traffic.check(model, compiled, qo_lens)
    reasons = {f.reason: f.count for f in pcg.stats(compiled).fallbacks}
    assert reasons["capturing the full graph failed: RuntimeError: no memory"] == 2
    assert pcg.stats(compiled).buckets[8].hits == 5


class Weighing(StaticReplay):
    """As CUDA's: a pool weighs a mebibyte for pieces, two for a full graph, until all that it holds is gone."""

    def __init__(self):
        self.pools = {}

    def capture(self, run, place, warm_up, pool=None, *rest):
        captured = super().capture(run, place, warm_up, pool, *rest)
        mebibytes = 2 if getattr(run, "__name__", "") == "_run_all" else 1
        self.pools.setdefault(pool, []).append((weakref.ref(captured), mebibytes))
        return captured

    def nbytes(self):
        for name, pool in list(self.pools.items()):
            if not any(captured() for captured, _ in pool):
                del self.pools[name]
        return sum(max(mebibytes for _, mebibytes in pool) for pool in self.pools.values()) << 20


@pytest.mark.parametrize(("mebibytes", "replays"), [(2.5, 1), (1.5, LAYERS + 1)])
def test_a_full_graph_of_a_later_step_respects_the_memory_budget(mebibytes, replays):
    """The first step of a bucket captures its pieces, the second all of it as one graph."""
    model = Model().eval()
    compiled = piecewise(model, memory_budget=int(mebibytes * 2**20))
    traffic = Traffic()
    traffic.check(model, compiled, {1: 5})
    (runtime,) = runtimes(compiled)
    runtime.reset()
    runtime.shared.engine = Weighing()
    for qo_lens in ({2: 5}, {3: 5}, {4: 5}, {1: 1, 5: 5}):
        traffic.check(model, compiled, qo_lens)
        assert runtime.nbytes() <= mebibytes * 2**20
    with pcg.expect(compiled, replays=replays, captured=0):
        traffic.check(model, compiled, {6: 5})
    assert any("piece by piece: memory_budget" in f.reason for f in pcg.stats(compiled).fallbacks) == (replays > 1)


def test_an_op_that_does_not_declare_itself_recordable_stays_between_pieces():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(x):
        x = model[0](x)
        return model[1](nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True))

    compiled = torch.compile(forward, backend="pcg", options=OPTIONS)
    with torch.no_grad():
        for n in (3, 4, 5, 7, 2):
            x = torch.randn(n, 8)
            torch.testing.assert_close(compiled(x), forward(x))
    (reason,) = {f.reason for f in pcg.stats(compiled).fallbacks}
    assert "does not declare itself recordable" in reason


def test_an_op_of_someone_else_that_does():
    @pcg.split_op("whole::packed_mean", qo_indptr="cu", recordable=True)
    def packed_mean(x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        """Each row becomes the mean of its request's rows."""
        segment = torch.searchsorted(cu[1:], torch.arange(x.shape[0], device=cu.device, dtype=cu.dtype), right=True)
        total = torch.zeros(cu.shape[0] - 1, x.shape[1], dtype=x.dtype).index_add_(0, segment, x)
        return (total / (cu[1:] - cu[:-1])[:, None])[segment]

    def forward(x, cu):
        return torch.ops.whole.packed_mean((x * 2).relu(), cu) + 1

    compiled = pcg.piecewise(dynamic={"x": 0, "cu": 0}, **OPTIONS)(forward)
    with torch.no_grad():
        for n, cuts in [(5, [0, 2, 5]), (8, [0, 3, 8]), (3, [0, 1, 3]), (7, [0, 1, 2, 7]), (6, [0, 2, 4, 6])]:
            x, cu = torch.randn(n, 4), torch.tensor(cuts, dtype=torch.int32)
            torch.testing.assert_close(compiled(x, cu), forward(x, cu))


def test_auto_measures_nothing_where_a_replay_runs_the_same_calls():
    model = Model().eval()
    compiled = torch.compile(model, backend="pcg", options={**OPTIONS, "cudagraph_mode": "auto"})
    traffic = Traffic()
    batch = traffic.batch({1: 5})
    with pcg.step(batch, traffic.caches[1]):
        pcg.warmup(compiled, torch.randint(0, VOCAB, (5,)), batch.positions, progress=False)
    traffic.lengths.clear()
    with pcg.expect(compiled, captured=0, replays=LAYERS + 1):
        traffic.check(model, compiled, {1: 5})


def test_warmup_finds_an_attention_that_cannot_be_captured_after_all(monkeypatch):
    from pcg_compile.attention.reference import ReferenceAttention

    plan = ReferenceAttention.plan

    def of_other_pages(self, prepared):
        """With fixed slots, a plan that leaves half of the rows out."""
        groups = plan(self, prepared)
        if prepared.padded.request_slots is not None:
            return []
        return groups

    monkeypatch.setattr(ReferenceAttention, "plan", of_other_pages)
    model = Model().eval()
    compiled = torch.compile(model, backend="pcg", options=OPTIONS)
    traffic = Traffic()
    batch = traffic.batch({1: 5})
    with pcg.step(batch, traffic.caches[1]):
        pcg.warmup(compiled, torch.randint(0, VOCAB, (5,)), batch.positions, progress=False, buckets=[8])
    traffic.lengths.clear()
    for qo_lens in ({1: 5}, {1: 1, 2: 5}):
        traffic.check(model, compiled, qo_lens)
    (fallback,) = pcg.stats(compiled).fallbacks
    assert "gave other numbers" in fallback.reason


def test_results_are_copied_out_of_memory_that_results_are_copied_to():
    """A full graph's values may lie where its results go: nobody holds the memory of the last piece's results."""
    from types import SimpleNamespace

    from pcg_compile.runtime.full_graph import FullGraph

    memory = torch.arange(12.0)
    graph = SimpleNamespace(outputs={"a": memory[:4], "b": memory[4:8]})
    # The results the other way round, and one that reaches into both.
    for results in ((memory[4:8], memory[:4]), (memory[2:6], memory[8:12]), (torch.full((4,), 7.0), memory[1:5])):
        want = [result.clone() for result in results]
        apart = [FullGraph._apart(graph, r, t) for r, t in zip(results, graph.outputs.values(), strict=True)]
        for result, target in zip(apart, graph.outputs.values(), strict=True):
            target.copy_(result)
        for target, value in zip(graph.outputs.values(), want, strict=True):
            torch.testing.assert_close(target, value)
    alone = SimpleNamespace(outputs={"a": memory[:4]})
    assert FullGraph._apart(alone, memory[:4], memory[:4]) is not None
    assert FullGraph._apart(alone, memory[8:], memory[:4]).data_ptr() == memory[8:].data_ptr()


def test_workspaces_of_attention_are_reported_apart():
    model = Model().eval()
    compiled = piecewise(model)
    traffic = Traffic()
    traffic.check(model, compiled, {1: 5})
    assert pcg.stats(compiled).workspaces == 0 and "workspaces" not in str(pcg.stats(compiled))
    traffic.caches[1].memory.workspaces["partial results"] = {16: torch.empty(1 << 18)}
    assert pcg.stats(compiled).workspaces == 1 << 20
    assert "attention's workspaces: 1.0 MiB" in str(pcg.stats(compiled))
