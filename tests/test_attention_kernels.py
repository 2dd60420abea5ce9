"""The ragged attention kernels against float64, by feature: under Triton's interpreter, or for real on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ragged_attention import FEATURES, Ragged, error, expected, random_case

from pcg_compile.attention.ragged import Tiling

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
#: Batches of each feature. A GPU computes many more.
SEEDS = range(int(os.environ.get("PCG_ATTENTION_BATCHES", "500" if CUDA else "1")))
#: The interpreter takes some 10 ms for a work item.
SMALL_LENGTHS = {} if CUDA else {"longest": 30, "prompt": 12}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def here(test):
    """For tests of the kernels: where Triton can run them."""
    skip = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a CUDA GPU, or TRITON_INTERPRET=1")
    return skip(test if INTERPRETED else pytest.mark.gpu(test))


@pytest.mark.skipif(CUDA or INTERPRETED or sys.platform != "linux", reason="the kernels run as they are")
def test_this_file_under_the_interpreter():
    """Triton decides when a kernel is made: a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def check(case, rows, entries, tolerance):
    kernels = Ragged(case, rows, entries)
    # Twice: a merge leaves its counters as they were.
    out, lse = kernels(times=2)
    want, want_lse = expected(case)
    n = len(case.q)
    assert error(out[:n], want) < tolerance
    assert error(lse[:n], want_lse) < max(1e-5, tolerance)
    assert out.isfinite().all() and lse.isfinite().all()


@here
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_equals_float64(feature):
    """Exact rows, rows padded by a request, and entries that no request uses."""
    for seed in SEEDS:
        case = random_case(seed + 3, **FEATURES[feature], **SMALL_LENGTHS, device=DEVICE)
        n, requests = len(case.q), len(case.qo_lens)
        pad = [0, 1, 13][seed % 3]
        tolerance = TOLERANCE[case.q.dtype] * (2 if feature.startswith("fp8") else 1)
        check(case, n + pad, requests + (pad > 0) + seed % 4, tolerance)


@here
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("feature", ["causal", "many parts", "fp8"])
def test_dtypes(feature, dtype):
    for seed in SEEDS:
        case = random_case(seed + 3, **FEATURES[feature], **SMALL_LENGTHS, dtype=dtype, device=DEVICE)
        check(case, len(case.q) + 3, len(case.qo_lens) + 2, TOLERANCE[dtype])


@here
def test_one_grid_serves_every_batch_of_as_many_rows():
    """Nothing on the host changes from batch to batch: the lists are rewritten in place."""
    rows, entries = 40, 9
    first = Ragged(random_case(0, page_size=4, device=DEVICE), rows, entries)
    for seed in range(1, 3):
        # Longer by far than what the first one had: no maximum is baked in.
        case = random_case(seed, page_size=4, longest=50 * seed, device=DEVICE)
        if len(case.q) > rows:
            continue
        first.case = case
        out, _ = first()
        want, _ = expected(case)
        assert error(out[: len(case.q)], want) < 2e-6


@here
def test_keys_are_divided_where_there_are_few_tiles_and_only_there():
    few = Ragged(random_case(3, longest=200, tiling=Tiling(16, 16, programs=16), device=DEVICE), 64, 8)
    few()
    tiles = sum(-(-n // few.run.block_q) for n in (*few.case.qo_lens, 64 - len(few.case.q)))
    number = int(few.schedule.items[0])
    assert tiles < number <= few.schedule.most
    parts = few.schedule.items[8 : 8 + 8 * number].view(-1, 8)
    assert int((parts[:, 6] > 1).sum()) < few.run.slots
    slots = parts[parts[:, 6] > 1]
    assert len({int(s + p) for s, p in zip(slots[:, 7], slots[:, 5], strict=True)}) == len(slots)
