"""Seconds and MiB that captured graph takes, by number of buckets."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import pcg_compile as pcg
from pcg_compile.registry import runtimes
from pcg_compile.runtime.buckets import default_table

from .common import Results, one_line, synchronize
from .models import make_cache, make_lists, make_model, shape_of, share

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--counts", default="12,50", help="numbers of buckets to capture (tiny: 4,6)")
    parser.add_argument("--max-tokens", type=int, help="largest bucket (1024; tiny 32)")
    parser.add_argument("--cudagraph-mode", choices=("piecewise", "full"), default="piecewise")
    parser.add_argument("--compiler", choices=("inductor", "eager"), help="what pieces are compiled with (tiny: eager)")


def run(args: argparse.Namespace) -> None:
    shape = shape_of(args)
    most = args.max_tokens or (32 if args.tiny else 1024)
    counts = (4, 6) if args.tiny else tuple(int(c) for c in args.counts.split(","))
    compiler = args.compiler or ("eager" if args.tiny else "inductor")
    with Results(args, f"capture-{shape.name}", _NOTES) as results, torch.no_grad():
        model = make_model(shape, args.device)
        for count in counts:
            try:
                results.add(
                    layers=shape.layers,
                    max_tokens=most,
                    compiler=compiler,
                    **_capture(args, shape, model, compiler, spread(count, most)),
                )
            except Exception as error:
                results.say(f"{count} buckets failed: {one_line(error)}")
            # What one count holds is not the next one's.
            torch._dynamo.reset()
            if args.device.type == "cuda":
                torch.cuda.empty_cache()


_NOTES = {
    "seconds": "pcg.warmup of all buckets but the largest, which is captured first and pays for compiling and tuning",
    "per_bucket_ms": "of these, by bucket",
    "first_seconds": "pcg.warmup of the largest bucket: trace, compile, measure, capture",
    "mib": "what captured graphs and static memory hold, as pcg counts it, over all buckets",
    "device_mib": "memory of the process on the device: rise from before the first captured graph",
    "lazy_ms": "median time of the first step of a bucket that warm-up left out, less that of its second step",
}


def spread(count: int, most: int) -> list[int]:
    """``count`` buckets of equal steps on a logarithmic scale, 2 to ``most``."""
    sizes = {max(2, round(2 * (most / 2) ** (i / (count - 1)))) for i in range(count)}
    extra = (n for n in [*default_table(most), *range(2, most)] if n not in sizes)
    while len(sizes) < min(count, most - 1):
        sizes.add(next(n for n in extra if n not in sizes))
    return sorted(sizes)


def _capture(args: argparse.Namespace, shape: Any, model: Any, compiler: str, buckets: list[int]) -> dict[str, Any]:
    device = args.device
    cache = make_cache(shape, device, buckets[-1])
    left_out = [buckets[(len(buckets) - 1) // 2]]
    options = {"buckets": buckets, "compiler": compiler, "cudagraph_mode": args.cudagraph_mode}
    compiled = torch.compile(share(model, shape), backend="pcg", options=options)
    lists = make_lists(shape, cache, buckets[-1], 0)
    batch = lists.batch()
    before = _device_bytes(device)
    seconds = []
    for wanted in (buckets[-1:], [b for b in buckets[:-1] if b not in left_out]):
        started = time.perf_counter()
        with pcg.step(batch, cache):
            pcg.warmup(compiled, lists.ids, batch.positions, buckets=wanted, progress=False)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    lazy = [_first_hit(shape, cache, compiled, n, device) for n in left_out]
    stats = pcg.stats(compiled)
    recorded = len(buckets) - 1 - len(left_out)
    return {
        "buckets": len(buckets),
        "captured": stats.captured,
        "first_seconds": round(seconds[0], 3),
        "seconds": round(seconds[1], 3),
        "per_bucket_ms": round(1e3 * seconds[1] / max(1, recorded), 2),
        "lazy_ms": round(sum(lazy) / len(lazy), 2),
        "mib": round(sum(r.nbytes() for r in runtimes(compiled)) / 2**20, 3),
        "device_mib": round((_device_bytes(device) - before) / 2**20, 1) if device.type == "cuda" else None,
        "bytes": {str(size): use.bytes for size, use in stats.buckets.items()},
        "fallbacks": [f.reason for f in stats.fallbacks],
    }


def _first_hit(shape: Any, cache: pcg.PagedKVCache, compiled: Any, n: int, device: torch.device) -> float:
    """Milliseconds that the first step at a bucket takes more than the second."""
    lists = make_lists(shape, cache, n, 1)
    times = []
    for _ in range(2):
        batch = lists.batch()
        synchronize(device)
        started = time.perf_counter()
        with pcg.step(batch, cache):
            compiled(lists.ids, batch.positions)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 1e3 * (times[0] - times[1])


def _device_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free
