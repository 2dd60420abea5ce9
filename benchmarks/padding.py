"""What padding costs: waste of the default buckets on traffic, and a padding request against slices."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from pcg_compile.options import Options
from pcg_compile.report.suggest import fit_buckets
from pcg_compile.runtime.buckets import BucketChooser, default_table

from .common import Clock, Results, one_line
from .models import make_cache, make_lists, make_model, shape_of
from .traffic import TRAFFIC
from .variants import Eager, Pcg, Variant, World

__all__ = ["add_arguments", "run", "waste"]

_MOST = 8192
#: By how much a bucket exceeds the tokens: none, a good fit, the worst that the default table allows.
_FILL = {"exact": 1.0, "good fit": 0.95, "worst": 0.89}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20000, help="steps of traffic (tiny: 500)")
    parser.add_argument(
        "--buckets", default="64,256,1024", help="buckets to compare the kinds of padding at (tiny: 16)"
    )
    parser.add_argument("--compiler", choices=("inductor", "eager"), help="what pieces are compiled with (tiny: eager)")


def run(args: argparse.Namespace) -> None:
    shape = shape_of(args)
    steps = 500 if args.tiny else args.steps
    with Results(args, f"padding-{shape.name}", _NOTES) as results, torch.no_grad():
        for name, draw in TRAFFIC.items():
            sizes = draw(steps, _MOST)
            half = len(sizes) // 2
            table = default_table(_MOST)
            results.add(what="waste", traffic=name, table="default", **waste(sizes[half:], None))
            powers = [1 << i for i in range(1, 14)]
            results.add(what="waste", traffic=name, table="powers of two", **waste(sizes[half:], powers))
            # Fitted to one half of the traffic, measured on the other.
            counts = {n: sizes[:half].count(n) for n in set(sizes[:half])}
            fitted = sorted({*fit_buckets(counts, len(table)), _MOST})
            results.add(what="waste", traffic=name, table="suggested from the stats", **waste(sizes[half:], fitted))
        _kinds(args, shape, results)


_NOTES = {
    "waste": "padding tokens over real tokens, of the steps that a bucket serves",
    "uncaptured": "share of steps that no bucket serves",
    "request_ms, slice_ms": "wall time of a call, metadata ready, with each kind of padding",
}


def waste(sizes: Sequence[int], table: Sequence[int] | None) -> dict[str, Any]:
    """How much a table pads the steps of some sizes."""
    options = Options(max_tokens=_MOST, buckets=None if table is None else tuple(table))
    symbol = sympy.Symbol("n")
    chooser = BucketChooser(options, (), ((symbol,),))
    real = padded = uncaptured = 0
    worst = 1.0
    for n in sizes:
        choice = chooser.choose({symbol: n}, [symbol]).sizes
        if choice is None:
            uncaptured += 1
            continue
        real, padded = real + n, padded + choice[symbol]
        if n > 256:
            worst = max(worst, choice[symbol] / n)
    return {
        "buckets": len(chooser.table),
        "steps": len(sizes),
        "waste": round(padded / max(1, real) - 1, 4),
        "worst_above_256": round(worst, 3),
        "uncaptured": round(uncaptured / len(sizes), 4),
    }


def _kinds(args: argparse.Namespace, shape: Any, results: Results) -> None:
    """A padding request against slices."""
    buckets = [16] if args.tiny else [int(b) for b in args.buckets.split(",")]
    model = make_model(shape, args.device)
    cache = make_cache(shape, args.device, max(buckets))
    compiler = args.compiler or ("eager" if args.tiny else "inductor")
    world = World(shape, model, cache, args.device, compiler, buckets)
    torch._dynamo.config.recompile_limit = 64
    variants: dict[str, Variant] = {"request": Request(world), "slice": Slice(world)}
    for name, variant in variants.items():
        try:
            variant.build(make_lists(shape, cache, max(buckets), 0))
        except Exception as error:
            results.say(f"{name} failed: {one_line(error)}")
            return
    for bucket in buckets:
        for fit, fill in _FILL.items():
            n = max(1, int(bucket * fill))
            lists = make_lists(shape, cache, n, 0)
            clocks = {name: Clock(args.device) for name in variants}
            worst = 0.0
            with Eager(world).enter(lists) as call:
                want = call().float()
            for variant in variants.values():
                variant.ready([lists])
                with variant.enter(lists) as call:
                    worst = max(worst, ((call().float() - want).norm() / want.norm()).item())
            for _ in range(args.repeats):
                for name, variant in variants.items():
                    with variant.enter(lists) as call:
                        call()
                        clocks[name].measure(call)
            times: dict[str, float] = {}
            for name, clock in clocks.items():
                times |= clock.medians(f"{name}_")
            results.add(what="kinds", bucket=bucket, fit=fit, n=n, error=round(worst, 6), **times)


class Request(Pcg):
    padding = "request"

    def options(self) -> dict[str, Any]:
        return {**super().options(), "buckets": list(self.world.sizes)}

    def buckets(self) -> list[int]:
        return sorted(self.world.sizes)


class Slice(Request):
    padding = "slice"
