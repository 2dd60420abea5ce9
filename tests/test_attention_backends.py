"""What computes paged attention: each backend against float64, compiled and not, piecewise and as one CUDA graph."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from paged_model import VOCAB, Model, Traffic
from ragged_attention import FEATURES, error, expected, random_case

import pcg_compile as pcg
from pcg_compile.attention import AttentionShape, PagedAttention, PagedKVCache, choose, choose_impl
from pcg_compile.attention.by_time import choose_by_time
from pcg_compile.attention.reference import ReferenceAttention
from pcg_compile.attention.triton import TritonAttention
from pcg_compile.errors import BatchError, OptionsError
from pcg_compile.options import Options

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
#: What runs here.
BACKENDS = ["reference", *(["triton"] if INTERPRETED or CUDA else [])]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
#: Features that modules have, by what they are called there.
OF_MODULES = {name: options for name, options in FEATURES.items() if "tiling" not in options and "spans" not in options}
#: Where the interpreter is slow: what passes tensors of its own to the kernels.
IN_SHORT = ("causal", "sinks and a window", "alibi", "fp8, softcap, window", "values of another size")
SMALL_LENGTHS = {} if CUDA else {"longest": 30, "prompt": 12}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.skipif(CUDA or INTERPRETED or sys.platform != "linux", reason="the kernels run as they are")
def test_this_file_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "triton", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def served(case, *, compiled=None, **options):
    """A case through a cache, a step and :class:`PagedAttention`: keys of earlier tokens are in the cache already."""
    mask, (heads, head_dim), kv_heads = case.mask, case.q.shape[1:], case.k.shape[2]
    cache = PagedKVCache(
        1, len(case.k), case.page_size, num_kv_heads=kv_heads, head_dim=head_dim, v_head_dim=case.v.shape[3],
        dtype=case.k.dtype, device=DEVICE, k_scale=1.0 if case.k_scales is None else case.k_scales,
        v_scale=1.0 if case.v_scales is None else case.v_scales,
    )  # fmt: skip
    batch = pcg.Batch(case.qo_lens, case.kv_lens, case.tables)
    flat = [t.view(torch.uint8) if t.element_size() == 1 else t for t in (case.k, case.v)]
    new = []
    slots = torch.from_numpy(batch.tables(case.page_size).slots).to(DEVICE)
    for mine, flat_cache, scales, stored in zip(
        flat, (cache.flat_k[0], cache.flat_v[0]), (case.k_scales, case.v_scales), (case.k, case.v), strict=True
    ):
        flat_cache.copy_(mine.flatten(0, 1))
        tokens = flat_cache[slots].view(stored.dtype).to(case.q.dtype)
        new.append(tokens if scales is None else (tokens.float() * scales[:, None]).to(case.q.dtype))
        # New tokens are the step's to write.
        flat_cache[slots] = 0
    attention = PagedAttention(
        0, heads, kv_heads, head_dim, mask.get("window"), mask.get("softcap"), case.scale,
        causal=mask.get("causal", True), chunk=mask.get("chunk"), v_head_dim=case.v.shape[3], sinks=case.sinks,
        alibi_slopes=case.slopes,
    )  # fmt: skip

    def forward(q, k, v):
        return attention(q * 1, k * 1, v * 1) * 1

    if compiled is None:
        compiled = pcg.piecewise(dynamic={"q": 0, "k": 0, "v": 0}, compiler="eager", **options)(forward)
    with pcg.step(batch, cache):
        return compiled(case.q, *new), compiled


@pytest.mark.parametrize(
    ("backend", "feature"),
    [
        (backend, name)
        for backend in BACKENDS
        for name in (IN_SHORT if backend == "triton" and not CUDA else OF_MODULES)
    ],
)
def test_every_feature_of_a_module(backend, feature):
    for seed in (0, 1) if backend == "reference" or CUDA else (3,):
        case = random_case(seed, **OF_MODULES[feature], **SMALL_LENGTHS, device=DEVICE)
        got, compiled = served(case, attention_backend=backend, buckets=[8, 32, 200], max_padding=100)
        want, _ = expected(case)
        assert error(got, want) < (2e-3 if case.k_scales is not None else TOLERANCE[case.q.dtype])
        stats = pcg.stats(compiled)
        assert stats.captured and not stats.fallbacks


@pytest.mark.parametrize(
    ("backend", "mode"),
    [("reference", "full"), ("reference", "piecewise"), *([("triton", "full")] if INTERPRETED else [])],
)
def test_ragged_traffic(backend, mode):
    """One capture per bucket and kind of batch serves whatever fits: decode, prompts, mixed, any number of requests."""
    model = Model(window=6).eval()
    compiled = pcg.piecewise(
        dynamic={"ids": 0, "positions": 0}, compiler="eager", buckets=[4, 8, 16], attention_backend=backend,
        cudagraph_mode=mode,
    )(model.forward)  # fmt: skip
    traffic = Traffic(page_size=4)
    slow = backend == "triton"
    if not slow:
        batch = traffic.batch({1: 5})
        with pcg.step(batch, traffic.caches[1]):
            pcg.warmup(compiled, torch.randint(0, VOCAB, (5,)), batch.positions, progress=False)
        traffic.lengths.clear()
    steps = [{1: 7, 2: 1}, {1: 1, 2: 1}, {1: 1, 2: 2}, {3: 1}, {1: 3, 4: 5}, {1: 1, 2: 1, 3: 1, 4: 1}, {1: 1, 3: 9}]
    # Inputs and outputs are bound to each number of tokens.
    with pcg.expect(compiled, **({} if slow else {"captured": 0})):
        for lens in steps[:5] if slow else steps:
            traffic.check(model, compiled, lens)
    if mode == "full":
        with pcg.expect(compiled, captured=0, replays=2):
            for lens in ({1: 1, 2: 7}, {5: 1, 2: 1}):
                traffic.check(model, compiled, lens)
    assert not pcg.stats(compiled).fallbacks


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_layers_of_one_step_share_nothing_but_the_lists(backend):
    """A window of one layer must not reach the other's plan."""
    cache = PagedKVCache(2, 64, 4, num_kv_heads=2, head_dim=16, device=DEVICE)
    layers = [PagedAttention(0, 4, 2, 16, window=3), PagedAttention(1, 4, 2, 16)]

    def forward(x):
        for layer in layers:
            x = layer(x, x[:, :2].contiguous(), x[:, 2:].contiguous()) + x
        return x

    def run(fn):
        batch = pcg.Batch([9, 1, 20], [9, 1, 20], [[1, 2, 3], [4], [5, 6, 7, 8, 9]])
        with pcg.step(batch, cache):
            return fn(x)

    x = torch.randn(30, 4, 16, device=DEVICE)
    compiled = pcg.piecewise(dynamic={"x": 0}, compiler="eager", buckets=[32], attention_backend=backend)(forward)
    torch.testing.assert_close(run(compiled), run(forward), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["piecewise", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_tokens_see_each_other(backend, mode):
    """As image tokens: against the same mask in plain PyTorch; the next batch of that size has none."""
    cache = PagedKVCache(1, 32, 4, num_kv_heads=1, head_dim=16, device=DEVICE)
    attention = PagedAttention(0, 2, 1, 16, window=4)

    def forward(x):
        return attention(x, x[:, :1] * 1, x[:, 1:] * 1) * 1

    compiled = pcg.piecewise(
        dynamic={"x": 0}, compiler="eager", buckets=[16], attention_backend=backend, cudagraph_mode=mode
    )(forward)
    for groups in ([-1, 0, 0, 0, -1, 1, 1, 1, 1, 1, 1, 7], None, [0] * 12, [-1] * 6 + [3] * 6):
        x = torch.randn(12, 2, 16, device=DEVICE)
        with pcg.step(pcg.Batch([2, 10], [2, 10], [[1], [2, 3, 4]], groups=groups), cache):
            got = compiled(x)
        at = torch.arange(12)
        owner = (at >= 2).long()
        seen = (owner[:, None] == owner) & (at <= at[:, None]) & (at > at[:, None] - 4)
        if groups is not None:
            group = torch.tensor(groups)
            seen |= (owner[:, None] == owner) & (group[:, None] == group) & (group >= 0)
        scores = torch.einsum("qhd,kd->hqk", x, x[:, 0]) * 16**-0.5
        weights = torch.softmax(scores.masked_fill(~seen.to(DEVICE), -torch.inf), -1)
        torch.testing.assert_close(got, torch.einsum("hqk,kd->qhd", weights, x[:, 1]), rtol=1e-4, atol=1e-4)
    # On a GPU plain PyTorch plans on the host.
    assert backend == "reference" or not pcg.stats(compiled).fallbacks


def test_groups_that_make_no_sense():
    for groups, match in (
        ([0, 0], "2.* for 3 tokens"),
        ([0, 1, 0], "group 0 of request 0"),
        ([0.5] * 3, "groups holds"),
    ):
        with pytest.raises(BatchError, match=match):
            pcg.Batch([3], groups=groups)
    # The same number in two requests is two groups.
    assert pcg.Batch([1, 2], groups=[0, 0, 0]).spans.tolist() == [[0, 0], [0, 1], [0, 1]]


def test_fp8_caches_clamp_what_they_cannot_hold_and_keep_scales():
    cache = PagedKVCache(
        1, 8, 4, num_kv_heads=2, head_dim=4, dtype=torch.float8_e4m3fn, k_scale=torch.tensor([1.0, 0.5]), v_scale=2.0
    )
    attention = PagedAttention(0, 2, 2, 4)
    q, k, v = torch.randn(3, 3, 2, 4) * torch.tensor([1.0, 400.0, 2000.0])[:, None, None, None]
    with pcg.step(pcg.Batch([3], [3], [[1]]), cache):
        assert attention(q, k, v).isfinite().all()
    stored_k, stored_v = cache.k[0][1, :3].float(), cache.v[0][1, :3].float() * 2
    stored_k *= torch.tensor([1.0, 0.5])[:, None]
    torch.testing.assert_close(stored_k[:, 0], k[:, 0].clamp(-448, 448), rtol=0.07, atol=0.01)
    torch.testing.assert_close(stored_k[:, 1], k[:, 1].clamp(-224, 224), rtol=0.07, atol=0.01)
    torch.testing.assert_close(stored_v, v.clamp(-896, 896), rtol=0.07, atol=0.01)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), [1.0, 1.0, 1.0]])
def test_scales_that_make_no_sense(scale):
    with pytest.raises(OptionsError, match="number above 0"):
        PagedKVCache(
            1, 8, 4, num_kv_heads=2, head_dim=4, dtype=torch.float8_e4m3fn,
            k_scale=torch.tensor(scale) if isinstance(scale, list) else scale,
        )  # fmt: skip


def test_a_backend_that_cannot_run_here_says_why():
    if CUDA:
        pytest.skip("it can")
    shape = AttentionShape(4, 2, 16, None, None, 1.0, torch.float32)
    cpu = torch.device("cpu")
    assert choose_impl(shape, cpu) == (ReferenceAttention, None)
    names = {"flashinfer": "FlashInfer computes on CUDA"}
    if not INTERPRETED:
        names["triton"] = "TRITON_INTERPRET=1"
    for name, why in names.items():
        with pytest.raises(OptionsError, match=why) as caught:
            served(random_case(0, device=DEVICE), attention_backend=name)
        assert f"attention_backend={name!r}" in str(caught.value) and '"auto"' in str(caught.value)
    with pytest.raises(OptionsError, match="attention_backend"):
        Options(attention_backend="cudnn")


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_triton_refuses_what_it_does_not_compute():
    shape = AttentionShape(4, 2, 16, None, None, 1.0, torch.float64, backend="triton")
    with pytest.raises(OptionsError, match="float64"):
        choose_impl(shape, torch.device("cpu"))
    kind, _ = choose_impl(
        AttentionShape(4, 2, 16, None, None, 1.0, torch.float32, backend="triton"), torch.device("cpu")
    )
    assert kind is TritonAttention


@pytest.mark.parametrize("form", [list, np.asarray, torch.tensor, lambda rows: np.asarray(rows, dtype=np.int64) << 32])
def test_pages_and_slots_out_of_range_are_errors_before_anything_is_written(form):
    """Slots follow from pages. An entry of an array that no token needs may hold anything, one of a list may not."""
    cache = PagedKVCache(1, 4, 4, num_kv_heads=2, head_dim=16, device=DEVICE)
    before, far = cache.k[0].clone(), form([[1, 2]])[0][0] > 1
    for table, match in (
        ([[1, 4]], "uses page"),
        ([[4, 1]], "uses page"),
        ([[1, -1]], "uses page"),
        ([[1, 0]], "uses page"),
        ([[1 << 40, 1]], "uses page"),
        ([[1]], "needs 2" if not far else "uses page|needs 2"),
    ):
        with pytest.raises(BatchError, match=match), pcg.step(pcg.Batch([5], [5], form(table)), cache):
            raise AssertionError("the step began")
    if form is not list and not far:
        with pcg.step(pcg.Batch([5], [5], form([[1, 2, 99]])), cache):
            pass
    with pytest.raises(BatchError, match="uses page 2; |uses page 2$|pages and needs"):
        # Within the cache for the first step, out of it later on.
        small = PagedKVCache(1, 2, 4, num_kv_heads=2, head_dim=16, device=DEVICE)
        batch = pcg.Batch([4], [4], [[1, 2]])
        with pcg.step(batch, small):
            pass
        with pcg.step(batch.advance(), small):
            raise AssertionError("the step began")
    assert torch.equal(cache.k[0], before)


@pytest.mark.parametrize(
    "wrong",
    [{"chunk": 0}, {"v_head_dim": 0}, {"causal": 1}, {"sinks": torch.ones(3)}, {"alibi_slopes": 0.5}],
)
def test_modules_refuse_what_makes_no_sense(wrong):
    (name,) = wrong
    with pytest.raises(OptionsError, match=name):
        PagedAttention(0, 4, 2, 16, **wrong)


def test_sinks_and_slopes_are_state_of_the_module():
    sinks = torch.nn.Parameter(torch.randn(4))
    attention = PagedAttention(0, 4, 2, 16, sinks=sinks, alibi_slopes=torch.ones(4), chunk=8, causal=False)
    assert [n for n, _ in attention.named_parameters()] == ["sinks"]
    assert [n for n, _ in attention.named_buffers()] == ["alibi_slopes"]
    assert attention.sinks is sinks and (attention.chunk, attention.causal, attention.v_head_dim) == (8, False, 16)
    assert "chunk=8" in repr(attention) and "causal=False" in repr(attention) and "sinks" in repr(attention)


def test_explain_says_what_computes_attention():
    cache = PagedKVCache(1, 8, 4, num_kv_heads=2, head_dim=16)
    attention = PagedAttention(0, 4, 2, 16)

    def forward(x):
        return attention(x, x[:, :2] * 1, x[:, 2:] * 1) * 1

    compiled = pcg.piecewise(dynamic={"x": 0}, compiler="eager", buckets=[8])(forward)
    with pcg.step(pcg.Batch([3], [3], [[1]]), cache):
        assert "by ReferenceAttention" in " ".join(str(pcg.explain(compiled, torch.randn(3, 4, 16))).split())


def two_backends(monkeypatch, slow):
    """Has "auto" choose between two implementations, one of which takes a millisecond longer; counts their runs."""
    runs = dict.fromkeys(("first", "second"), 0)

    def made(label):
        class Timed(ReferenceAttention):
            name, auto_on = label, ("cpu",)

            def __init__(self, *args):
                super().__init__(*args)
                self.capturable = label == "first"

            def run(self, call, plan):
                runs[label] += 1
                for _ in range(20 if label == slow else 1):
                    super().run(call, plan)

        return Timed

    for label in runs:
        monkeypatch.setitem(choose.BACKENDS, label, made(label))
    return runs


@pytest.mark.parametrize("slow", ["first", "second"])
def test_auto_takes_what_warm_up_found_faster(monkeypatch, slow):
    runs = two_backends(monkeypatch, slow)
    model, traffic = Model().eval(), Traffic(page_size=4)
    compiled = pcg.piecewise(dynamic={"ids": 0, "positions": 0}, compiler="eager", buckets=[4, 8])(model.forward)
    with pcg.step(traffic.batch({1: 3}), traffic.caches[1]) as batch:
        pcg.warmup(compiled, torch.randint(0, VOCAB, (3,)), batch.positions, progress=False)
    traffic.lengths.clear()
    assert min(runs.values()) > 0
    runs.update(first=0, second=0)
    traffic.check(model, compiled, {1: 5, 2: 2})
    fast = "second" if slow == "first" else "first"
    # Uncompiled, the model has the rows of no bucket.
    assert runs["second"] > 0 if fast == "second" else runs["second"] == 0
    for use in pcg.stats(compiled).buckets.values():
        assert f"attention by {fast} (us a layer: first " in use.attention


@pytest.mark.parametrize(("saved", "fast"), [(0.0, "second"), (1.0, "first")])
def test_a_full_graph_is_given_up_only_for_more_than_it_saves(monkeypatch, saved, fast):
    two_backends(monkeypatch, "first")
    cache = PagedKVCache(2, 64, 4, num_kv_heads=2, head_dim=16)
    text = AttentionShape(4, 2, 16, None, None, 0.25, torch.float32).encode()
    before = [k.clone() for k in cache.k]
    in_graph, figures = choose_by_time(cache, {text: 2}, 8, saved)
    assert in_graph == (fast == "first") and cache.impl(text, 8).name == fast and cache.impl(text, 16).name == "first"
    assert "first" in figures and "second" in figures
    assert all(torch.equal(a, b) for a, b in zip(before, cache.k, strict=True))


def test_what_would_take_long_to_time_is_left_out_and_named(monkeypatch):
    two_backends(monkeypatch, "first")
    monkeypatch.setattr(choose.BACKENDS["second"], "why_not_timed", lambda shape: "40 s of nvcc")
    cache = PagedKVCache(1, 64, 4, num_kv_heads=2, head_dim=16)
    text = AttentionShape(4, 2, 16, None, None, 0.25, torch.float32).encode()
    assert choose_by_time(cache, {text: 1}, 8, 0.0) == (True, "attention by first (second not timed: 40 s of nvcc)")
    assert cache.impl(text, 8).name == "first"


def test_nothing_is_timed_where_one_backend_runs(monkeypatch):
    cache = PagedKVCache(1, 64, 4, num_kv_heads=2, head_dim=16)
    text = AttentionShape(4, 2, 16, None, None, 0.25, torch.float32).encode()
    monkeypatch.setattr(ReferenceAttention, "run", None)
    assert choose_by_time(cache, {text: 2}, 8, 0.0) is None
