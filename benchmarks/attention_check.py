"""Attention kernels against float64 on random ragged batches, by feature. ``python -m benchmarks attention-check``.

Each batch has decode requests, prompts and chunks of prompts by chance, padding rows and entries without requests.
In float32 the tiles are small, so small batches have several; in bfloat16 they are the ones that serving takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch

from .common import Budget, Results

__all__ = ["add_arguments", "run"]

_NOTES = {
    "worst": "largest error of a batch: norm of the difference over the norm of the float64 result",
    "limit": "largest error that passes",
    "wrong": "batches beyond it, or with a result that is not finite, padding rows included",
}
_LIMITS = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    parser.add_argument("--batches", type=int, default=500, help="of each feature and dtype")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, help="features that are not begun by then are left out")


def _check(task: tuple[str, str, int]) -> dict[str, Any]:
    """One feature in one dtype."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from ragged_attention import FEATURES, SMALL, Ragged, error, expected, random_case

    from pcg_compile.attention.ragged import tiling_for

    feature, name, batches = task
    options, dtype, device = FEATURES[feature], getattr(torch, name), torch.device("cuda", 0)
    worst = worst_lse = 0.0
    wrong = 0
    for seed in range(batches):
        case = random_case(seed, **options, dtype=dtype, device="cuda", longest=90 if seed % 8 else 900)
        rows, heads, kv_heads = len(case.q) + (0, 1, 13)[seed % 3], case.q.shape[1], case.k.shape[2]
        tiling = SMALL
        if dtype != torch.float32:
            kind, fp8 = ("decode", "mixed", "prefill")[seed % 3], case.k_scales is not None
            head_dim = max(case.q.shape[2], case.v.shape[3])
            tiling = tiling_for(kind, head_dim, heads // kv_heads, case.page_size, rows * kv_heads, 2, fp8, device)
        kernels = Ragged(case, rows, len(case.qo_lens) + (rows > len(case.q)) + seed % 4, tiling)
        out, lse = kernels(times=2)
        want, want_lse = expected(case)
        n = len(case.q)
        one, other = error(out[:n], want), error(lse[:n], want_lse)
        worst, worst_lse = max(worst, one), max(worst_lse, other)
        limit = _LIMITS[dtype]
        wrong += not (one < limit and other < limit and bool(out.isfinite().all()) and bool(lse.isfinite().all()))
    return {"feature": feature, "dtype": name, "batches": batches, "worst": worst, "worst_lse": worst_lse,
            "limit": _LIMITS[dtype], "wrong": wrong}  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Checks all features."""
    if args.device.type != "cuda":
        print("  needs a GPU")
        return
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from ragged_attention import FEATURES

    tasks = [(feature, dtype, args.batches) for dtype in ("bfloat16", "float32") for feature in FEATURES]
    budget, wrong, done = Budget(args.seconds), 0, 0
    with (
        Results(args, "attention-check-h200", _NOTES) as results,
        multiprocessing.get_context("spawn").Pool(args.processes) as pool,
    ):
        for row in pool.imap_unordered(_check, tasks):
            results.add(**row)
            wrong, done = wrong + row["wrong"], done + 1
            if budget.over():
                results.say(f"{len(tasks) - done} of {len(tasks)} left out")
                pool.terminate()
                break
        results.say(f"{done * args.batches} batches, {wrong} wrong")
