"""Paged attention in a CUDA graph: pcg's Triton kernels, FlashInfer, the floor. ``python -m benchmarks attention``."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .common import Budget, Results, one_line, sizes_of

__all__ = ["Workload", "add_arguments", "graph_us", "run", "workloads"]

#: Bytes and operations a second that one H200 reaches at most: its datasheet's bandwidth, and bf16 matrix products.
_BANDWIDTH, _FLOPS = 4.8e12, 790e12
_NOTES = {
    "us": "microseconds per layer in a CUDA graph of eight; the best of four; the batch's metadata are on the device",
    "fa2": "FlashInfer's BatchPrefillWithPagedKVCacheWrapper, backend fa2, planned ahead",
    "triton": "pcg's kernel, captured at exactly the batch's rows and request entries",
    "schedule": "pcg's list of work items, once per step for all layers",
    "tb_s": "terabytes of keys and values a second, each counted once",
    "floor": "keys and values read once at 4.8 TB/s, or 790 TFLOP/s, the larger",
    "error": "relative, against the other implementation",
    "first_use": "seconds until attention first ran, decode and then prefill, with an empty Triton cache",
}


@dataclass(frozen=True)
class Workload:
    """One batch of one attention shape."""

    name: str
    qo_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    head_dim: int
    page_size: int = 16
    fp8: bool = False
    heads: int = 32
    kv_heads: int = 8

    @property
    def kind(self) -> str:
        """What :func:`pcg_compile.attention.ragged.tiling_for` calls it."""
        return "decode" if max(self.qo_lens) == 1 else "mixed" if sum(self.qo_lens) <= 1024 else "prefill"

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(self.kv_lens) * self.kv_heads * self.head_dim * 2 * (1 if self.fp8 else 2)

    @property
    def floor_us(self) -> float:
        """The least time for the batch's bytes and operations."""
        pairs = sum(q * (kv - q) + q * (q + 1) / 2 for q, kv in zip(self.qo_lens, self.kv_lens, strict=True))
        return 1e6 * max(self.nbytes / _BANDWIDTH, 4 * self.heads * self.head_dim * pairs / _FLOPS)


_BATCHES: dict[str, tuple[list[int], list[int]]] = {
    "decode 1 x 512": ([1], [512]),
    "decode 1 x 8k": ([1], [8192]),
    "decode 8 x 1k": ([1] * 8, [1024] * 8),
    "decode 32 x 512": ([1] * 32, [512] * 32),
    "decode 32 x 4k": ([1] * 32, [4096] * 32),
    "decode 128 x 1k": ([1] * 128, [1024] * 128),
    "decode 256 x 1k": ([1] * 256, [1024] * 256),
    "31 decodes x 512 + prefill 225": ([1] * 31 + [225], [512] * 31 + [225]),
    "32 decodes x 1k + prefill 2k": ([1] * 32 + [2048], [1024] * 32 + [2048]),
    "prefill 4k": ([4096], [4096]),
}
_FEW = ("decode 8 x 1k", "decode 128 x 1k", "31 decodes x 512 + prefill 225", "prefill 4k")


#: 256 requests on their way from 100 to 2,048 tokens, as the throughput benchmark has them; Qwen3-0.6B has these heads.
_UNDER_WAY = tuple(100 + i * 7919 % 1949 for i in range(256))


def workloads() -> Iterator[Workload]:
    """Batches at head sizes 64 and 128, and a few of them with fp8 keys and values, long pages, other head sizes."""
    for head_dim in (64, 128):
        for name, (qo, kv) in _BATCHES.items():
            yield Workload(name, tuple(qo), tuple(kv), head_dim)
    for name in _FEW:
        qo, kv = (tuple(x) for x in _BATCHES[name])
        yield Workload(name + ", fp8", qo, kv, 128, fp8=True)
        yield Workload(name + ", pages of 64", qo, kv, 128, page_size=64)
        yield Workload(name, qo, kv, 96)
        yield Workload(name, qo, kv, 256)
    yield Workload("decode 256 x 100 to 2k, 16 heads", (1,) * 256, _UNDER_WAY, 128, heads=16)
    yield Workload("decode 256 x 1k, 16 heads", *(tuple(x) for x in _BATCHES["decode 256 x 1k"]), 128, heads=16)


_FIRST_USE = """
import json, time, torch
import pcg_compile as pcg
torch.zeros(1, device="cuda")
begun = time.perf_counter()
cache = pcg.PagedKVCache(1, 64, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda")
attention, times = pcg.PagedAttention(0, 32, 8, 128), []
for lengths in ([1] * 4, [300, 1]):
    q, k, v = (torch.randn(sum(lengths), n, 128, dtype=torch.bfloat16, device="cuda") for n in (32, 8, 8))
    pages = [cache.allocate(-(-n // 16)) for n in lengths]
    with pcg.step(pcg.Batch(lengths, page_table=pages), cache):
        attention(q, k, v)
    torch.cuda.synchronize()
    times.append(time.perf_counter() - begun)
print(json.dumps(times))
"""


def first_use() -> list[float]:
    """Seconds until attention has first run on a machine that has compiled nothing: decode, then prefill too."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "TRITON_CACHE_DIR": empty}
        done = subprocess.run([sys.executable, "-c", _FIRST_USE], env=environment, capture_output=True, text=True)
    return [round(t, 2) for t in json.loads(done.stdout)] if done.returncode == 0 else [float("nan")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    parser.add_argument("--tune", action="store_true", help="many sizes of blocks instead of the chosen ones")
    parser.add_argument("--head-dims", help="only these, comma-separated")
    parser.add_argument("--only", default="", help="only workloads with this in their name")
    parser.add_argument("--seconds", type=float, help="skip what is left after so many")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="that compile kernels")


class Batch:
    """A workload in memory."""

    def __init__(self, work: Workload, device: torch.device) -> None:
        self.work = work
        generator = torch.Generator(device).manual_seed(0)
        pages = [-(-n // work.page_size) for n in work.kv_lens]
        shape = (sum(pages) + 1, work.page_size, work.kv_heads, work.head_dim)
        dtype = torch.float8_e4m3fn if work.fp8 else torch.bfloat16

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, device=device, dtype=torch.bfloat16, generator=generator)

        self.k, self.v = draw(*shape).to(dtype), draw(*shape).to(dtype)
        self.q = draw(sum(work.qo_lens), work.heads, work.head_dim)
        ints = {"dtype": torch.int32}
        self.qo_indptr = torch.tensor([0, *work.qo_lens], **ints).cumsum(0, dtype=torch.int32)
        self.kv_indptr = torch.tensor([0, *pages], **ints).cumsum(0, dtype=torch.int32)
        self.kv_lens = torch.tensor(work.kv_lens, **ints)
        self.last = (self.kv_lens - 1) % work.page_size + 1
        self.indices = (torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)) + 1).int().to(device)
        self.device = [t.to(device) for t in (self.qo_indptr, self.kv_indptr, self.kv_lens)]
        self.scales = torch.ones(work.kv_heads, device=device) if work.fp8 else None


def triton_call(batch: Batch, tiling: Any, out: torch.Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The schedule and the attention of a batch."""
    from pcg_compile.attention.base import AttentionCall, AttentionShape
    from pcg_compile.attention.ragged import RaggedAttention

    work, requests, dim = batch.work, len(batch.work.qo_lens), batch.work.head_dim
    shape = AttentionShape(work.heads, work.kv_heads, dim, None, None, dim**-0.5, batch.q.dtype)
    kernels = RaggedAttention(shape, work.page_size, tiling, out.device)
    items = kernels.new_schedule(kernels.most_items(len(out), requests))
    workspace = torch.empty(kernels.workspace_floats, device=out.device)
    call = AttentionCall(batch.q, batch.k, batch.v, out, k_scale=batch.scales, v_scale=batch.scales)
    return (
        lambda: kernels.schedule(items, *batch.device, requests),
        lambda: kernels.attend(items, call, batch.indices, workspace),
    )


def fa2_call(batch: Batch, out: torch.Tensor) -> Callable[[], Any]:
    """FlashInfer's kernel, planned."""
    import flashinfer

    work, space = batch.work, torch.empty(512 << 20, dtype=torch.uint8, device=out.device)
    if work.head_dim not in (64, 128, 256):
        # Its kernels for others run into illegal instructions or give NaN.
        raise ValueError(f"FA2 has head sizes 64, 128 and 256, not {work.head_dim}")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend="fa2")
    wrapper.plan(
        batch.qo_indptr, batch.kv_indptr, batch.indices, batch.last, work.heads, work.kv_heads, work.head_dim,
        work.page_size, causal=True, q_data_type=batch.q.dtype, kv_data_type=batch.k.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(batch.q, (batch.k, batch.v), out=out)


def graph_us(call: Callable[[], Any], layers: int = 8, replays: int = 4, rounds: int = 4) -> float:
    """Microseconds of a call in a CUDA graph of several; the best of some rounds."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(layers):
            call()
    graph.replay()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(rounds):
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return round(1e3 * min(times) / (layers * replays), 2)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative to the norm."""
    return float((got.float() - want.float()).norm() / want.float().norm())


def tilings(work: Workload) -> list[Any]:
    """What ``--tune`` tries."""
    from pcg_compile.attention.ragged import Tiling

    found: list[Any] = []
    wide = work.head_dim > 128
    if work.kind == "decode":
        for keys in (32, 64) if wide else (32, 64, 128):
            for stages in (3, 5) if wide or work.fp8 or work.page_size > 16 else (3, 5, 7) if keys < 128 else (3, 5):
                for warps in (4, 2) if keys < 128 and work.head_dim < 128 else (4, 8) if keys == 128 else (4,):
                    for programs in (2, 4, 8):
                        found.append(Tiling(16, keys, warps, stages, programs))
        return found
    for rows, keys, warps, stages, phases in (
        (64, 32, 4, 3, True), (64, 64, 4, 3, True), (64, 64, 4, 5, True), (64, 64, 4, 3, False), (64, 128, 4, 3, True),
        (64, 64, 8, 3, True), (128, 64, 4, 3, True), (128, 64, 8, 3, True), (128, 64, 8, 5, True),
        (128, 128, 8, 3, True), (128, 64, 8, 3, False), (128, 32, 8, 5, True), (32, 64, 4, 3, True),
    ):  # fmt: skip
        if not (wide and keys > 64):
            found += [Tiling(rows, keys, warps, stages, programs, phases=phases) for programs in (1, 2, 4)]
    return found


def _compile(task: tuple[Workload, Any]) -> str:
    """Compiles one kernel, into its library's cache, by running it on a tiny batch; without a tiling FlashInfer's."""
    work, tiling = task
    try:
        small = Workload(work.name, (1, 3), (9, 40), work.head_dim, work.page_size, work.fp8, work.heads, work.kv_heads)
        batch = Batch(small, torch.device("cuda"))
        out = torch.empty_like(batch.q)
        for call in (fa2_call(batch, out),) if tiling is None else triton_call(batch, tiling, out):
            call()
        torch.cuda.synchronize()
        return ""
    except Exception as failure:  # One that needs too much shared memory is left out when it is measured.
        return one_line(failure)


def compile_all(tasks: Sequence[tuple[Workload, Any]], processes: int) -> None:
    """Compiles distinct kernels in several processes."""
    distinct = {(work.head_dim, work.fp8): (work, None) for work, _ in tasks}
    for work, tiling in tasks:
        key = (work.heads, work.head_dim, work.page_size, work.fp8, tiling.block_m, tiling.block_n, tiling.warps,
               tiling.stages, tiling.phases)  # fmt: skip
        distinct.setdefault(key, (work, tiling))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(_compile, distinct.values(), chunksize=1)


def run(args: argparse.Namespace) -> None:
    """Measures all workloads."""
    if args.device.type != "cuda":
        print("  needs a GPU")
        return
    from pcg_compile.attention.ragged import tiling_for

    dims, budget = sizes_of(args.head_dims, (64, 96, 128, 256)), Budget(args.seconds)
    works = [work for work in workloads() if work.head_dim in dims and args.only in work.name]
    if args.quick:
        works = [work for work in works if work.name in _FEW]

    def candidates(work: Workload) -> list[Any]:
        if args.tune:
            return tilings(work)
        rows, group = sum(work.qo_lens) * work.kv_heads, work.heads // work.kv_heads
        return [tiling_for(work.kind, work.head_dim, group, work.page_size, rows, 2, work.fp8, args.device)]

    name = "attention-tuning" if args.tune else "attention"
    with Results(args, f"{name}-{torch.cuda.get_device_name().split()[-1].lower()}", _NOTES) as results:
        if not args.only:
            results.add(workload="first use", first_use=first_use())
        compile_all([(work, tiling) for work in works for tiling in candidates(work)], args.processes)
        results.say(f"compiled after {budget.used():.0f} s")
        ratios: dict[str, list[float]] = {}
        for work in works:
            if budget.over():
                results.say(f"skipped: {work.name}, head size {work.head_dim}")
                continue
            row = measure(work, candidates(work), args.device)
            results.add(workload=work.name, head_dim=work.head_dim, **row)
            if "ratio" in row:
                ratios.setdefault(work.kind, []).append(row["ratio"])
            torch.cuda.empty_cache()
        for kind, some in ratios.items():
            results.say(f"{kind}: geometric mean over FA2 {statistics.geometric_mean(some):.3f}, worst {max(some):.3f}")


def measure(work: Workload, candidates: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """One row of the results."""
    batch = Batch(work, device)
    row: dict[str, Any] = {}
    want = None
    try:
        out = torch.full_like(batch.q, torch.nan)
        call = fa2_call(batch, out)
        row["fa2"], want = graph_us(call), out.clone()
    except Exception as failure:  # Not installed, or it lacks the shape: the row says so.
        row["fa2_error"] = one_line(failure)
    tried = []
    for tiling in candidates:
        out = torch.full_like(batch.q, torch.nan)
        try:
            schedule, attend = triton_call(batch, tiling, out)
            schedule()
            attend()
            wrong = error(out, want) if want is not None else float(not bool(out.isfinite().all()))
            tried.append((graph_us(attend), wrong, tiling, schedule))
        except Exception as failure:  # Too much shared memory, say: one candidate less.
            row.setdefault("failed", []).append([_text(tiling), one_line(failure)])
    if not tried:
        return row
    tried.sort(key=lambda one: one[0])
    best, wrong, tiling, schedule = tried[0]
    row |= {"triton": best, "schedule": graph_us(schedule), "floor": round(work.floor_us, 1), "tiling": _text(tiling),
            "error": max(one[1] for one in tried)}  # fmt: skip
    if "fa2" in row:
        row["ratio"] = round(best / row["fa2"], 3)
    row |= {"of_floor": round(work.floor_us / best, 3), "tb_s": round(work.nbytes / best / 1e6, 2)}
    if len(candidates) > 1:
        row["all"] = [[_text(one[2]), one[0]] for one in tried]
    return row


def _text(tiling: Any) -> str:
    return " ".join(f"{k[0] if k != 'block_n' else 'n'}{int(v)}" for k, v in asdict(tiling).items())
