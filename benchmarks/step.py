"""Times one step of a Llama, eager to one CUDA graph, each variant's numbers checked before it is timed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .common import Budget, Clock, Results, one_line, sizes_of
from .compiled import Compiled, Partition, ReduceOverhead
from .limit import Breakable, LimitBucket, LimitExact
from .models import Lists, make_cache, make_lists, make_model, shape_of
from .variants import Eager, NotHere, Pcg, PcgFullGraph, PcgInputs, PcgSlice, Variant, World, bucket_of

__all__ = ["add_arguments", "run"]

#: In the order in which they are built: what matters most comes first.
_FIRST: Mapping[str, Callable[[World], Variant]] = {
    "eager": Eager,
    "pcg": Pcg,
    "compile": Compiled,
    "limit-exact": LimitExact,
    "limit-bucket": LimitBucket,
    "pcg-inputs": PcgInputs,
    "pcg-whole": PcgFullGraph,
    "pcg-slice": PcgSlice,
    "breakable": Breakable,
}
#: With graphs that Inductor captures: each in a process of its own, since they fail with illegal memory accesses beside
#: other captured graphs, and that ends a process.
_LAST: Mapping[str, Callable[[World], Variant]] = {"partition": Partition, "reduce-overhead": ReduceOverhead}
VARIANTS = {**_FIRST, **_LAST}
_SIZES = (1, 3, 7, 13, 30, 61, 120, 250, 500, 1000, 2000, 4000)
_QUICK = (1, 7, 61, 250, 1000)
_TINY = (1, 5, 61)
#: Batches of each size that numbers are checked with; the first is the one that a variant captured with.
_CHECKED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", help="tokens, comma-separated")
    parser.add_argument("--variants", help=f"comma-separated, of {', '.join(VARIANTS)} (all; quick: without pcg-slice)")
    parser.add_argument("--compiler", choices=("inductor", "eager"), help="what pcg compiles with (tiny: eager)")
    parser.add_argument("--budget", type=float, help="seconds; what is not built by 70 %% of them is left out")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    shape = shape_of(args)
    sizes = sizes_of(args.sizes, _TINY if args.tiny else _QUICK if args.quick else _SIZES)
    names = args.variants.split(",") if args.variants else [n for n in VARIANTS if not args.quick or n != "pcg-slice"]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise SystemExit(f"unknown variants {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    budget = Budget(args.budget or ((95 if args.shape == "1b" else 145) if args.quick else None))
    torch._dynamo.config.recompile_limit = 64
    with Results(args, f"step-{shape.name}", _NOTES) as results, torch.no_grad():
        model = make_model(shape, args.device)
        cache = make_cache(shape, args.device, max(sizes))
        compiler = args.compiler or ("eager" if args.tiny else "inductor")
        world = World(shape, model, cache, args.device, compiler, sizes)
        results.data["layers"] = shape.layers
        here = args.child.split(",") if args.child else [name for name in names if name in _FIRST]
        _build(world, ["eager", *(name for name in VARIANTS if name in here and name != "eager")], results, budget)
        for n in sizes:
            if budget.over():
                results.say(f"n = {n} was left out: {budget.used():.0f} s are over the budget")
                continue
            _size(world, n, results, args.repeats)
        for name in () if args.child else (name for name in _LAST if name in names):
            if args.device.type != "cuda":
                results.say(f"{name} is left out: needs CUDA")
            elif budget.over(0.7):
                results.say(f"{name} was left out: {budget.used():.0f} s of the budget are used")
            else:
                _elsewhere(name, args, sizes, results)


def _elsewhere(name: str, args: argparse.Namespace, sizes: Sequence[int], results: Results) -> None:
    """Rows of a variant from a process of its own; eager, timed there again, shows whether the machine is as fast."""
    walls = {(row["variant"], row["n"]): row.get("ready_wall_ms") for row in results.data["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", "step", "--child", name, "--out", folder]
        command += ["--sizes", ",".join(map(str, sizes)), "--shape", args.shape, "--repeats", str(args.repeats)]
        command += ["--device", str(args.device)] + (["--layers", str(args.layers)] if args.layers else [])
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        found = [json.loads(path.read_text()) for path in Path(folder).glob("step-*.json")]
    rows = [row for data in found for row in data["rows"]]
    for row in rows:
        column = {name: "over_limit", "eager": "eager_there_over_here"}[row["variant"]]
        reference = walls.get(("limit-bucket" if row["variant"] == name else "eager", row["n"]))
        if reference and "ready_wall_ms" in row:
            row[column] = round(row["ready_wall_ms"] / reference, 3)
    there = {row["n"]: row.get("eager_there_over_here") for row in rows if row["variant"] == "eager"}
    for row in rows:
        if row["variant"] == name:
            results.add(**row, eager_there_over_here=there.get(row["n"]))
    for remark in (remark for data in found for remark in data.get("remarks", ())):
        results.say(remark)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        results.say(f"{name} ended its process: {(lines or [f'exit code {done.returncode}'])[0][:300]}")


_NOTES = {
    "ready": "wall and host time of a call whose batch's metadata are on the device: inside a running step()",
    "lists": "from host lists: Batch, positions, padding, plan, copies, and the call",
    "gpu_ms": "of the device alone, with its queue kept full",
    "error": "largest over 4 batches of one size: of all rows, and of the worst row, relative to eager",
}


def _build(world: World, names: Sequence[str], results: Results, budget: Budget) -> None:
    for name in names:
        variant = VARIANTS[name](world)
        if name != "eager" and budget.over(0.7):
            results.say(f"{name} was left out: {budget.used():.0f} s of the budget are used")
            continue
        started = time.perf_counter()
        try:
            # A batch of its own: marks on its tensors would reach the next one's trace.
            variant.build(make_lists(world.shape, world.cache, max(world.sizes), 0))
        except NotHere as reason:
            results.say(f"{name} is left out: {reason}")
            continue
        except Exception as error:
            results.say(f"{name} failed: {one_line(error)}")
            continue
        world.built[name] = variant
        results.data["notes"][name] = variant.about
        seconds = round(time.perf_counter() - started, 2)
        results.data.setdefault("build_seconds", {})[name] = seconds
        print(f"  built {name} in {seconds:.1f} s", flush=True)


def _size(world: World, n: int, results: Results, repeats: int) -> None:
    """All variants at one size: first their numbers, then their times, in turn."""
    batches = [make_lists(world.shape, world.cache, n, seed) for seed in range(_CHECKED)]
    rows: dict[str, dict[str, Any]] = {}
    wants: list[torch.Tensor] = []
    for name, variant in world.built.items():
        row = rows[name] = {"n": n, "bucket": bucket_of(n), "variant": name}
        try:
            variant.ready(batches)
            errors = [_check(world, variant, lists, wants, i) for i, lists in enumerate(batches)]
        except NotHere as reason:
            row["skipped"] = str(reason)
            continue
        except Exception as error:
            row["skipped"] = f"failed: {one_line(error)}"
            continue
        row["error"], row["worst_row"] = (round(max(column), 6) for column in zip(*errors, strict=True))
        row["right"] = row["error"] <= _limit(world)[0] and row["worst_row"] <= _limit(world)[1]
        row["remark"] = variant.remark()
    live = {name: v for name, v in world.built.items() if rows[name].get("right")}
    clocks = {name: (Clock(world.device), Clock(world.device)) for name in live}
    for repeat in range(repeats + 2):
        for name, variant in list(live.items()):
            try:
                _time(variant, batches[repeat % _CHECKED], clocks[name], repeat < 2, repeat)
            except Exception as error:
                rows[name]["skipped"] = f"failed: {one_line(error)}"
                del live[name]
    for name, row in rows.items():
        if name in live:
            ready, lists = clocks[name]
            row |= ready.medians("ready_") | (lists.medians("lists_") if world.built[name].serves else {})
        world.built[name].done()
    for row in rows.values():
        for limit, column in (("limit-bucket", "over_limit"), ("limit-exact", "over_exact")):
            reference = rows.get(limit, {}).get("ready_wall_ms")
            if reference and "ready_wall_ms" in row:
                row[column] = round(row["ready_wall_ms"] / reference, 3)
        results.add(**row)


def _time(variant: Variant, lists: Lists, clocks: tuple[Clock, Clock], unmeasured: bool, repeat: int) -> None:
    ready, from_lists = clocks

    def step() -> None:
        with variant.enter(lists) as call:
            call()

    if unmeasured:
        return step()
    with variant.enter(lists) as call:
        call()
        ready.measure(call)
        if repeat % 4 == 0:
            ready.measure_gpu(call)
    if variant.serves:
        from_lists.measure(step)


def _limit(world: World) -> tuple[float, float]:
    """Largest errors, of all rows and of one: rounding in another order, never another key or value."""
    return (0.05, 0.25) if world.device.type == "cuda" else (1e-4, 1e-3)


def _check(world: World, variant: Variant, lists: Lists, wants: list[torch.Tensor], index: int) -> tuple[float, float]:
    """The variant's error against eager, which goes first. What it must write to the cache is spoilt before."""
    slots = lists.batch().tables(world.cache.page_size).slots
    assert slots is not None
    where = torch.from_numpy(slots).to(world.device)
    # What one batch writes, another may read as its history.
    for tensor, first in zip(world.cache.flat_k + world.cache.flat_v, world.contents, strict=True):
        tensor.copy_(first)
        tensor[where] = float("nan")
    with variant.enter(lists) as call:
        got = call().float().clone()
    if len(wants) <= index:
        wants.append(got)
    want = wants[index]
    if got.shape != want.shape:
        raise ValueError(f"{tuple(got.shape)} instead of {tuple(want.shape)}")
    difference = (got - want).norm(dim=-1) / want.norm(dim=-1)
    total = (got - want).norm() / want.norm()
    # NaN counts as wrong.
    return tuple(v if v == v else float("inf") for v in (total.item(), difference.max().item()))  # type: ignore[return-value]
