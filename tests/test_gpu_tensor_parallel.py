"""Two ranks on two GPUs: all-reduces lie inside the captured graphs, and faults leave no rank waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from ranks import (
    DIFFERENT,
    WORKER,
    adapters_of_layers,
    adapters_of_llama,
    check_adapters,
    check_different,
    check_styles,
    others,
)
from ranks import ranks as ranks_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
ranks = partial(ranks_on, device="cuda")


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_the_values_of_one_process(compiler):
    first, second = ranks("values", compiler)
    # Float32 matrix products of a GPU, and their sums in another order.
    assert max(first["worst"], second["worst"]) < 1e-3
    assert first == {**second, "worst": first["worst"]}
    # Cuts at 2 attentions only.
    assert first["pieces"] == 3 * first["graphs"] and others(first["fallbacks"]) == []
    assert first["replays"] > 0 and {"4", "8", "16"} <= set(first["buckets"])


def test_all_reduces_are_replayed():
    for result in ranks("kernels"):
        assert any("AllReduce" in name for name in result["nccl"]) and result["calls"] == 0, result


def test_a_capture_that_fails_on_one_rank_is_given_up_by_both():
    first, second = ranks("capture_fails")
    assert max(first["worst"], second["worst"]) < 1e-3 and first["captured"] == second["captured"]
    assert [r for r in first["fallbacks"] if "rank 1 could not capture" in r]
    assert [r for r in second["fallbacks"] if "out of memory" in r]


def test_ranks_with_different_batches_hear_of_it():
    check_different(ranks("different_sizes", json.dumps(DIFFERENT)))


def test_a_rank_that_dies_is_an_error_in_the_next_steady_step():
    first, _ = ranks("dies", timeout=90)
    assert "a rank took no part in the step" in first["error"]


def test_an_error_on_one_rank_ends_the_others():
    """Rank 0 waits on its GPU for rank 1, which is gone: torchrun ends it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(WORKER.parent.parent), str(WORKER.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PCG_TEST_DEVICE": "cuda"}
    done = subprocess.run(
        [*command, str(WORKER), "split_op_raises"], env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.returncode and "rank 1 gives up" in done.stderr, done.stderr[-3000:]


def test_destroying_the_process_group_drops_its_captured_graphs():
    """NCCL would wait forever for CUDA graphs that hold its collectives."""
    for result in ranks("destroyed"):
        assert result["replays"] > 0 and result["captured"] > 0, result


def test_adapters(tmp_path):
    for result in ranks("adapters", str(adapters_of_layers(tmp_path))):
        # Cuts at 2 attentions only.
        check_adapters(result, ["eager", "inductor"], pieces=3, bound=1e-3)
        check_styles(result["styles"], bound=1e-3)
        assert all(result["refused"].values()), result["refused"]


def test_the_plan_of_transformers(tmp_path):
    root = adapters_of_llama(tmp_path)
    for result in ranks("adapters_on_a_plan", str(root / "model"), str(root)):
        assert result["before"] < 1e-3, result
        check_adapters(result, ["eager"], bound=1e-3)
