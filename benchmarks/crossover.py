"""The size from which on captured graphs no longer pay: the same compiled pieces, replayed and called."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from .common import Clock, Results, one_line, sizes_of
from .models import make_cache, make_lists, make_model, shape_of
from .variants import Eager, Pcg, Variant, World

__all__ = ["add_arguments", "run"]

_SIZES = (16, 64, 128, 256, 512, 1024, 2048, 4096)
_QUICK = (64, 256, 1024, 2048)
_TINY = (4, 16)
#: What a bucket exceeds the tokens by: the default table's largest step above 256 tokens.
_STEP = 1.12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", help="buckets, comma-separated")
    parser.add_argument("--compiler", choices=("inductor", "eager"), help="what pieces are compiled with (tiny: eager)")


def run(args: argparse.Namespace) -> None:
    shape = shape_of(args)
    sizes = sizes_of(args.sizes, _TINY if args.tiny else _QUICK if args.quick else _SIZES)
    torch._dynamo.config.recompile_limit = 64
    with Results(args, f"crossover-{shape.name}", _NOTES) as results, torch.no_grad():
        model = make_model(shape, args.device)
        cache = make_cache(shape, args.device, max(sizes))
        compiler = args.compiler or ("eager" if args.tiny else "inductor")
        world = World(shape, model, cache, args.device, compiler, sizes)
        recorded, exact = Captured(world), Exact(world)
        example = make_lists(shape, cache, max(sizes), 0)
        for variant in (recorded, exact):
            variant.build(example)
        ratios: dict[str, list[tuple[int, float]]] = {"full": [], "padded": []}
        for bucket in sizes:
            for fill, n in (("full", bucket), ("padded", max(1, int(bucket / _STEP)))):
                try:
                    row = _compare(world, {"captured": recorded, "exact": exact}, n, args.repeats)
                except Exception as error:
                    results.say(f"n = {n} failed: {one_line(error)}")
                    continue
                row["ratio"] = round(row["captured_wall_ms"] / row["exact_wall_ms"], 3)
                ratios[fill].append((n, row["ratio"]))
                results.add(bucket=bucket, fill=fill, n=n, **row)
        results.data["crossover"] = {fill: crossing(points) for fill, points in ratios.items()}
        for fill, n in results.data["crossover"].items():
            results.say(f"{fill} buckets pay {'at every size' if n is None else f'up to about {n} tokens'}")


_NOTES = {
    "captured": "captured graphs at the bucket, replayed",
    "exact": "the same compiled pieces at exactly n tokens, not captured",
    "full, padded": f"n is the bucket, or the bucket / {_STEP}, as badly as the default table fits",
    "crossover": "where the ratio captured / exact exceeds 1.0, linear between sizes; null: nowhere",
}


class Captured(Pcg):
    """Buckets that are captured whether they pay or not."""

    def options(self) -> dict[str, Any]:
        return {**super().options(), "buckets": sorted(self.world.sizes), "max_padding": 2.0}

    def build(self, example: Any) -> None:
        # Lazily, since warm-up gives up what does not pay.
        self.model = self.compile()
        for _ in range(2):
            with self.enter(example) as call:
                call()

    def remark(self) -> str | None:
        return None


class Exact(Captured):
    """No bucket fits, so every step runs uncaptured."""

    def options(self) -> dict[str, Any]:
        return {**super().options(), "buckets": [1]}


def _compare(world: World, variants: dict[str, Variant], n: int, repeats: int) -> dict[str, Any]:
    lists = make_lists(world.shape, world.cache, n, 0)
    with Eager(world).enter(lists) as call:
        want = call().float()
    row: dict[str, Any] = {}
    for name, variant in variants.items():
        variant.ready([lists])
        with variant.enter(lists) as call:
            error = ((call().float() - want).norm() / want.norm()).item()
        if not error <= 0.05:
            raise ValueError(f"{name} is wrong: error {error:.3g}")
        row[f"{name}_error"] = round(error, 6)
    if replays := variants["exact"].replays:  # type: ignore[attr-defined]
        raise ValueError(f"the exact step replayed {replays} captured graphs")
    if not variants["captured"].replays:  # type: ignore[attr-defined]
        raise ValueError("nothing was captured")
    clocks = {name: Clock(world.device) for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            with variant.enter(lists) as call:
                call()
                clocks[name].measure(call)
    for name, clock in clocks.items():
        row |= clock.medians(f"{name}_")
    return row


def crossing(points: Sequence[tuple[int, float]]) -> int | None:
    """The size at which a ratio first exceeds 1 for good; None where the last does not."""
    points = sorted(points)
    if not points or points[-1][1] <= 1:
        return None
    above = next(i for i in range(len(points)) if all(ratio > 1 for _, ratio in points[i:]))
    if above == 0:
        return points[0][0]
    (n0, r0), (n1, r1) = points[above - 1], points[above]
    return round(n0 + (1 - r0) / (r1 - r0) * (n1 - n0))
