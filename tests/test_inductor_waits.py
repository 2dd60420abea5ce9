"""Distinct pieces compile beside each other: each begins where the one before waits for its kernels."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import pcg_compile as pcg
from pcg_compile import torch_internals
from pcg_compile.graph import pieces
from pcg_compile.graph.inside import one_inside_another

WIDTH = 16


class Layers(nn.Module):
    """Three distinct pieces: what comes ahead of attention, between, and behind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for _ in range(2):
            q, k, v = self.qkv(torch.tanh(x)).chunk(3, -1)
            attended = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
            x = x + self.out(torch.sigmoid(attended))
        return x.relu()


@pytest.fixture
def events(monkeypatch):
    """When the compiler begins and ends, by piece."""
    found, compile_it = [], pieces.compile_with_inductor

    def watched(gm, inputs):
        piece = sum(what == "begins" for what, _ in found)
        found.append(("begins", piece))
        try:
            return compile_it(gm, inputs)
        finally:
            found.append(("ends", piece))

    monkeypatch.setattr(pieces, "compile_with_inductor", watched)
    return found


@torch.no_grad()
def run(model, n=5):
    torch._dynamo.reset()
    counters.clear()
    compiled = pcg.piecewise(dynamic={"x": 0}, buckets=[8])(model.forward)
    x = torch.randn(n, WIDTH)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    return pcg.stats(compiled), counters["inductor"]


def test_each_begins_while_the_one_before_waits(events):
    model = Layers().eval()
    with fresh_cache():
        for hits in (0, 3):
            events.clear()
            stats, counts = run(model)
            assert stats.compiled == 3 and not stats.fallbacks
            # What an earlier start kept is counted as that, and nothing beside it.
            assert (counts["fxgraph_cache_hit"], counts["fxgraph_cache_miss"]) == (hits, 3 - hits)
            if not hits:
                assert events[:3] == [("begins", 0), ("begins", 1), ("begins", 2)]
                assert events[3:] == [("ends", 2), ("ends", 1), ("ends", 0)]
            else:
                assert sorted(events) == sorted((what, i) for what in ("begins", "ends") for i in range(3))


def test_a_piece_that_fails_inside_another_fails_alone(events, monkeypatch):
    watched = pieces.compile_with_inductor

    def failing(gm, inputs):
        if sum(what == "begins" for what, _ in events) == 1:
            events.append(("begins", 1))
            raise ValueError("not this one")
        return watched(gm, inputs)

    monkeypatch.setattr(pieces, "compile_with_inductor", failing)
    with fresh_cache():
        stats, _ = run(Layers().eval())
    assert [fallback.reason for fallback in stats.fallbacks] == [
        "a piece runs eagerly: the compiler failed: ValueError: not this one"
    ]
    # The next one is begun by the first, or behind it.
    assert events[0] == ("begins", 0) and ("ends", 0) in events and ("ends", 2) in events


def test_sizes_that_are_shown_larger_are_shown_to_one_piece_alone(events):
    """A first call with one row: Inductor is shown more rows, which ends before the next piece begins."""
    with fresh_cache():
        stats, _ = run(Layers().eval(), n=1)
    assert stats.compiled == 3
    assert events == [(what, i) for i in range(3) for what in ("begins", "ends")]


def test_an_inductor_of_another_shape_compiles_one_after_the_other(monkeypatch):
    from torch._inductor import virtualized

    monkeypatch.delattr(virtualized, "threadlocal")
    assert not torch_internals._watch_waits()
    done = []
    with torch_internals.while_kernels_compile(lambda: done.append(1)):
        pass
    assert not done and torch_internals._WORK.get() is None


def test_settings_and_state_are_those_from_before(monkeypatch):
    """What is done in a wait sees neither the settings nor the graph of what waits."""
    from torch._inductor import config
    from torch._inductor.triton_bundler import TritonBundler
    from torch._inductor.virtualized import V

    seen = {}

    def work():
        seen.update(size=config.max_fusion_size, bundle=TritonBundler._entries, real=type(V.real_inputs).__name__)
        TritonBundler._entries = ["theirs"]
        counters["inductor"]["theirs"] += 2

    counters.clear()
    before = config.max_fusion_size
    mine = TritonBundler._entries
    counted = Counter()
    apart = torch_internals._apart(work, counted)
    monkeypatch.setattr(TritonBundler, "_entries", ["mine"])
    with config.patch(max_fusion_size=before + 1), V.set_real_inputs([]):
        apart()
        assert config.max_fusion_size == before + 1 and V.real_inputs == []
    assert seen == {"size": before, "bundle": None, "real": "NullHandler"}
    assert TritonBundler._entries == ["mine"] and mine is None
    assert counted["theirs"] == 2 and counters["inductor"]["theirs"] == 0


@pytest.mark.parametrize("many", [0, 1, 3, 40])
@pytest.mark.parametrize("asks", [True, False])
def test_results_come_in_order(many, asks):
    deepest, open_now = 0, 0

    def maker(number):
        def make(beside):
            nonlocal deepest, open_now
            open_now += 1
            deepest = max(deepest, open_now)
            if asks and beside is not None:
                beside()
            open_now -= 1
            return number

        return make

    assert one_inside_another([maker(i) for i in range(many)]) == list(range(many))
    assert deepest == (min(many, 8) if asks else min(many, 1))
