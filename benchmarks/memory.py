"""Memory of the device that capturing buckets takes: pcg, and breakable-cuda-graphs for the same buckets."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch

import pcg_compile as pcg

from .capture import spread
from .common import Results, one_line
from .compiled import Compiled
from .limit import Breakable
from .models import make_cache, make_lists, make_model, shape_of
from .variants import NotHere, Pcg, PcgFullGraph, Variant, World

__all__ = ["add_arguments", "run"]

_WAYS: dict[str, type[Variant]] = {"pcg": PcgFullGraph, "pcg piecewise": Pcg, "breakable": Breakable}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, help="largest bucket (4096; tiny 32)")
    parser.add_argument("--buckets", type=int, default=11, help="how many, up to the largest")
    parser.add_argument("--ways", default=",".join(_WAYS), help=f"comma-separated, of {', '.join(_WAYS)}")


def run(args: argparse.Namespace) -> None:
    shape = shape_of(args)
    buckets = spread(args.buckets, args.max_tokens or (32 if args.tiny else 4096))
    with Results(args, f"memory-{shape.name}", _NOTES) as results, torch.no_grad():
        model = make_model(shape, args.device)
        for way in args.ways.split(","):
            compiler = "eager" if args.tiny else "inductor"
            cache = make_cache(shape, args.device, buckets[-1])
            world = World(shape, model, cache, args.device, compiler, buckets)
            world.contents.clear()
            try:
                results.add(way=way, buckets=len(buckets), max_tokens=buckets[-1], **_measure(world, way))
            except NotHere as reason:
                results.say(f"{way} is left out: {reason}")
            except Exception as error:
                results.say(f"{way} failed: {one_line(error)}")
            del world, cache
            torch._dynamo.reset()


_NOTES = {
    "device_mib": "memory of the process on the device: rise while the buckets are captured, for the second time, so "
    "kernels are loaded and workspaces made",
    "reserved_mib": "of these, what torch has reserved",
    "peak_mib": "most that torch had reserved meanwhile, over what it had before",
    "workspaces_mib": "not among them: what attention keeps for partial results and plans (pcg.stats(...).workspaces)",
}


def _measure(world: World, way: str) -> dict[str, Any]:
    if way == "breakable" and world.device.type != "cuda":
        raise NotHere("needs CUDA")
    variant = _WAYS[way](world)
    largest = make_lists(world.shape, world.cache, world.sizes[-1], 0)
    if isinstance(variant, Breakable):
        compiled = world.built["compile"] = Compiled(world)
        compiled.build(largest)
        variant.build(largest)
    else:
        variant.build(largest)
        pcg.reset(variant.model)

    def capture() -> Any:
        if isinstance(variant, Breakable):
            return _capture_breakable(world, variant)
        batch = largest.batch()
        with pcg.step(batch, world.cache):
            pcg.warmup(variant.model, largest.ids, batch.positions, buckets=list(world.sizes), progress=False)
        return None

    if isinstance(variant, Breakable):
        capture()
        variant.done()
    before = _now(world.device)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    kept = capture()
    peak = torch.cuda.max_memory_reserved(world.device) if world.device.type == "cuda" else 0
    after = _now(world.device)
    del kept
    row = {
        "device_mib": after[0] - before[0],
        "reserved_mib": after[1] - before[1],
        "peak_mib": peak - before[1],
        "workspaces_mib": world.cache.workspace_nbytes(),
    }
    found: dict[str, Any] = {name: round(value / 2**20, 1) for name, value in row.items()}
    if not isinstance(variant, Breakable):
        stats = pcg.stats(variant.model)
        assert stats.workspaces == world.cache.workspace_nbytes()
        found |= {"captured": stats.captured, "fallbacks": [f.reason for f in stats.fallbacks] or None}
    return found


def _capture_breakable(world: World, variant: Breakable) -> list[Any]:
    """All buckets, largest first, in one pool; results are let go of, as a server would copy them out."""
    from breakable_cuda_graphs import BreakableCUDAGraph, breakable_graph

    kept: list[Any] = []

    def record(call: Callable[[], torch.Tensor]) -> None:
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        variant.graph = BreakableCUDAGraph(kept[0].pool() if kept else None)
        with breakable_graph(variant.graph):
            call()
        kept.append(variant.graph)

    variant.record = record  # type: ignore[method-assign]
    inputs: list[torch.Tensor] = []
    for bucket in reversed(world.sizes):
        variant.captured = False
        variant.inputs(bucket)
        inputs += [variant.ids, variant.positions, variant.slots]
        with variant.enter(make_lists(world.shape, world.cache, bucket, 0)) as call:
            variant.record(call)
    return [*kept, inputs]


def _now(device: torch.device) -> tuple[int, int]:
    """Bytes of the process on the device, and of these what torch has reserved."""
    gc.collect()
    if device.type != "cuda":
        return 0, 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free, torch.cuda.memory_reserved(device)
