"""A step of a Llama in parts on several GPUs: pcg against eager, and against one GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

import torch

import pcg_compile as pcg
from pcg_compile.integrations.transformers import cache_for

from .common import Clock, Results, sizes_of, synchronize
from .models import SHAPES, Lists, make_cache, make_lists

__all__ = ["add_arguments", "main", "run"]

_SIZES, _TINY = (1, 64, 512, 4000), (1, 5)
_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_ROWS = ("self_attn.o_proj", "mlp.down_proj")
_NOTES = {
    "ranks": "processes that the model is split over; 1: the whole model on rank 0, the others waiting",
    "wall_ms": "from an idle device and a running step to the end on the device, on rank 0",
    "error": "of rank 0's hidden states, relative to eager on one process",
    "warmup_s, mib": "pcg.warmup of the sizes' buckets, compiling included, and what it holds on a rank",
    "pcg-inputs": '@pcg.piecewise(guards="inputs"): without the guards on parameters, which are dear for DTensors',
    "nccl_kernels": "that one steady step runs; collectives: calls of them by the host in it",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="processes (2); a GPU each, or gloo on a CPU")
    parser.add_argument("--sizes", help="tokens, comma-separated (1,64,512,4000; tiny 1,5)")


def run(args: argparse.Namespace) -> None:
    """Starts the ranks with torchrun, and keeps what rank 0 measured."""
    if args.device.type == "cuda" and torch.cuda.device_count() < args.ranks:
        raise SystemExit(f"{args.ranks} ranks need as many GPUs; there are {torch.cuda.device_count()}")
    sizes = sizes_of(args.sizes, _TINY if args.tiny else _SIZES)
    settings = {"shape": "tiny" if args.tiny else args.shape, "layers": args.layers, "sizes": sizes,
                "repeats": args.repeats, "device": args.device.type}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    with Results(args, f"tensor-parallel-{settings['shape']}", _NOTES) as results:
        ranks = subprocess.Popen(
            [*command, "-m", "benchmarks.tensor_parallel", json.dumps(settings)], stdout=subprocess.PIPE, text=True
        )
        assert ranks.stdout is not None
        for line in ranks.stdout:
            if "ROW " in line:
                results.add(**json.loads(line.partition("ROW ")[2]))
        if ranks.wait():
            raise SystemExit(ranks.returncode)


def main() -> None:
    """One rank."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    settings = json.loads(sys.argv[1])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = settings["device"] == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=300))
    model = _model(settings, device)
    wants: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        _measure(model, settings, device, 1, rank, wants, alone=True)
        dist.barrier()
        plan = {name: ColwiseParallel() for name in _COLUMNS} | {name: RowwiseParallel() for name in _ROWS}
        mesh = init_device_mesh(device.type, (ranks,))
        for layer in model.layers:
            parallelize_module(layer, mesh, plan)
        torch._dynamo.reset()
        _measure(model, settings, device, ranks, rank, wants, alone=False)
    dist.barrier()
    pcg.release_collectives()
    dist.destroy_process_group()


def _model(settings: dict[str, Any], device: torch.device) -> Any:
    """transformers' Llama without its head, random weights, the same on every rank."""
    from transformers import AutoModel, LlamaConfig

    import pcg_compile.integrations.transformers  # noqa: F401 - registers the attention

    shape = SHAPES[settings["shape"]]
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=settings["layers"] or shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModel.from_config(config, attn_implementation="pcg", dtype=dtype).eval()
    # Tries the model on every rank, while it is whole: in parts, all ranks would have to do it together.
    cache_for(model, num_pages=2)
    return model


def _measure(
    model: Any, settings: dict[str, Any], device: torch.device, ranks: int, rank: int, wants: Any, alone: bool
) -> None:
    """Eager and pcg at every size; ``alone``: on rank 0 only."""
    if alone and rank != 0:
        return
    from dataclasses import replace

    shape = SHAPES[settings["shape"]]
    shape = replace(shape, layers=settings["layers"] or shape.layers)
    cache = make_cache(replace(shape, kv_heads=shape.kv_heads // ranks), device, max(settings["sizes"]))
    for tensor in cache.k + cache.v:
        # The heads of the whole model's cache would be others than those of its parts.
        tensor.zero_()
    options = {"compiler": "inductor" if device.type == "cuda" else "eager"}
    dynamic = {"input_ids": 1, "position_ids": 1}
    ways = {
        "eager": model,
        "pcg": torch.compile(model, backend="pcg", options=options),
        "pcg-inputs": pcg.piecewise(dynamic=dynamic, guards="inputs", **options)(model.forward),
    }
    largest = make_lists(shape, cache, max(settings["sizes"]), 0)
    recorded: dict[str, dict[str, Any]] = {}
    for name, call in list(ways.items())[1:]:
        warm = Clock(device)
        warm.measure(lambda call=call: _warm_up(call, largest, cache, settings["sizes"]))  # type: ignore[misc]
        stats = pcg.stats(call)
        mib = sum(use.bytes for use in stats.buckets.values()) >> 20
        recorded[name] = {"warmup_s": round(warm.wall[0] / 1e3, 2), "mib": mib, "fallbacks": len(stats.fallbacks)}
    for n in settings["sizes"]:
        lists = make_lists(shape, cache, n, 0)
        for name, call in ways.items():
            clock = Clock(device)
            batch = lists.batch()
            with pcg.step(batch, cache):
                ids, positions = lists.ids[None], batch.positions[None]
                hidden = call(input_ids=ids, position_ids=positions).last_hidden_state.float()
                for repeat in range(settings["repeats"] + 3):
                    target = clock if repeat >= 3 else Clock(device)
                    target.measure(lambda call=call, i=ids, p=positions: call(input_ids=i, position_ids=p))  # type: ignore[misc]
            want = wants.setdefault(n, hidden)
            row = {"ranks": ranks, "n": n, "variant": name, **clock.medians()}
            row["error"] = float(f"{((hidden - want).norm() / want.norm()).item():.3g}")
            if name in recorded:
                row |= recorded[name] | _kernels(call, lists, cache, device)
            if rank == 0:
                print("ROW " + json.dumps(row), flush=True)


def _warm_up(compiled: Any, lists: Lists, cache: pcg.PagedKVCache, sizes: Any) -> None:
    from .variants import bucket_of

    batch = lists.batch()
    with pcg.step(batch, cache):
        ids, positions = lists.ids[None], batch.positions[None]
        buckets = sorted({bucket_of(n) for n in sizes})
        pcg.warmup(compiled, input_ids=ids, position_ids=positions, buckets=buckets, progress=False)


def _kernels(compiled: Any, lists: Lists, cache: pcg.PagedKVCache, device: torch.device) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    batch = lists.batch()
    with pcg.step(batch, cache):
        ids, positions = lists.ids[None], batch.positions[None]
        with torch.profiler.profile(activities=activities) as trace:
            compiled(input_ids=ids, position_ids=positions)
            synchronize(device)
    names = [event.name for event in trace.events()]
    return {
        "nccl_kernels": sorted({n[:80] for n in names if "nccl" in n.lower() and "kernel" in n.lower()}),
        "collectives": sum(n.startswith(("c10d::", "_c10d_functional::all_reduce")) for n in names),
    }


if __name__ == "__main__":
    main()
