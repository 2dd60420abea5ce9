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
from .variants import Eager, NotHere, Pcg, PcgFullGraph, Variant, World

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
    "device_mib": "memory of the process on the device: rise from behind an eager step of the largest size",
    "workspaces_mib": "of these, what attention keeps for partial results and plans (pcg.stats(...).workspaces)",
    "graphs_mib": "the others: captured graphs, static memory",
    "allocated_mib": "rise of what torch has allocated, workspaces left out",
    "peak_mib": "most that torch had reserved meanwhile, over what it had before",
}


def _measure(world: World, way: str) -> dict[str, Any]:
    if way == "breakable" and world.device.type != "cuda":
        raise NotHere("needs CUDA")
    variant = _WAYS[way](world)
    largest = make_lists(world.shape, world.cache, world.sizes[-1], 0)
    if isinstance(variant, Breakable):
        compiled = world.built["compile"] = Compiled(world)
        compiled.build(largest)
    else:
        with Eager(world).enter(largest) as call:
            call()
    before = _now(world)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    variant.build(largest)
    kept = _capture_breakable(world, variant) if isinstance(variant, Breakable) else variant
    after = _now(world)
    peak = torch.cuda.max_memory_reserved(world.device) if world.device.type == "cuda" else 0
    device, allocated, workspaces, reserved = (new - old for new, old in zip(after, before, strict=True))
    row = {
        "device_mib": device,
        "workspaces_mib": workspaces,
        "graphs_mib": device - workspaces,
        "allocated_mib": allocated - workspaces,
        "reserved_mib": reserved,
        "peak_mib": peak - (after[3] - reserved),
    }
    if not isinstance(variant, Breakable):
        stats = pcg.stats(variant.model)
        print("\n".join(f.reason for f in stats.fallbacks), end="")
        assert world.device.type == "cpu" or stats.workspaces == world.cache.workspace_nbytes()
    del kept
    return {name: round(value / 2**20, 1) for name, value in row.items()}


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


def _now(world: World) -> tuple[int, int, int, int]:
    """Bytes of the process on the device, allocated, of workspaces, reserved."""
    gc.collect()
    workspaces = world.cache.workspace_nbytes()
    if world.device.type != "cuda":
        return 0, 0, workspaces, 0
    torch.cuda.synchronize(world.device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(world.device)
    allocated, reserved = (f(world.device) for f in (torch.cuda.memory_allocated, torch.cuda.memory_reserved))
    return total - free, allocated, workspaces, reserved
