"""Paged attention on a GPU: Triton and FlashInfer against the reference, without syncs or pageable copies."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from pcg_compile.attention import AttentionShape, PagedAttention, PagedKVCache, choose_impl, ops
from pcg_compile.attention.base import AttentionCall
from pcg_compile.attention.flashinfer import FlashInferAttention
from pcg_compile.attention.reference import ReferenceAttention
from pcg_compile.attention.triton import TritonAttention
from pcg_compile.batch import Batch
from pcg_compile.step import current_step, scratch_step, step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
needs_flashinfer = pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs FlashInfer")
BACKENDS = ["triton", pytest.param("flashinfer", marks=needs_flashinfer)]


def setup(heads=8, kv_heads=2, head_dim=128, page_size=16, dtype=torch.bfloat16, window=None, softcap=None, pages=600):
    cache = PagedKVCache(
        1, pages, page_size, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device="cuda", max_requests=64
    )
    return cache, PagedAttention(0, heads, kv_heads, head_dim, window, softcap)


def new_tokens(cache, heads, tables, kv_lens, lens, seed):
    torch.manual_seed(seed)
    for r, n in enumerate(lens):
        kv_lens[r] += n
        tables[r] += cache.allocate(-(-kv_lens[r] // cache.page_size) - len(tables[r]))
    n = sum(lens)
    q = torch.randn(n, heads, cache.head_dim, device="cuda", dtype=cache.dtype)
    k, v = torch.randn(2, n, cache.num_kv_heads, cache.head_dim, device="cuda", dtype=cache.dtype)
    return Batch(lens, list(kv_lens), tables), q, k, v


def text_of(attention, cache, backend):
    return AttentionShape(
        attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.window, attention.softcap,
        attention.scale, cache.dtype, backend=backend,
    ).encode()  # fmt: skip


def reference_of(cache, attention, q):
    """The reference on the same cache, in float32."""
    shape = AttentionShape(
        attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.window, attention.softcap,
        attention.scale, torch.float32,
    )  # fmt: skip
    impl = ReferenceAttention(shape, cache.memory)
    out = torch.empty(q.shape, device="cuda")
    prepared = current_step().prepare(len(q), "slice")
    impl.run(AttentionCall(q.float(), cache.k[0].float(), cache.v[0].float(), out), impl.plan(prepared))
    return out


STEPS = ([70, 1, 300, 17, 33], [1, 1, 1, 1, 1], [1, 128, 1, 2, 64], [1, 1, 1, 1, 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(
    "variant",
    [
        {}, {"window": 40}, {"window": 1}, {"softcap": 20.0}, {"window": 64, "softcap": 15.0},
        {"head_dim": 64, "heads": 32, "kv_heads": 8}, {"head_dim": 256, "heads": 4, "kv_heads": 1},
        {"dtype": torch.float16},
    ],
)  # fmt: skip
def test_backends_equal_the_reference(variant, page_size, backend):
    cache, attention = setup(**variant, page_size=page_size, pages=1200 if page_size == 1 else 600)
    tables, kv_lens = [[] for _ in range(5)], [0] * 5
    for seed, lens in enumerate(STEPS):
        batch, q, k, v = new_tokens(cache, attention.num_heads, tables, kv_lens, lens, seed)
        with step(batch, cache):
            result = ops.paged_attention(q, k, v, 0, text_of(attention, cache, backend))
            kind = {"triton": TritonAttention, "flashinfer": FlashInferAttention}[backend]
            assert all(isinstance(i, kind) for i in cache._impls.values()), cache.reasons
            torch.testing.assert_close(result.float(), reference_of(cache, attention, q), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["request", "slice"])
@pytest.mark.parametrize("variant", [{}, {"window": 20}, {"dtype": torch.float32, "head_dim": 32}])
def test_padding_changes_no_real_row(mode, variant):
    """As a program does it: one static q and out, whatever n is; pad rows finite, other pages untouched."""
    cache, attention = setup(**variant)
    shape = AttentionShape(8, 2, cache.head_dim, attention.window, None, attention.scale, cache.dtype).encode()
    tables, kv_lens = [[] for _ in range(5)], [0] * 5
    bucket = 512
    static_q = torch.zeros(bucket, 8, cache.head_dim, device="cuda", dtype=cache.dtype)
    static_kv = torch.zeros(2, bucket, 2, cache.head_dim, device="cuda", dtype=cache.dtype)
    out = torch.empty_like(static_q)
    prepare = ops.bind_prepare_batch(bucket, shape, mode=mode)
    for seed, lens in enumerate(STEPS):
        batch, q, k, v = new_tokens(cache, 8, tables, kv_lens, lens, seed)
        n = len(q)
        with step(batch, cache):
            eager = attention(q, k, v)
            static_q[:n], static_kv[0, :n], static_kv[1, :n] = q, k, v
            out.fill_(torch.nan)
            prepare()
            ops.store_kv(*static_kv, cache.flat_k[0], cache.flat_v[0], current_step().slot_mapping(bucket))
            rows = bucket if mode == "request" else n
            ops.bind_attend(static_q[:rows], out[:rows], 0, shape)()
        # Another number of requests may split keys differently.
        torch.testing.assert_close(out[:n], eager, rtol=2e-2, atol=1e-2)
        assert out[:rows].isfinite().all()
        assert not cache.k[0][[p for p in range(1, cache.num_pages) if p not in {q for t in tables for q in t}]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_plans_in_flight_do_not_meet(backend):
    """The host runs ahead of the device; every step's plan and metadata must be its own when its kernels run."""
    cache, attention = setup(pages=2000)
    shape = text_of(attention, cache, backend)
    torch.manual_seed(0)
    kv = torch.randn(2, 2000 * 16, 2, 128, device="cuda", dtype=cache.dtype)
    cache.flat_k[0].copy_(kv[0]), cache.flat_v[0].copy_(kv[1])
    q = torch.randn(64, 8, 128, device="cuda", dtype=cache.dtype)
    batches = []
    for i in range(40):
        requests = 1 + i % 7
        lens = [100 + 37 * i % 500 + r for r in range(requests)]
        used = iter(range(1, 2000))
        batches.append(Batch([1] * requests, lens, [[next(used) for _ in range(-(-n // 16))] for n in lens]))

    def run(wait):
        outs = [torch.empty(64, 8, 128, device="cuda", dtype=cache.dtype) for _ in batches]
        torch.cuda.synchronize()
        if not wait:
            torch.cuda._sleep(400_000_000)
        for batch, out in zip(batches, outs, strict=True):
            with step(batch, cache):
                ops.bind_prepare_batch(64, shape, mode="request")()
                ops.bind_attend(q, out, 0, shape)()
            if wait:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        return outs

    apart = run(wait=True)
    for batch, one, other in zip(batches, apart, run(wait=False), strict=True):
        assert torch.equal(one[: batch.num_tokens], other[: batch.num_tokens])


def test_a_steady_step_neither_syncs_nor_copies_from_pageable_memory():
    cache, attention = setup()
    shape = text_of(attention, cache, "triton")
    tables, kv_lens = [[] for _ in range(5)], [0] * 5
    q = torch.zeros(64, 8, 128, device="cuda", dtype=cache.dtype)
    out = torch.empty_like(q)

    def one(seed):
        batch, *_ = new_tokens(cache, 8, tables, kv_lens, [1, 2, 3, 4, 5], seed)
        with step(batch, cache):
            assert len(batch.positions) == len(batch.slot_mapping) == 15
            ops.bind_prepare_batch(64, shape, mode="request")()
            ops.bind_attend(q, out, 0, shape)()

    for seed in range(8):
        one(seed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one(9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        one(10)
    names = [event.name for event in profile.events()]
    bad = [n for n in names if "Pageable" in n or n in ("cudaStreamSynchronize", "cudaDeviceSynchronize")]
    # The profiler itself synchronizes the device once, when it stops.
    assert not [n for n in bad if n != "cudaDeviceSynchronize"] and bad.count("cudaDeviceSynchronize") <= 1, bad


@needs_flashinfer
def test_a_workspace_too_small_grows(monkeypatch):
    from pcg_compile.attention import flashinfer

    monkeypatch.setattr(flashinfer, "_FLOAT_WORKSPACE", 1 << 16)
    cache, attention = setup(pages=1000)
    batch = Batch([1] * 4, [3000] * 4, [list(range(1 + 200 * r, 189 + 200 * r)) for r in range(4)])
    q = torch.randn(4, 8, 128, device="cuda", dtype=cache.dtype)
    k, v = torch.randn(2, 4, 2, 128, device="cuda", dtype=cache.dtype)
    with step(batch, cache):
        result = ops.paged_attention(q, k, v, 0, text_of(attention, cache, "flashinfer"))
        torch.testing.assert_close(result.float(), reference_of(cache, attention, q), rtol=2e-2, atol=1e-2)
    assert cache.memory.workspaces["flashinfer"].numel() > 1 << 16


@needs_flashinfer
def test_the_installed_wrapper_takes_what_pcg_passes():
    """By its signatures, for versions that no GPU run has met."""
    from inspect import signature

    from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper as Wrapper

    signature(Wrapper).bind(None, "NHD", backend="fa2")
    signature(Wrapper.plan).bind(
        None, *range(8), causal=True, sm_scale=1.0, window_left=-1, logits_soft_cap=None, q_data_type=None,
        kv_data_type=None,
    )  # fmt: skip
    signature(Wrapper.run).bind(None, None, (None, None), out=None)
    signature(Wrapper.reset_workspace_buffer).bind(None, None, None)


def test_what_no_kernel_computes_runs_in_pytorch():
    device = torch.device("cuda", torch.cuda.current_device())
    kind, reason = choose_impl(AttentionShape(4, 4, 64, None, None, 1.0, torch.float64), device)
    assert kind is ReferenceAttention and "float64" in reason
    kind, reason = choose_impl(AttentionShape(4, 4, 80, None, None, 1.0, torch.float32), device)
    assert kind is TritonAttention and reason is None
    cache, attention = setup(dtype=torch.float64, head_dim=80)
    batch, q, k, v = new_tokens(cache, 8, [[], []], [0, 0], [5, 9], 0)
    with step(batch, cache):
        torch.testing.assert_close(attention(q, k, v).float(), reference_of(cache, attention, q), rtol=1e-4, atol=1e-4)
    assert list(cache.reasons.values())


def test_scratch_writes_page_0_alone():
    cache, attention = setup()
    with scratch_step(40, cache):
        q, k = torch.ones(40, 8, 128, device="cuda"), torch.ones(40, 2, 128, device="cuda")
        assert attention(q.bfloat16(), k.bfloat16(), k.bfloat16()).isfinite().all()
    assert cache.k[0][0].any() and not cache.k[0][1:].any()
