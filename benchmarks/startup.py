"""Time from a model to its first step, in fresh processes, with empty caches and with warm ones."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from .common import Budget, Results

__all__ = ["add_arguments", "run"]

_WAYS = ("torch.compile", "pcg inductor", "pcg saved", "pcg eager")
_TOKENS = 61


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depths", help="numbers of layers, comma-separated (4,16,32; quick 16,32; tiny 2,4)")
    parser.add_argument("--ways", default=",".join(_WAYS), help=f"comma-separated, of {', '.join(_WAYS)}")
    parser.add_argument("--width", choices=("shape", "tiny"), default="shape", help="of the layers")
    parser.add_argument("--budget", type=float, help="seconds; what would begin after them is left out (quick: 85)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--program", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    if args.child:
        return _child(args)
    depths = [int(d) for d in args.depths.split(",")] if args.depths else [2, 4] if args.tiny else None
    depths = depths or ([16, 32] if args.quick else [4, 16, 32])
    ways = args.ways.split(",")
    if args.tiny and "--ways" not in " ".join(sys.argv):
        ways = ["pcg eager"]
    budget = Budget(args.budget or (85 if args.quick else None))
    with Results(args, f"startup-{'tiny' if args.tiny else args.shape}", _NOTES) as results:
        cold: dict[int, float] = {}
        for depth in sorted(depths, reverse=True):
            for way in ways:
                if budget.over():
                    results.say(f"{way} with {depth} layers was left out: {budget.used():.0f} s are over the budget")
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    # Without Inductor there is nothing to keep.
                    states = {"pcg eager": ("empty",), "pcg saved": ("saving", "program")}.get(way, ("empty", "warm"))
                    for caches in states:
                        # With a saved program, Inductor's caches are empty all the same.
                        caches_in = os.path.join(folder, caches) if way == "pcg saved" else folder
                        row = _measure(args, way, depth, caches_in, os.path.join(folder, "saved.pcg"))
                        if way == "torch.compile" and caches == "empty" and "first_step_s" in row:
                            cold[depth] = row["first_step_s"]
                        if depth in cold and "first_step_s" in row:
                            row["over_torch_compile_cold"] = round(row["first_step_s"] / cold[depth], 3)
                        results.add(layers=depth, way=way, caches=caches, **row)


_NOTES = {
    "first_step_s": "from the model in memory to the end of its first step of 61 tokens: trace, compile, capture, run",
    "process_s": "from the start of the process to the end of that step, the model itself left out",
    "second_size_s": "the first step of another size, in another bucket",
    "compiled": "distinct pieces that pcg compiled; null for torch.compile",
    "cache_hits, cache_misses": "of Inductor's FX graph cache and AOTAutograd's cache together",
}


def _measure(args: argparse.Namespace, way: str, depth: int, folder: str, program: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks", "startup", "--child", way, "--layers", str(depth)]
    command += ["--program", program, "--device", str(args.device), "--shape", args.shape] + ["--tiny"] * (
        args.tiny or args.width == "tiny"
    )
    environment = {
        **os.environ,
        "PCG_BENCHMARK_STARTED": str(time.time()),
        "TORCHINDUCTOR_CACHE_DIR": folder,
        "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return {"failed": "took more than 300 s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return {"failed": (last or ["no output"])[0][:300]}


def _child(args: argparse.Namespace) -> None:
    """What a fresh process measures; the last line of its output is the result."""
    imports = time.time() - float(os.environ["PCG_BENCHMARK_STARTED"])
    import torch

    import pcg_compile as pcg

    from .common import synchronize
    from .compiled import Compiled
    from .models import make_cache, make_lists, make_model, shape_of
    from .variants import Eager, World

    way, device = args.child, args.device
    shape = shape_of(args)
    with torch.no_grad():
        model = make_model(shape, device)
        cache = make_cache(shape, device, 256)
        lists, others = (make_lists(shape, cache, n, 0) for n in (_TOKENS, 2 * _TOKENS))
        world = World(shape, model, cache, device, "inductor", [_TOKENS])
        # What a first step pays whatever compiles it is paid here: attention's kernels, cuBLAS.
        eager = Eager(world)
        with eager.enter(lists) as call:
            want = call().float()
        synchronize(device)
        torch._dynamo.utils.counters.clear()
        if way == "torch.compile":
            variant: Any = Compiled(world)
        else:
            compiler = "eager" if way == "pcg eager" else "inductor"
            variant = Eager(world)
            options = {"compiler": compiler, "cudagraph_mode": "piecewise"}
            decorator = pcg.piecewise(dynamic={"ids": 0, "positions": 0}, **options)
            loads = way == "pcg saved" and os.path.exists(args.program)
            if not loads:
                variant.model = decorator(model.forward)
        started = time.perf_counter()
        if way == "torch.compile":
            variant.start()
        elif loads:
            variant.model = pcg.load(model, args.program)
        with variant.enter(lists) as call:
            got = call().float()
        synchronize(device)
        first = time.perf_counter() - started
        if way == "pcg saved" and not loads:
            pcg.save(variant.model, args.program)
        started = time.perf_counter()
        with variant.enter(others) as call:
            call()
        synchronize(device)
        second = time.perf_counter() - started
        error = ((got - want).norm() / want.norm()).item()
        counters = torch._dynamo.utils.counters
        stats = pcg.stats()
        result = {
            "first_step_s": round(first, 3),
            "process_s": round(imports + first, 3),
            "second_size_s": round(second, 3),
            "error": round(error, 6),
            "graphs": counters["stats"]["unique_graphs"],
            "pieces": None if way == "torch.compile" else stats.pieces,
            "compiled": None if way == "torch.compile" else stats.compiled,
            "cache_hits": counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
            "cache_misses": counters["inductor"]["fxgraph_cache_miss"]
            + counters["aot_autograd"]["autograd_cache_miss"],
        }
        if not error <= 0.05:
            result["failed"] = f"wrong: error {error:.3g}"
            del result["first_step_s"]
    print("RESULT " + json.dumps(result), flush=True)
