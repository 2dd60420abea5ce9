"""What adapters cost a step: pcg without a pool, with many adapters in a batch, and PEFT's mixed batches."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import pcg_compile as pcg

from .common import Budget, Clock, Results, one_line, sizes_of
from .lora_kernels import floor_us
from .lora_ways import TARGETS, Mix, Ours, Theirs, Way, targets_of
from .lora_world import MAX_RANK, MIXED, SLOTS, World
from .models import shape_of

__all__ = ["add_arguments", "run"]

#: The most that adapters of rank 16 may cost a step, and the least that PEFT's decodes take against it.
_MOST = {"decode": 1.25, "prefill": 1.15}
_LEAST_PEFT = 15
_NOTES = {
    "variants": "pcg: a model without a pool; pcg-base: a model with one, all requests the base model's; pcg-lora: "
    "their adapters; peft-lora, peft-base: PeftModel(adapter_names=[...]) over the same weights, sdpa. All are "
    "transformers' LlamaModel, without a head. pcg's take turns, then PEFT's",
    "adapters": f"distinct ones named by a batch, on {', '.join(TARGETS)}; one request in five is the base model's",
    "ranks": f"mixed: {', '.join(map(str, MIXED))} in turn. The pool is made for ranks to {MAX_RANK}",
    "tokens": "decode: requests of one token with 64 to 512 cached, which PEFT pads to the longest, and whose cache "
    "transformers copies; prefill: prompts of equal length, so PEFT pads nothing",
    "ready, lists": "metadata on the device (PEFT: inputs and mask), or all from host lists (PEFT: every fourth time)",
    "error, worst": "of the requests' last hidden states, in all and of one request, relative to PEFT's with the same "
    "adapters, or none",
    "effect": "the least change that an adapter makes to a request's last hidden state, by PEFT",
    "replays": "captured graphs that a step replays",
    "lora_over_pcg": "pcg-lora over pcg, ready, wall; most: what it may be at rank 16",
    "floor_ms": "the adapters' least time in a step, as lora_kernels counts it; lora_gpu_ms: pcg-lora less pcg",
    "load": "load_ms: a folder that was just written, and its copy to the device; reload_ms: from the host alone. "
    "made: captured graphs, compiled pieces and graphs made since the first, with a step after each load",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", help="with commas, mixed among them (16,64,mixed; quick 16; tiny mixed)")
    parser.add_argument("--adapters", help="distinct ones in a batch, up to 16, with commas (1,4,16; quick 16,4)")
    parser.add_argument("--decode", help="requests of one token, with commas; 0: none (64)")
    parser.add_argument("--prefill", help="tokens of a batch of prompts, with commas; 0: none (1000,4000)")
    parser.add_argument("--cudagraph-mode", choices=("auto", "piecewise", "full"), default="auto", help="pcg's option")
    parser.add_argument("--compiler", choices=("inductor", "eager"), help="what pcg compiles with (tiny: eager)")
    parser.add_argument("--budget", type=float, help="seconds; what is not begun by then is left out (quick: 85, 140)")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="of the GPU's memory, TB/s, for the floor")
    parser.add_argument("--tflops", type=float, default=800, help="dense bfloat16 peak, for the floor")


def run(args: argparse.Namespace) -> None:
    tiny, quick = args.tiny, args.quick
    shape = shape_of(args)
    ranks = (args.ranks or ("mixed" if tiny else "16" if quick else "16,64,mixed")).split(",")
    counts = sizes_of(args.adapters, (1, 4) if tiny else (16, 4) if quick else (1, 4, 16))
    decodes = [n for n in sizes_of(args.decode, (6,) if tiny else (64,)) if n]
    prefills = [n for n in sizes_of(args.prefill, (20,) if tiny else (1000, 4000)) if n]
    if not 1 <= min(counts) <= max(counts) <= SLOTS:
        raise SystemExit(f"--adapters are 1 to {SLOTS}")
    if not all(name == "mixed" or (name.isdigit() and 1 <= int(name) <= MAX_RANK) for name in ranks):
        raise SystemExit(f"--ranks are 1 to {MAX_RANK}, and mixed")
    # Few tokens first: where time runs out, these are there.
    traffic = [("decode", n) for n in decodes] + [("prefill", n) for n in prefills]
    budget = Budget(args.budget or ((85 if args.shape == "1b" else 140) if quick else None))
    torch._dynamo.config.recompile_limit = 64
    with Results(args, f"lora-{shape.name}", _NOTES) as results, torch.no_grad():
        missing = [name for name in ("transformers", "safetensors") if importlib.util.find_spec(name) is None]
        if missing or not traffic:
            results.say(f"left out: needs {', '.join(missing) or '--decode or --prefill'}")
            return
        results.data["layers"] = shape.layers
        for name in ("transformers", "peft"):
            here = importlib.util.find_spec(name) is not None
            results.data["versions"][name] = importlib.metadata.version(name) if here else None
        with tempfile.TemporaryDirectory() as folder:
            world = World(shape, args, traffic, counts, Path(folder))
            world.compile(results)
            for name in ranks:
                if budget.over():
                    results.say(f"rank {name} was left out: {budget.used():.0f} s are over the budget")
                    continue
                world.load(name, results)
                for count in counts:
                    for kind, size in traffic:
                        if budget.over():
                            results.say(f"rank {name}, {count} adapters, {kind} {size} was left out: out of time")
                            continue
                        _compare(world, world.mix(kind, size, count), count, results, args)
        missed = [row for row in results.data["rows"] if row.get("met") is False]
        for row in missed:
            reached = f"{row['lora_over_pcg']} times pcg without (at most {row['most']})"
            if row["peft_over_lora"] is not None:
                reached += f", PEFT {row['peft_over_lora']} times it"
            results.say(f"missed with {row['adapters']} adapters of rank 16, {row['tokens']}: {reached}")


def _compare(world: World, mix: Mix, count: int, results: Results, args: argparse.Namespace) -> None:
    """All ways of running one batch; what gives wrong numbers is not timed."""
    tokens = sum(mix.qo_lens)
    where = {"ranks": world.label, "adapters": count, "tokens": f"{mix.kind} {tokens}"}
    rows, live = _check(world, mix, where, results)
    clocks = {name: (Clock(args.device), Clock(args.device)) for name in live}
    # A call of PEFT's takes the host a hundred times as long as one of ours, and leaves its caches to nobody else.
    for group in (Ours, Theirs):
        for repeat in range(args.repeats + 2):
            for name, way in [(name, way) for name, way in live.items() if isinstance(way, group)]:
                try:
                    _time(way, mix, clocks[name], repeat)
                except Exception as error:
                    results.say(f"{name} failed in {where}: {one_line(error)}")
                    del live[name]
    for name, row in rows.items():
        if name in live:
            ready, lists = clocks[name]
            row |= ready.medians("ready_") | lists.medians("lists_")
        results.add(**row)
    results.add(what="ratio", **where, **_ratios(rows, _floor_ms(world, mix, args), mix.kind, world.label))


def _time(way: Way, mix: Mix, clocks: tuple[Clock, Clock], repeat: int) -> None:
    ready, lists = clocks
    ours = isinstance(way, Ours)

    def step() -> None:
        with way.enter(mix) as call:
            call()

    if repeat < 2:
        return step()
    with way.enter(mix) as call:
        if ours:
            # Both models' code is one function: whoever ran last is tried first.
            call()
        ready.measure(call)
        # With a call of PEFT the queue would be full long before the host is done.
        if ours and repeat % 4 == 2:
            ready.measure_gpu(call)
    if ours or repeat % 4 == 2:
        lists.measure(step)


def _check(
    world: World, mix: Mix, where: Mapping[str, Any], results: Results
) -> tuple[dict[str, dict[str, Any]], dict[str, Way]]:
    """A row for each way that runs, and the ways whose numbers are right."""
    most, most_of_one = (0.05, 0.1) if world.args.device.type == "cuda" else (1e-4, 1e-4)
    last = mix.last.to(world.args.device)

    def hidden(way: Way) -> torch.Tensor:
        with way.enter(mix) as call:
            return call()[last].float()

    wants: dict[bool, torch.Tensor] = {}
    ways = dict(world.ways)
    for named, peft in ((True, "peft-lora"), (False, "peft-base")):
        try:
            wants[named] = hidden(ways[peft] if peft in ways else world.uncompiled(named))
        except Exception as failure:
            if peft not in ways:
                raise
            results.say(f"{peft} failed in {where}, and pcg is compared with the uncompiled model: {one_line(failure)}")
            del ways[peft]
            wants[named] = hidden(world.uncompiled(named))
    chosen = [i for i, name in enumerate(mix.adapters) if name is not None]
    effect = _errors(wants[True][chosen], wants[False][chosen])[2]
    if not effect > 2 * most_of_one:
        results.say(f"{where}: adapters change so little ({effect:.2g}) that a wrong one would not be seen")
    rows: dict[str, dict[str, Any]] = {}
    live: dict[str, Way] = {}
    for name, way in ways.items():
        row: dict[str, Any] = {"what": "step", **where, "variant": name}
        try:
            before = pcg.stats(way.model) if isinstance(way, Ours) else None
            error, worst, _ = _errors(hidden(way), wants[way.named])
        except Exception as failure:
            results.say(f"{name} failed in {where}: {one_line(failure)}")
            continue
        # NaN is wrong.
        row["right"] = error <= most and worst <= most_of_one
        if before is not None:
            row |= {"error": float(f"{error:.3g}"), "worst": float(f"{worst:.3g}")}
            after = pcg.stats(way.model)
            row["replays"] = after.replays - before.replays
            reasons = [f.reason for f in after.fallbacks if f not in before.fallbacks]
            if reasons:
                results.say(f"{name} in {where}: {'; '.join(reasons)}")
        if way.named:
            row["effect"] = round(effect, 3)
        rows[name] = row
        if row["right"]:
            live[name] = way
    return rows, live


def _errors(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float, float]:
    """Relative distance of all rows, and the largest and least of one."""
    one = (got - want).norm(dim=-1) / want.norm(dim=-1)
    return ((got - want).norm() / want.norm()).item(), one.max().item(), one.min().item()


def _floor_ms(world: World, mix: Mix, args: argparse.Namespace) -> float:
    """What the adapters of a step take at least, over all layers."""
    named = [(name, n) for name, n in zip(mix.adapters, mix.qo_lens, strict=True) if name is not None]
    ranks = [world.ranks[name] for name in {name for name, _ in named}]
    tokens, rank = sum(n for _, n in named), round(sum(ranks) / len(ranks))
    sizes = targets_of(world.plain).values()
    return sum(floor_us(tokens, *s, rank, len(ranks), args.bandwidth, args.tflops) for s in sizes) / 1e3


def _ratios(
    rows: Mapping[str, Mapping[str, Any]], floor_ms: float, kind: str, ranks: str
) -> dict[str, float | bool | None]:
    """What one way's time is to another's, and whether it is what it should be at rank 16."""

    def over(one: str, other: str, key: str = "ready_wall_ms") -> float | None:
        times = [rows.get(name, {}).get(key) for name in (one, other)]
        return round(times[0] / times[1], 3) if times[0] and times[1] else None

    gpu = [rows.get(name, {}).get("ready_gpu_ms") for name in ("pcg-lora", "pcg")]
    spent = gpu[0] - gpu[1] if gpu[0] and gpu[1] else None
    found: dict[str, float | bool | None] = {
        "lora_over_pcg": over("pcg-lora", "pcg"),
        "lora_over_pcg_gpu": over("pcg-lora", "pcg", "ready_gpu_ms"),
        "lora_over_pcg_lists": over("pcg-lora", "pcg", "lists_wall_ms"),
        "base_over_pcg": over("pcg-base", "pcg"),
        "peft_over_lora": over("peft-lora", "pcg-lora"),
        "peft_over_lora_lists": over("peft-lora", "pcg-lora", "lists_wall_ms"),
        "peft_over_peft_base": over("peft-lora", "peft-base"),
        "lora_gpu_ms": None if spent is None else round(spent, 4),
        "floor_ms": None if spent is None else round(floor_ms, 4),
        "over_floor": None if spent is None else round(spent / floor_ms, 2),
    }
    cost, peft = found["lora_over_pcg"], found["peft_over_lora"]
    if ranks == "16" and spent is not None and cost is not None:
        slow = kind == "decode" and peft is not None and peft < _LEAST_PEFT
        found |= {"most": _MOST[kind], "met": cost <= _MOST[kind] and not slow}
    return found
