"""LoRA routing in compiled models: once a step, at fixed addresses, right for every mix of adapters."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from routed_lora import ADAPTERS, WIDTH, Model
from torch import nn

import pcg_compile as pcg
from pcg_compile.lora.route import route_requests


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [4, 8, 16], **options})


def check(model, function, x, lengths, names):
    slots = np.repeat([-1 if name is None else "abc".index(name) for name in names], lengths)
    with torch.no_grad():
        want = model.expected(x, slots)
    batch = pcg.Batch(lengths, adapters=names)
    with pcg.step(batch):
        got = function(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


MIXES = [
    ([1, 3, 2], ["a", None, "c"]), ([4], ["b"]), ([1, 1, 1], ["c", "a", "c"]), ([2, 5], [None, None]),
    ([7, 1, 4], ["b", "a", "b"]), ([16], ["a"]), ([3, 20], ["c", "b"]),
]  # fmt: skip


@pytest.mark.parametrize("shape", ["rows", "one batch row"])
def test_every_mix_is_right_and_nothing_is_captured_again(shape):
    model = Model()
    function = compiled(model)
    sizes = [sum(lengths) for lengths, _ in MIXES]
    # One call of each bucket, all tokens the base model's: the mixes come later.
    for n in (5, 4, 9, 16, 3, 7, 23):
        with pcg.step(pcg.Batch([n])):
            function(torch.randn((n, WIDTH) if shape == "rows" else (1, n, WIDTH)))
    before = pcg.stats(function)
    for (lengths, names), n in zip(MIXES, sizes, strict=True):
        x = torch.randn((n, WIDTH) if shape == "rows" else (1, n, WIDTH))
        check(model, function, x, lengths, names)
    after = pcg.stats(function)
    assert after.captured == before.captured and after.graphs == before.graphs
    assert after.replays > before.replays
    assert all("largest bucket, 16" in f.reason for f in after.fallbacks)


def test_one_routing_a_step_for_all_layers():
    model = Model()
    function = compiled(model)
    for n in (3, 5, 6):
        check(model, function, torch.randn(n, WIDTH), [n], ["a"])
    model.source.calls.clear()
    check(model, function, torch.randn(6, WIDTH), [2, 4], ["a", "b"])
    assert model.source.calls == ["slots_of", "begin", "end"]


def test_a_call_outside_a_step_is_the_base_model():
    model = Model()
    function = compiled(model)
    for n in (3, 6, 7):
        check(model, function, torch.randn(n, WIDTH), [n], ["b"])
        x = torch.randn(n, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(function(x), model.expected(x, [-1] * n))
            torch.testing.assert_close(model(x), model.expected(x, [-1] * n))


def test_slots_from_the_device():
    model = Model()
    function = compiled(model)
    for n in (5, 6, 8, 13, 2):
        slots = torch.randint(-1, ADAPTERS, (n,))
        x = torch.randn(n, WIDTH)
        with pcg.step(pcg.Batch([n], adapters=slots)):
            got, eager = function(x), model(x)
        with torch.no_grad():
            want = model.expected(x, slots.tolist())
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(eager, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dynamic", [(0, 1), (1,), (0,)])
def test_tokens_in_two_dimensions(dynamic):
    model = Model()

    @pcg.piecewise(dynamic={"x": dynamic}, buckets=[4, 8], compiler="eager")
    def function(x):
        return model(x)

    for batch, tokens in (
        [(2, 3), (2, 5), (2, 8)]
        if dynamic == (1,)
        else [(3, 5), (2, 5), (6, 5)]
        if dynamic == (0,)
        else [(2, 3), (3, 5), (6, 7), (1, 4)]
    ):
        names = (["a", None, "c", "b", "a", "a"])[:batch]
        check(model, function, torch.randn(batch, tokens, WIDTH), [tokens] * batch, names)


def test_other_tokens_than_the_batch():
    model = Model()
    function = compiled(model)
    for n in (4, 5, 6):
        check(model, function, torch.randn(n, WIDTH), [n], ["b"])
    for call in (function, model):
        with pytest.raises(pcg.errors.BatchError, match="6 tokens"), pcg.step(pcg.Batch([5], adapters=["a"])):
            call(torch.randn(6, WIDTH))


def test_explain_shows_the_inserted_nodes():
    model = Model()
    report = pcg.explain(model, torch.randn(5, WIDTH))
    assert any("pcg::prepare_lora" in note for graph in report.graphs for note in graph.notes)


@pytest.mark.parametrize("compiler", ["inductor"])
def test_inductor(compiler):
    model = Model()
    function = compiled(model, compiler=compiler)
    for n in (5, 6, 8, 13, 3):
        check(model, function, torch.randn(n, WIDTH), [n - 1, 1], ["c", "a"])
    assert pcg.stats(function).replays > 0


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(-1, 4)), min_size=1, max_size=12), st.integers(0, 7)
)
def test_requests_on_the_host_are_routed_as_tokens_are(requests, padding):
    lengths, slots = [n for n, _ in requests], np.array([s for _, s in requests])
    rows = sum(lengths) + padding
    out = np.zeros(6 + rows, dtype=np.int32)
    route_requests(lengths, slots, 5, out)
    tokens = torch.tensor([*np.repeat(slots, lengths).tolist(), *[-1] * padding])
    want = pcg.lora.route(tokens, 5)
    assert out[:6].tolist() == want.seg_indptr.tolist()
    assert out[6:].tolist() == want.permutation.tolist()


def test_adapters_that_nobody_reads_are_told(caplog):
    plain = nn.Linear(4, 4)
    with pcg.step(pcg.Batch([2], adapters=["a"])):
        plain(torch.randn(2, 4))
    assert "no LoRA layer ran in its step" in caplog.text
    caplog.clear()
    check(Model(), Model(), torch.randn(3, WIDTH), [3], ["a"])
    with pcg.step(pcg.Batch([2], adapters=[None])):
        plain(torch.randn(2, 4))
    assert not caplog.text
