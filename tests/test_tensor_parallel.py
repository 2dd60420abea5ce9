"""Two ranks on gloo: the values of one process, the same pieces, and faults that leave no rank waiting."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
WORKER = Path(__file__).with_name("parallel_worker.py")


def ranks(*arguments, world=2, timeout=300, device="cpu"):
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
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
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
    assert first["graphs"] >= 1 and first["pieces"] == 7 * first["graphs"]
    assert first["replays"] > 0 and {"4", "8", "16"} <= set(first["buckets"]) and first["fallbacks"] == []


def test_a_capture_that_fails_on_one_rank_is_given_up_by_both():
    first, second = ranks("capture_fails")
    assert max(first["worst"], second["worst"]) < 1e-5
    assert first["captured"] == second["captured"]
    assert [r for r in first["fallbacks"] if "rank 1 could not capture" in r]
    assert [r for r in second["fallbacks"] if "out of memory" in r]


#: What both ranks were called with before, and rank 0's size of the last call: new to both, captured by both in one
#: bucket and in two, new to rank 1, the first of all.
DIFFERENT = [([3, 5, 6], 7), ([3, 5, 6, 5, 6], 5), ([3, 8, 9, 8, 9], 8), ([3, 8, 8], 8), ([], 7)]


def check_different(results):
    for errors in results:
        for (_, size), error in zip(DIFFERENT, errors, strict=True):
            assert f"ranks were called with different sizes (rank 0: [{size}], rank 1: [{size + 1}])" in error


def test_ranks_with_different_batches_hear_of_it():
    check_different(ranks("different_sizes", json.dumps(DIFFERENT)))


def test_without_gloo_new_sizes_are_compared():
    for result in ranks("no_gloo"):
        assert result["worst"] < 1e-5 and "(rank 0: [7], rank 1: [8])" in result["error"]
        assert [r for r in result["fallbacks"] if "gloo found no way between them: no such host" in r]


def test_a_rank_that_dies_is_an_error_in_the_next_steady_step():
    first, _ = ranks("dies")
    assert "a rank took no part in the step" in first["error"] and first["s"] < 30


def test_copies_of_a_model_serve_batches_of_their_own():
    for result in ranks("two_by_two", world=4):
        assert result["worst"] < 1e-5 and result["replays"] > 0


def test_an_error_on_one_rank_is_an_error_on_the_other():
    started = time.monotonic()
    first, second = ranks("split_op_raises")
    assert second["n"] == 6 and "rank 1 gives up" in second["error"]
    assert first["n"] == 6 and first["error"]
    assert time.monotonic() - started < 90


def others(reasons):
    """Without float32's attention on a GPU, which FlashInfer does not compute."""
    return [reason for reason in reasons if "attention in plain PyTorch" not in reason]


def save_adapters(root, path, sizes):
    """Adapters a, b and c on the layers of two decoder layers, small enough for sums in another order to agree."""
    from adapters import save_plain

    torch.manual_seed(0)
    for rank, name in ((2, "a"), (4, "b"), (6, "c")):
        modules = {path.format(layer, module): size for layer in range(2) for module, size in sizes.items()}
        save_plain(root / name, modules, rank, lora_alpha=0.2)
    return root


def adapters_of_layers(root):
    """For the model of the worker, and for its layers that are split in other ways."""
    from adapters import save_plain

    attention = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "out": (32, 32)}
    save_adapters(root, "{}.{}", {**attention, "up": (32, 48), "down": (48, 32)})
    parts = {"q": (6, 8), "v": (6, 4), "back": (16, 6), "wide": (6, 7), "narrow": (7, 6)}
    save_plain(root / "styles", {**parts, "gathered": (6, 8), "split": (8, 6)}, 3, lora_alpha=0.2)
    save_plain(root / "qkv", {"qkv": (6, 16)}, 3)
    return root


def adapters_of_llama(root):
    """And the model itself."""
    from adapters import CONFIG
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(CONFIG).save_pretrained(root / "model")
    attention = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
    sizes = {f"self_attn.{name}": size for name, size in attention.items()}
    sizes |= {"mlp.gate_proj": (32, 48), "mlp.up_proj": (32, 48), "mlp.down_proj": (48, 32)}
    return save_adapters(root, "model.layers.{}.{}", sizes)


def check_adapters(result, compilers, pieces=None, bound=1e-4):
    """The values of one process, and nothing captured for another adapter, which the worker expects."""
    assert result["uncompiled"] < bound and result["apart"] > 1e-2, result
    for compiler in compilers:
        found = result[compiler]
        assert max(found[what] for what in ("mixed", "another", "base")) < bound, result
        assert found["replays"] > 0 and others(found["fallbacks"]) == [], result
        assert pieces is None or found["pieces"] == pieces * found["graphs"], result


def check_styles(result, bound=1e-4):
    assert max(result[name] for name in ("uncompiled", "compiled", "replicated", "tokens split")) < bound, result
    assert result["apart"] > 1e-2, result


REFUSED = {
    "tokens": r"qkv was given x \(Shard\(dim=0\),\) and gave y .*\n.*all tokens.*\n.*input_layouts=Shard\(0\)",
    "tokens, compiled": r"qkv was given x \(Shard\(dim=0\),\)",
    "later": r"the weight of qkv was split over ranks after its adapter pool was made\n  Make the pool after",
    "forward": r"the forward of qkv was replaced by '.*lambda",
    "plain": r"the weight of qkv, 8 x 6, is a rank's part, and a plain tensor",
    "summands": r"the weight of qkv is a DTensor \(Partial\(sum\),\)",
    "small": r"one has 1 outputs, too few for each rank",
    "gathered": r"qkv computed 6 -> 16, and this rank's part of its weight is 6 -> 8",
}


def test_adapters(tmp_path):
    for result in ranks("adapters", str(adapters_of_layers(tmp_path)), timeout=300):
        # Cuts at 2 attentions and 4 all-reduces: adapters bring no collective.
        check_adapters(result, ["eager", "inductor"], pieces=7)
        check_styles(result["styles"])
        assert result["refused"].keys() == REFUSED.keys()
        for name, error in result["refused"].items():
            assert error and re.search(REFUSED[name], error), (name, error)


def test_the_plan_of_transformers(tmp_path):
    root = adapters_of_llama(tmp_path)
    for result in ranks("adapters_on_a_plan", str(root / "model"), str(root), timeout=300):
        assert result["before"] < 1e-5, result
        check_adapters(result, ["eager"])
