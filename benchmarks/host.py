"""Host time: a program's glue, the entry to a compiled model, a step's metadata. Needs no GPU."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import pcg_compile as pcg
from pcg_compile.registry import runtimes
from pcg_compile.step import require_step
from pcg_compile.torch_compat.cuda import data_ptrs_equal

from .common import Results, median_us
from .models import SHAPES, Lists, Llama, dtype_of, make_cache, make_lists, make_model, share
from .variants import attention_of

__all__ = ["add_arguments", "run"]

_REQUESTS = (2, 34, 64, 256, 1024)
_TOKENS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing of its own: layers default to 32 (tiny: 4) of a few KB, whatever the shape."""


def run(args: argparse.Namespace) -> None:
    repeats = 20 if args.tiny else 100 if args.quick else 300
    shape = replace(SHAPES["tiny"], layers=args.layers or (4 if args.tiny else 32))
    if args.device.type == "cuda":
        # A head size that FlashInfer has.
        shape = replace(shape, head_dim=64)
    torch._dynamo.config.recompile_limit = 64
    with Results(args, "host", _NOTES) as results, torch.no_grad():
        model = make_model(shape, args.device)
        cache = make_cache(shape, args.device, 64)
        lists = make_lists(shape, cache, _TOKENS, 0)
        options: dict[str, Any] = {"compiler": "eager", "cudagraph_mode": "piecewise", "buckets": [8]}

        def piecewise(guards: str) -> Callable[[Llama], Any]:
            dynamic = {"ids": 0, "positions": 0}
            return lambda m: pcg.piecewise(dynamic=dynamic, guards=guards, **options)(m.forward)

        ways: dict[str, Callable[[Llama], Any]] = {
            "torch.compile": lambda m: torch.compile(m, backend="pcg", options=options),
            '@piecewise(guards="dynamo")': piecewise("dynamo"),
            '@piecewise(guards="inputs")': piecewise("inputs"),
        }
        for name, way in ways.items():
            results.add(what="entry", way=name, **_entry(way(share(model, shape)), cache, lists, repeats))
        for requests in _REQUESTS:
            results.add(what="metadata", requests=requests, **_metadata(shape, args.device, requests, repeats))


_NOTES = {
    "call_us": "the compiled model, its program emptied: guards, entry, inputs in, outputs out",
    "entry_us": "from the caller's line to pcg's runtime",
    "first_launch_us": "to the launch of the first kernel, which copies the inputs",
    "first_replay_us": "to the first replay: inputs launched, weights and addresses compared",
    "address_check_us": "of these, the comparison of the addresses of all parameters",
    "glue_us": "a program of as many calls as the model's that do nothing, less these calls",
    "batch_us": "Batch() from Python lists; batch_of_arrays_us: from arrays",
    "step_us": "entering and leaving the step, positions to the device included",
    "prepare_us": "tables, padding to a bucket, one copy to the device",
    "plan_us": "attention's planner (FlashInfer)",
    "total_us": "Batch from lists, step, positions, prepare, plan; total_of_arrays_us: from arrays",
    "advance_us": "the same by batch.advance(): the next decode step on pages that the requests have",
}


def _entry(compiled: Any, cache: pcg.PagedKVCache, lists: Lists, repeats: int) -> dict[str, Any]:
    """Times of a compiled model's call, without what its program does."""
    batch = lists.batch()
    with pcg.step(batch, cache):
        pcg.warmup(compiled, lists.ids, batch.positions, progress=False)
    with pcg.step(batch, cache):
        positions = batch.positions
        call = lambda: compiled(lists.ids, positions)
        call()
        call()
        (runtime,) = runtimes(compiled)
        binding, program = next((b, p) for b in runtime.bindings for s, p in b.steps.items() if _TOKENS in s)
        body, pieces = program.body, program.replays
        calls = body.calls
        full = median_us(call, max(3, repeats // 20), cache.device)
        body.calls = ()
        emptied = median_us(call, repeats)
        marks = _marks(runtime, program, call, repeats)
        parameters = [parameter() for parameter, _ in binding.parameters]
        addresses = [address for _, address in binding.parameters]
        places = list(range(len(parameters)))
        check = median_us(lambda: data_ptrs_equal(list(parameters), addresses, places), repeats)
        body.calls = (_nothing,) * len(calls)
        nothing = median_us(call, repeats)
        loop = median_us(lambda: [call() for call in body.calls], repeats)
        body.calls = calls
    return {
        "pieces": pieces,
        "calls": len(calls),
        "parameters": len(parameters),
        "full_us": full,
        "call_us": emptied,
        **marks,
        "address_check_us": check,
        "glue_us": round(nothing - emptied - loop, 2),
    }


def _marks(runtime: Any, program: Any, call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Host time from a call until it reaches pcg's runtime, its first launch, and its first replay."""
    times: dict[str, list[float]] = {"entry_us": [], "first_launch_us": [], "first_replay_us": []}
    began, loads, sizes_of = 0.0, program._load_calls, runtime.sizes_of

    def reached(name: str) -> None:
        times[name].append(time.perf_counter() - began)

    def entered(args: Any) -> Any:
        reached("entry_us")
        return sizes_of(args)

    runtime.sizes_of = entered
    program._load_calls = (lambda: reached("first_launch_us"), *loads)
    program.body.calls = (lambda: reached("first_replay_us"),)
    try:
        for _ in range(repeats):
            began = time.perf_counter()
            call()
    finally:
        del runtime.sizes_of
        program._load_calls, program.body.calls = loads, ()
    return {name: round(1e6 * statistics.median(found), 2) for name, found in times.items()}


def _nothing() -> None:
    return None


def _metadata(shape: Any, device: torch.device, requests: int, repeats: int) -> dict[str, Any]:
    """Times of preparing decode requests of 64 to 512 cached tokens, padded to a bucket."""
    draw = random.Random(requests)
    kv_lens = [draw.randint(64, 512) for _ in range(requests)]
    one = replace(shape, layers=1)
    cache = pcg.PagedKVCache(
        1, 1 + sum(7 - -kv // 16 for kv in kv_lens), 16, 1024, num_kv_heads=one.kv_heads, head_dim=one.head_dim,
        dtype=dtype_of(device), device=device,
    )  # fmt: skip
    table = [cache.allocate(-(-kv // 16)) for kv in kv_lens]
    qo_lens = [1] * requests
    widest = max(map(len, table))
    ints = torch.int32
    arrays = (
        torch.tensor(qo_lens, dtype=ints).numpy(),
        torch.tensor(kv_lens, dtype=ints).numpy(),
        torch.tensor([pages + [0] * (widest - len(pages)) for pages in table], dtype=ints).numpy(),
    )
    bucket = requests + max(1, requests // 16)
    text = attention_of(one, device)
    names = [text] if device.type == "cuda" else []

    def use(batch: pcg.Batch) -> None:
        with pcg.step(batch, cache):
            _ = batch.positions
            require_step("a benchmark").prepare(bucket, "request", names)

    ahead = [pages + cache.allocate(7) for pages in table]
    line = [pcg.Batch(qo_lens, kv_lens, ahead)]

    def advance() -> None:
        # A new batch now and then, ahead of full pages; the median is of the others.
        last = line[0]
        line[0] = last.advance() if last.age < 100 else pcg.Batch(qo_lens, kv_lens, ahead)
        use(line[0])

    def bare() -> None:
        with pcg.step(made, cache):
            _ = made.positions

    made = pcg.Batch(qo_lens, kv_lens, table)
    result = {
        "batch_us": median_us(lambda: pcg.Batch(qo_lens, kv_lens, table), repeats, device),
        "batch_of_arrays_us": median_us(lambda: pcg.Batch(*arrays), repeats, device),
        "step_us": median_us(bare, repeats, device),
        "total_us": median_us(lambda: use(pcg.Batch(qo_lens, kv_lens, table)), repeats, device),
        "total_of_arrays_us": median_us(lambda: use(pcg.Batch(*arrays)), repeats, device),
        "advance_us": median_us(advance, repeats, device),
    }
    with pcg.step(made, cache):
        state = require_step("a benchmark")

        def prepare(shapes: list[str]) -> None:
            made._tables.clear()
            cache.current = state.prepared = None
            state.prepare(bucket, "request", shapes)

        plain = median_us(lambda: prepare([]), repeats, device)
        result["prepare_us"] = plain
        if names:
            result["plan_us"] = round(median_us(lambda: prepare(names), repeats, device) - plain, 2)
    return result
