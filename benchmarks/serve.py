"""Decode loops: how long a step takes by when the loop reads its tokens, beside the captured step alone."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import pcg_compile as pcg
from pcg_compile.registry import runtimes

from .common import Results, one_line, synchronize
from .models import PAGE_SIZE, Llama, Shape, make_cache, make_model, shape_of, share

__all__ = ["add_arguments", "run"]

_REQUESTS = (1, 8, 32)
_CACHED = 512
_DYNAMIC = {"ids": 0, "positions": 0}

Step = Callable[[torch.Tensor], torch.Tensor]


class Greedy(nn.Module):
    """ids ``[n]`` and positions ``[n]`` -> tokens ``[n]``: the largest hidden state stands for the next token."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(ids, positions).argmax(-1)  # type: ignore[no-any-return]


_WAYS: dict[str, Callable[[Greedy, dict[str, Any]], Any]] = {
    "piecewise": lambda m, o: torch.compile(m, backend="pcg", options={**o, "cudagraph_mode": "piecewise"}),
    "full": lambda m, o: torch.compile(m, backend="pcg", options=o),
    'guards="inputs"': lambda m, o: pcg.piecewise(dynamic=_DYNAMIC, guards="inputs", **o)(m.forward),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", help="numbers of requests, comma-separated (1,8,32; tiny 2)")


def run(args: argparse.Namespace) -> None:
    shape = shape_of(args)
    counts = [int(n) for n in args.requests.split(",")] if args.requests else [2] if args.tiny else list(_REQUESTS)
    steps = 8 if args.tiny else 100 if args.quick else 200
    options = {"compiler": "eager" if args.tiny else "inductor", "buckets": counts}
    torch._dynamo.config.recompile_limit = 64
    with Results(args, f"serve-{shape.name}", _NOTES) as results, torch.no_grad():
        model = make_model(shape, args.device)
        cache = make_cache(shape, args.device, max(counts) * (_CACHED + 4 * steps))
        for way, make in _WAYS.items():
            try:
                compiled = make(Greedy(share(model, shape)), options)
                for n in counts:
                    results.add(way=way, requests=n, **_loops(shape, cache, compiled, n, steps))
            except Exception as error:
                results.say(f"{way} failed: {one_line(error)}")


_NOTES = {
    "at_once_ms": "a step of a loop that reads each step's tokens before it launches the next",
    "late_ms": "that reads them once the next step is launched",
    "no_wait_ms": "that never reads",
    "replay_ms": "the captured step alone, its metadata ready: replayed again and again, never read",
    "at_once_over_late": "what waiting for the host costs",
}


def _loops(shape: Shape, cache: pcg.PagedKVCache, compiled: Any, requests: int, steps: int) -> dict[str, Any]:
    pages = -(-(_CACHED + 4 * steps) // PAGE_SIZE)
    table = [cache.allocate(pages) for _ in range(requests)]
    first = pcg.Batch([1] * requests, [_CACHED] * requests, table)
    ids = torch.randint(0, shape.vocab, (requests,)).to(cache.device)
    with pcg.step(first, cache):
        pcg.warmup(compiled, ids, first.positions, buckets=[requests], progress=False)
    before = pcg.stats(compiled)
    found: dict[str, Any] = {}
    for name, loop in (("at_once", _at_once), ("late", _late), ("no_wait", _no_wait)):
        batch = [pcg.Batch([1] * requests, [_CACHED] * requests, table)]

        def step(tokens: torch.Tensor, batch: list[pcg.Batch] = batch) -> torch.Tensor:
            batch[0] = batch[0].advance()
            with pcg.step(batch[0], cache):
                return compiled(tokens, batch[0].positions)  # type: ignore[no-any-return]

        loop(step, ids, steps // 4)
        times = []
        for _ in range(3):
            synchronize(cache.device)
            started = time.perf_counter()
            loop(step, ids, steps)
            synchronize(cache.device)
            times.append((time.perf_counter() - started) / steps)
        found[f"{name}_ms"] = round(1e3 * statistics.median(times), 4)
    after = pcg.stats(compiled)
    found["at_once_over_late"] = round(found["at_once_ms"] / found["late_ms"], 3)
    found["replays_a_step"] = round((after.replays - before.replays) / max(1, after.steps - before.steps), 2)
    found["fallbacks"] = [fallback.reason for fallback in after.fallbacks] or None
    found["replay_ms"] = _replay_ms(compiled, cache, steps)
    for pages_of_one in table:
        cache.free(pages_of_one)
    return found


def _at_once(step: Step, tokens: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        tokens = step(tokens)
        tokens.tolist()


def _late(step: Step, tokens: torch.Tensor, steps: int) -> None:
    """As docs/serving.md has it; the copy to the host goes ahead of the next step."""
    cuda = tokens.device.type == "cuda"
    hosts = [torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=cuda) for _ in range(2)]
    events = [torch.cuda.Event() for _ in range(2)] if cuda else []
    for i in range(steps):
        tokens = step(tokens)
        hosts[i % 2].copy_(tokens, non_blocking=True)
        if cuda:
            events[i % 2].record()
        if i:
            if cuda:
                events[(i - 1) % 2].synchronize()
            hosts[(i - 1) % 2].tolist()


def _no_wait(step: Step, tokens: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        tokens = step(tokens)


def _replay_ms(compiled: Any, cache: pcg.PagedKVCache, steps: int) -> float | None:
    """Milliseconds of the full CUDA graph that served last, without its host; None where there is none."""
    graphs = [
        captured
        for runtime in runtimes(compiled)
        if runtime.current is not None
        for bucket, full in runtime.current.full_graphs.items()
        if full.captured_graphs and bucket == next(reversed(runtime.current.steps.values())).bucket
        for captured in list(full.captured_graphs.values())[:1]
    ]
    if not graphs or cache.device.type != "cuda":
        return None
    synchronize(cache.device)
    started = time.perf_counter()
    for _ in range(steps):
        graphs[0].replay()
    synchronize(cache.device)
    return round(1e3 * (time.perf_counter() - started) / steps, 4)
