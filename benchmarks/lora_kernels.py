"""The LoRA kernels against the least time for their work: ``python -m benchmarks.lora_kernels``."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pcg_compile.lora import route
from pcg_compile.lora.ops import add_adapters

from .common import Budget, Results, add_common, one_line, resolve, sizes_of
from .report import tables

__all__ = ["Work", "add_arguments", "floor_us", "main", "make", "run"]

#: in and out features of the layers that adapters are mostly trained on.
LAYERS = {
    "1b q": (2048, 2048),
    "1b v": (2048, 512),
    "1b gate": (2048, 8192),
    "8b q": (4096, 4096),
    "8b v": (4096, 1024),
    "8b gate": (4096, 14336),
}
_SLOTS, _MAX_RANK = 16, 64
#: More than a large GPU's second-level cache holds.
_CACHE = 128 << 20
_NOTES = {
    "adapters": "distinct ones in the batch; 0: all tokens are the base model's, no work is left",
    "cold_us": "shrink and expand; inputs, outputs and factors in no cache, as factors are in a step of many layers",
    "hot_us": "the same call again and again",
    "shrink_us, expand_us": "each by itself, cold",
    "floor_us": "bytes that must move over the memory's bandwidth, or multiplications over the peak, the larger",
    "ratio": "cold_us over floor_us",
}


@dataclass(frozen=True)
class Work:
    """Arguments of the op: y ``[n, out]``, x ``[n, in]``, factors, routing; bfloat16."""

    tensors: tuple[torch.Tensor, ...]
    slices: tuple[int, ...]

    def launches(self, blocks: Any = None) -> tuple[Any, Any]:
        from pcg_compile.lora.launch import launches

        y, x, a, b, scalings, ranks, *routing = self.tensors
        return launches([(y, a, b, scalings, ranks)], x, *routing, [self.slices], blocks)

    def error(self) -> float:
        """Relative error of the kernels against plain PyTorch in float32; y stays as it was."""
        y, *rest = self.tensors
        want, got = y.clone(), y.clone()
        add_adapters(want, *rest, self.slices)
        for launch in Work((got, *rest), self.slices).launches():
            start(launch)
        return ((got.float() - want.float()).norm() / want.float().norm()).item()


def start(launch: Any) -> None:
    """Starts one kernel."""
    launch.kernel[launch.grid](*launch.args, **launch.constants, **launch.options)


def make(
    n: int, in_features: int, out_features: int, rank: int, adapters: int, device: torch.device, seed: int = 0
) -> Work:
    """Tokens shared evenly among some adapters of a pool of 16: in turn up to 128 tokens, else in long requests."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        return drawn / 8 if len(shape) == 3 else drawn

    token = torch.arange(n, device=device)
    slots = token if n <= 128 else token * 4 * adapters // n
    routing = route(slots % adapters if adapters else torch.full_like(token, -1), _SLOTS)
    a, b = random(_SLOTS, _MAX_RANK, in_features), random(_SLOTS, out_features, _MAX_RANK)
    ranks = torch.full((_SLOTS,), rank, dtype=torch.int32, device=device)
    scalings = torch.ones(_SLOTS, device=device)
    return Work((random(n, out_features), random(n, in_features), a, b, scalings, ranks, *routing), (out_features,))


def bytes_of(n: int, in_features: int, out_features: int, rank: int, adapters: int) -> int:
    """What must move at least: x once, y there and back, the factors of the adapters in the batch."""
    factors = min(adapters, n) * rank * (in_features + out_features)
    return 2 * (n * (in_features + 2 * out_features) + factors) if adapters else 0


def floor_us(
    n: int, in_features: int, out_features: int, rank: int, adapters: int, bandwidth: float, tflops: float
) -> float:
    """Microseconds that the work needs at least.

    Args:
        bandwidth: TB/s. tflops: peak of dense bfloat16.
    """
    flops = 2 * n * rank * (in_features + out_features) if adapters else 0
    return max(bytes_of(n, in_features, out_features, rank, adapters) / bandwidth, flops / tflops) / 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", help="tokens, with commas (64,1000,4000; tiny and quick: 64,1000)")
    parser.add_argument("--ranks", help="with commas (16,64)")
    parser.add_argument("--adapters", help="distinct ones in a batch, with commas (0,1,4,16)")
    parser.add_argument("--only", choices=tuple(LAYERS), help="one layer")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="of the GPU's memory, TB/s (an H100's: 3.35)")
    parser.add_argument("--tflops", type=float, default=800, help="dense bfloat16 peak that the floor counts with")
    parser.add_argument("--seconds", type=float, default=60, help="what is not begun by then is left out")
    parser.add_argument("--sweep", action="store_true", help="other tile sizes than the rule's, too (minutes)")


def run(args: argparse.Namespace) -> None:
    """Times every combination, after its numbers are checked."""
    results = Results(args, "lora-kernels", _NOTES)
    if args.device.type != "cuda":
        results.say("needs a CUDA GPU: nothing is timed")
        return
    budget = Budget(args.seconds)
    sizes = sizes_of(args.sizes, (64, 1000) if args.tiny or args.quick else (64, 1000, 4000))
    names = [args.only] if args.only else [*LAYERS][: 1 if args.tiny else None]
    combinations = list(
        itertools.product(names, sizes_of(args.ranks, (16, 64)), sizes_of(args.adapters, (0, 1, 4, 16)), sizes)
    )
    for done, (name, rank, adapters, n) in enumerate(combinations):
        if budget.over():
            results.say(f"{len(combinations) - done} of {len(combinations)} combinations left out: out of time")
            break
        shape = (n, *LAYERS[name], rank, adapters)
        row = {"layer": name, "n": n, "rank": rank, "adapters": adapters}
        try:
            results.add(**row, **_measure(shape, args))
            for tried in _sweep(shape, args) if args.sweep and adapters else ():
                results.add(**row, **tried)
        except Exception as error:
            results.say(f"{row} failed: {one_line(error)}")
    print("\n\n".join(tables(results.data)))
    print(f"==> {results.path}", flush=True)


def _measure(shape: tuple[int, ...], args: argparse.Namespace) -> dict[str, Any]:
    work = _copies(shape, args.device)
    error = work[0].error()
    if not error < 0.02:
        return {"error": error}
    pairs = [one.launches() for one in work]
    floor = floor_us(*shape, args.bandwidth, args.tflops)
    cold = _time([launch for pair in pairs for launch in pair], len(pairs), args.repeats)
    return {
        "cold_us": cold,
        "hot_us": _time(list(pairs[0]) * 20, 20, args.repeats),
        "shrink_us": _time([shrink for shrink, _ in pairs], len(pairs), args.repeats),
        "expand_us": _time([expand for _, expand in pairs], len(pairs), args.repeats),
        "floor_us": round(floor, 2),
        "ratio": round(cold / floor, 2) if floor else None,
        "error": round(error, 5),
    }


def _sweep(shape: tuple[int, ...], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each kernel with every tile size that makes sense for the tokens, the other one as the rule has it."""
    from pcg_compile.lora.launch import Blocks, blocks_for

    work = _copies(shape, args.device)
    rule, rows = blocks_for(*shape[:3]), (16, 32) if shape[0] <= 128 else (32, 64, 128)
    for which, names, *sizes in (
        (0, ("rows", "sum", "splits"), rows, (64, 128), (1, 2, 4, 8)),
        (1, ("rows", "columns", "turns"), rows, (64, 128, 256), (1, 2, 4, 8)),
    ):
        for tried in itertools.product(*sizes):
            blocks: Blocks = rule._replace(**dict(zip(names, tried, strict=True)))
            row = {"kernel": ("shrink", "expand")[which], "blocks": ", ".join(map(str, tried))}
            try:
                row["us"] = _time([one.launches(blocks)[which] for one in work], len(work), args.repeats)
            except Exception as error:  # Tiles that are too large for this GPU.
                row["failed"] = one_line(error)
            yield row


def _copies(shape: tuple[int, ...], device: torch.device) -> list[Work]:
    """The same work on other memory, as often as it takes for nothing to be left in a cache the next time round."""
    once = bytes_of(*shape[:4], max(1, shape[4]))
    return [make(*shape, device, seed) for seed in range(max(1, min(32, -(-_CACHE // once))))]


def _time(launches: Sequence[Any], calls: int, repeats: int) -> float:
    """Microseconds a call, of a graph that holds some: the median of replays."""
    for launch in launches[:2]:
        start(launch)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for launch in launches:
            start(launch)
    return round(1e3 * statistics.median(_replay_ms(graph.replay, repeats)) / calls, 2)


def _replay_ms(replay: Callable[[], None], repeats: int) -> list[float]:
    replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def main(argv: Sequence[str] | None = None) -> None:
    """Reads a command line, the process's by default, and runs it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_kernels", description=__doc__)
    add_common(parser)
    add_arguments(parser)
    parser.set_defaults(command="lora_kernels")
    run(resolve(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
