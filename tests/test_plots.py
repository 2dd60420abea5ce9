"""A step's timeline and the pictures of a report."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import pytest
import torch
from models import ToyLlama
from paged_model import LAYERS, Model, Traffic

import pcg_compile as pcg

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex

from pcg_compile.report.plots import COLOURS

OPTIONS = {"buckets": [4, 8, 16], "compiler": "eager"}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pcg.split_op("plots::slow", mutates_args=("out",))
def slow(x: torch.Tensor, out: torch.Tensor) -> None:
    """Keeps the host busy for longer than everything else in a step."""
    torch.linalg.svd(torch.eye(500, device="cpu"))
    out.copy_(x + 1)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def llama(device="cpu", sizes=(3, 7, 7)):
    model = ToyLlama(layers=2).eval().to(device)
    compiled = pcg.piecewise(dynamic={"ids": 0}, **OPTIONS)(model.forward)
    with torch.no_grad():
        for n in sizes:
            compiled(torch.randint(0, 128, (n,), device=device))
    return compiled


def timeline_of(compiled, *args):
    (graph,) = pcg.explain(compiled, *args).graphs
    return graph.timeline


@pytest.mark.parametrize("device", DEVICES)
def test_a_captured_step_is_timed_call_by_call(device):
    compiled = llama(device)
    with pcg.expect(compiled, captured=0, replays=0, steps=0):
        timeline = timeline_of(compiled, torch.randint(0, 128, (7,), device=device))
    assert timeline.sizes == (7,) and timeline.bucket == (8,)
    lanes = {lane: [s for s in timeline.spans if s.lane == lane] for lane in ("host", "device")}
    assert bool(lanes["device"]) == (device == "cuda")
    for spans in filter(None, lanes.values()):
        items = [s for s in spans if s.kind in ("replay", "split op")]
        assert [s.name for s in items] == ["piece 0", "silly::attention", "piece 1", "silly::attention", "piece 2"]
        assert spans[0].kind == "inputs" and spans[-1].kind == "outputs"
        assert all(s.seconds >= 0 for s in spans)
        # One after the other, and no call before the one ahead of it has ended.
        assert all(one.start + one.seconds <= two.start + 1e-9 for one, two in pairwise(spans))
    host = lanes["host"]
    assert host[-1].start + host[-1].seconds <= timeline.seconds
    assert 0 <= timeline.gap_seconds() < timeline.seconds
    assert all("models.py" in s.where for s in host if s.kind in ("replay", "split op"))


def test_times_are_real():
    def two(x):
        x = x * 2
        out = torch.empty_like(x)
        torch.ops.plots.slow(x, out)
        return out - 1

    run = pcg.piecewise(**OPTIONS)(two)
    with torch.no_grad():
        run(torch.randn(3, 4))
    timeline = timeline_of(run, torch.randn(3, 4))
    longest = max(timeline.spans, key=lambda span: span.seconds)
    assert longest.name == "plots::slow" and longest.seconds <= timeline.seconds
    assert longest.seconds > sum(span.seconds for span in timeline.spans) / 2


def test_without_captured_graphs_a_step_is_timed_at_its_exact_size():
    compiled = llama(sizes=(3,))
    with pcg.expect(compiled, captured=0, replays=0):
        timeline = timeline_of(compiled, torch.randint(0, 128, (7,)))
    assert timeline.bucket is None
    assert {span.kind for span in timeline.spans} == {"inputs", "piece", "split op", "outputs"}


def test_a_size_that_never_ran_uses_its_buckets_captured_graphs():
    compiled = llama(sizes=(7,))
    with pcg.expect(compiled, captured=0, replays=0):
        timeline = timeline_of(compiled, torch.randint(0, 128, (6,)))
    assert timeline.sizes == (6,) and timeline.bucket == (8,)


@pytest.mark.parametrize("cudagraph_mode", ["piecewise", "full"])
def test_timing_a_paged_step_leaves_the_cache_and_the_next_step_alone(cudagraph_mode):
    model, traffic = Model().eval(), Traffic()
    options = {**OPTIONS, "cudagraph_mode": cudagraph_mode}
    compiled = pcg.piecewise(dynamic={"ids": 0, "positions": 0}, **options)(model.forward)
    for qo_lens in ({1: 5, 2: 2}, {1: 2, 2: 5}, {1: 1, 2: 6}):
        traffic.check(model, compiled, qo_lens)
    batch = traffic.batch({1: 1, 2: 6})
    cache = traffic.caches[1]
    ids = torch.arange(7)
    before = [t.clone() for t in cache.k + cache.v]
    with pcg.step(batch, cache), pcg.expect(compiled, captured=0, replays=0, steps=0):
        timeline = timeline_of(compiled, ids, batch.positions)
    assert all(torch.equal(old[1:], new[1:]) for old, new in zip(before, cache.k + cache.v, strict=True))
    with pcg.step(batch, traffic.caches[0]):
        want = model(ids, batch.positions)
    with pcg.step(batch, cache):
        torch.testing.assert_close(compiled(ids, batch.positions), want)
    kinds = [span.kind for span in timeline.spans]
    if cudagraph_mode == "full":
        assert kinds == ["inputs", "metadata", "replay", "outputs"]
    else:
        assert kinds.count("split op") == LAYERS and kinds.count("replay") == LAYERS + 1
        assert kinds.index("metadata") < kinds.index("replay")


def test_what_a_step_changes_is_as_before():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls.add_(1)
            return torch.ops.silly.fresh(x + torch.rand_like(x)) + self.calls

    model = Counting()
    compiled = pcg.piecewise(**OPTIONS)(model.forward)
    with torch.no_grad():
        compiled(torch.zeros(3, 2))
    state = torch.get_rng_state()
    assert timeline_of(compiled, torch.zeros(3, 2)) is not None
    assert model.calls.item() == 1 and torch.equal(torch.get_rng_state(), state)


def test_the_picture_has_a_bar_for_equal_calls_and_for_each_bucket():
    compiled = llama(sizes=(3, 7, 7, 16))
    report = pcg.explain(compiled, torch.randint(0, 128, (7,)))
    figure = report.plot()
    above, below = figure.axes
    spans, gaps = report.graphs[0].timeline.spans, report.graphs[0].timeline.gap_seconds()
    assert sum(patch.get_width() for patch in above.patches) == pytest.approx(sum(s.seconds for s in spans) + gaps)
    assert [to_hex(patch.get_facecolor()) for patch in above.patches] == [
        COLOURS[kind] for kind in ("inputs", "replay", "split op", "replay", "outputs", "gaps")
    ]
    labels = [label.get_text() for label in above.get_yticklabels()]
    assert labels[1:4] == [
        "piece 0  embed  replay", "silly::attention  layers.0-1  split op", "piece 1-2  layers.0-1.out  replay",
    ]  # fmt: skip
    assert "2 x" in above.texts[2].get_text() and "bucket 8" in above.get_title("left")
    assert [patch.get_width() for patch in below.patches] == [3, 14, 16, 1, 2, 0]
    assert [text.get_text().partition(" ")[0] for text in below.texts] == ["25%", "12%", "0%"]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_the_picture_says_what_is_missing():
    compiled = llama(sizes=())
    above, below = pcg.explain(lambda x: x + 1, torch.ones(3)).plot().axes
    assert len(above.patches) > 0 and "no step has used a bucket" in below.texts[0].get_text()
    with torch.no_grad():
        compiled(torch.arange(3))
    above, below = pcg.explain(compiled).plot().axes
    assert "pass a call's arguments" in above.texts[0].get_text() and len(below.patches) == 2


def test_several_dynamic_sizes_and_several_graphs():
    def broken(x):
        y = torch.ops.silly.fresh(x.relu()) + 1
        torch._dynamo.graph_break()
        return torch.ops.silly.fresh(y) * 2

    run = pcg.piecewise(dynamic={"x": (0, 1)}, **OPTIONS)(broken)
    with torch.no_grad():
        run(torch.randn(3, 5))
        report = pcg.explain(run, torch.randn(3, 5))
    # Behind the break Dynamo compiles for the size that it sees first.
    assert [graph.timeline.bucket for graph in report.graphs] == [(4, 8), ()]
    above, below = report.plot().axes
    assert {label.get_text().partition(",")[0] for label in above.get_yticklabels()} == {"graph 0", "graph 1"}
    assert "in bucket 4x8" in above.get_title("left")
    assert "bucket (4, 8)" in [label.get_text() for label in below.get_yticklabels()]


def test_timelines_are_in_the_json():
    compiled = llama()
    report = pcg.explain(compiled, torch.arange(7))
    timeline = json.loads(report.to_json())["graphs"][0]["timeline"]
    assert len(timeline["spans"]) == len(report.graphs[0].timeline.spans) and timeline["bucket"] == [8]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    report = pcg.explain(llama())
    monkeypatch.delitem(sys.modules, "pcg_compile.report.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.plot()
    assert "matplotlib" not in str(report)


def test_each_run_routes_its_adapters_anew():
    """A step routes once; a timeline of five runs must not show four that found it done."""
    from routed_lora import Model as WithAdapters

    model = WithAdapters()
    compiled = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(model.forward)
    batch = pcg.Batch([4, 3], adapters=["b", None])
    x = torch.randn(7, 6)
    with pcg.step(batch):
        compiled(x)
    model.source.calls.clear()
    with pcg.step(batch):
        timeline = timeline_of(compiled, x)
        want = compiled(x)
    begun = model.source.calls.count("begin")
    assert begun > 5 and model.source.calls.count("end") == begun
    assert [s.name for s in timeline.spans if s.kind == "metadata"] == ["pcg::prepare_lora"]
    torch.testing.assert_close(want, model.expected(x, [1] * 4 + [-1] * 3))
