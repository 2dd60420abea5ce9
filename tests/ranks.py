"""Runs :mod:`parallel_worker` on several ranks, and checks what they returned."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

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


#: What both ranks were called with before, and rank 0's size of the last call: new to both, captured by both in one
#: bucket and in two, new to rank 1, the first of all.
DIFFERENT = [([3, 5, 6], 7), ([3, 5, 6, 5, 6], 5), ([3, 8, 9, 8, 9], 8), ([3, 8, 8], 8), ([], 7)]


def check_different(results):
    for errors in results:
        for (_, size), error in zip(DIFFERENT, errors, strict=True):
            assert f"ranks were called with different sizes (rank 0: [{size}], rank 1: [{size + 1}])" in error


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
