"""Two ranks on gloo: the values of one process, the same pieces, and faults that leave no rank waiting."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
WORKER = Path(__file__).with_name("parallel_worker.py")


def ranks(*arguments, world=2, timeout=150, device="cpu"):
    """What each rank returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(WORKER.parent.parent), str(WORKER.parent), os.environ.get("PYTHONPATH", "")])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
              "PCG_TEST_DEVICE": device}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
            assert lines, err[-3000:]
            results.append(json.loads(lines[-1].removeprefix("RESULT ")))
    finally:
        for process in processes:
            process.kill()
    return results


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_the_values_of_one_process(compiler):
    first, second = ranks("values", compiler)
    assert first == {**second, "worst": first["worst"]} and max(first["worst"], second["worst"]) < 1e-5
    # A static graph and one for all sizes; in each, cuts at 2 attentions and 4 all-reduces.
    assert first["graphs"] >= 2 and first["pieces"] == 7 * first["graphs"]
    assert first["replays"] > 0 and {"4", "8", "16"} <= set(first["buckets"]) and first["fallbacks"] == []


def test_a_recording_that_fails_on_one_rank_is_given_up_by_both():
    first, second = ranks("capture_fails")
    assert max(first["worst"], second["worst"]) < 1e-5
    assert first["captured"] == second["captured"]
    assert [r for r in first["fallbacks"] if "rank 1 could not record" in r]
    assert [r for r in second["fallbacks"] if "out of memory" in r]


def test_ranks_with_different_batches_hear_of_it():
    for result in ranks("different_sizes"):
        assert "ranks were called with different sizes (rank 0: [7], rank 1: [8])" in result["error"]


def test_an_error_on_one_rank_is_an_error_on_the_other():
    started = time.monotonic()
    first, second = ranks("split_op_raises")
    assert second["n"] == 6 and "rank 1 gives up" in second["error"]
    assert first["n"] == 6 and first["error"]
    assert time.monotonic() - started < 90


def test_the_plan_of_transformers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for result in ranks("transformers_plan", str(tmp_path)):
        assert result["worst"] < 1e-5 and result["replays"] > 0, result
