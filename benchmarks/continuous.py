"""New tokens a second of examples/continuous_batching.py against transformers' continuous batching, one model."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch

import pcg_compile as pcg

from .common import Results, one_line, sizes_of, synchronize
from .examples import load

__all__ = ["add_arguments", "run"]

_REQUESTS = (16, 128)
_QUICK = (64,)
_TINY = (5,)
_VARIANTS = ("eager", "pcg", "transformers")
_PAGE = 16
#: transformers' default.
_THEIR_PAGE = 256
_UNTIMED = 2
#: The share of first tokens that must agree in 16 bits, where random weights leave near ties.
_FIRST = 0.75

Answers = list[list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", help="how many at once, comma-separated (16,128; quick 64; tiny 5)")
    parser.add_argument("--new-tokens", type=int, help="of each request (128; tiny 6)")
    parser.add_argument("--longest", type=int, help="tokens of the longest prompt (512; tiny 40)")
    parser.add_argument("--most-tokens", type=int, help="of a step (1024; tiny 32)")
    parser.add_argument("--variants", help=f"comma-separated, of {', '.join(_VARIANTS)} (all)")
    parser.add_argument("--compiler", choices=("inductor", "eager"), help="what pcg compiles with (tiny: eager)")


def run(args: argparse.Namespace) -> None:
    names = args.variants.split(",") if args.variants else list(_VARIANTS)
    unknown = [name for name in names if name not in _VARIANTS]
    if unknown:
        raise SystemExit(f"unknown variants {', '.join(unknown)}; there are {', '.join(_VARIANTS)}")
    tiny = args.tiny
    new = args.new_tokens or (6 if tiny else 128)
    longest = args.longest or (40 if tiny else 512)
    most = args.most_tokens or (32 if tiny else 1024)
    with Results(args, "continuous", _NOTES) as results:
        if importlib.util.find_spec("transformers") is None:
            results.say("left out: needs transformers; pip install transformers")
            return
        example = load("continuous_batching")
        model, _ = example.make_model("cpu" if tiny else args.device.type, None)
        model = model.to(args.device)
        parameters = sum(p.numel() for p in model.parameters())
        results.data |= {"model": f"Llama, {parameters / 1e9:.2g}B", "dtype": str(model.dtype)}
        compiler = args.compiler or ("eager" if tiny else "inductor")
        for count in sizes_of(args.requests, _TINY if tiny else _QUICK if args.quick else _REQUESTS):
            torch._dynamo.reset()
            chance = random.Random(count)
            lengths = [chance.randint(3, longest) for _ in range(count)]
            prompts = [[chance.randrange(example.VOCABULARY) for _ in range(n)] for n in lengths]
            ours = 1 + sum(-(-(n + new) // _PAGE) for n in lengths)
            # A quarter more than they need: its scheduler holds prompts back where blocks are few.
            theirs = 16 + 5 * sum(-(-(n + new) // _THEIR_PAGE) for n in lengths) // 4
            ways: dict[str, Callable[[], _Ours | _Theirs]] = {
                "eager": partial(_Ours, example, model, "eager", compiler, (ours, new, most)),
                "pcg": partial(_Ours, example, model, "pcg", compiler, (ours, new, most)),
                "transformers": partial(_Theirs, model, new, most, theirs),
            }
            exact = model.dtype == torch.float32
            _compare({name: ways[name] for name in names}, prompts, new, exact, results, args)


_NOTES = {
    "requests": "all there at the start; greedy, every one to the same number of new tokens",
    "eager": "examples/continuous_batching.py with the model as it is",
    "pcg": 'the same with torch.compile(model, backend="pcg"), after pcg.warmup',
    "transformers": "model.generate_batch with a manager that is kept, so that what it records is not timed; "
    "without sharing of blocks, or the prompts of the pass before would still lie in its cache",
    "tokens_per_s": "new tokens by the median of serving_s, variants taking turns",
    "serving_s": "from the arrival of the requests to the last token",
    "call_s": "of the whole call; generate_batch starts and ends a thread, and collects garbage",
    "agree": "share of the tokens that equal eager's; in 16 bits near ties go either way, and all after one differs",
    "first_agree": "the same of each answer's first token, which follows from the prompt alone",
    "first_s": f"seconds to build it, and of {_UNTIMED} passes: compiling and recording",
}


class _Ours:
    """The example's server: all of a step's tokens in one row, with or without recordings."""

    def __init__(
        self, example: ModuleType, model: torch.nn.Module, name: str, compiler: str, sizes: tuple[int, int, int]
    ) -> None:
        from pcg_compile.integrations.transformers import cache_for

        pages, self.new, self.most = sizes
        self.example, self.name = example, name
        self.call: Callable[..., Any] = model
        if name == "pcg":
            self.call = torch.compile(model, backend="pcg", options={"compiler": compiler, "max_tokens": self.most})
        self.cache = cache_for(model, num_pages=pages, page_size=_PAGE)
        if name == "pcg":
            first = self.cache.allocate(1)
            batch = pcg.Batch([3], [3], [first])
            with pcg.step(batch, self.cache):
                ids = torch.zeros(1, 3, dtype=torch.long, device=self.cache.device)
                pcg.warmup(self.call, input_ids=ids, position_ids=batch.positions[None], progress=False)
            self.cache.free(first)

    def __call__(self, prompts: list[list[int]]) -> Answers:
        requests = [self.example.Request(f"#{i}", prompt, self.new) for i, prompt in enumerate(prompts)]
        for _ in self.example.serve(self.call, self.cache, iter(requests), self.most, most_requests=len(requests)):
            pass
        return [request.output for request in requests]

    def remarks(self) -> dict[str, Any]:
        """How it ran."""
        if self.name != "pcg":
            return {}
        stats = pcg.stats(self.call)
        fallbacks = [f"{f.reason} ({f.count})" for f in stats.fallbacks]
        return {"pieces": stats.pieces, "recordings": stats.captured, "fallbacks": fallbacks}

    def done(self) -> None:
        """Lets go of its cache."""
        del self.cache


class _Theirs:
    """transformers' own, with the best attention that it finds here."""

    #: Seconds of the last call from the first request's arrival to the last token.
    serving = 0.0

    def __init__(self, model: torch.nn.Module, new: int, most: int, pages: int) -> None:
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
        from transformers.utils import import_utils

        better = {f"flash_attention_{i}": getattr(import_utils, f"is_flash_attn_{i}_available", bool)() for i in (3, 2)}
        self.attention = next((name for name, here in better.items() if here), "sdpa")
        dtype, device = next((p.dtype, p.device) for p in model.parameters())
        config: Any = copy.deepcopy(model.config)
        theirs = AutoModelForCausalLM.from_config(config, attn_implementation=self.attention, dtype=dtype)
        theirs.load_state_dict(model.state_dict())
        self.model = theirs.to(device).eval()
        # No token ends an answer early; -1 is what it calls that.
        self.generation = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        known = inspect.signature(ContinuousBatchingConfig).parameters
        # Older releases have another name for the one, and never do the other.
        wanted = {"page_size" if "page_size" in known else "block_size": _THEIR_PAGE}
        if "auto_switch_to_flash" in known:
            wanted["auto_switch_to_flash"] = False
        self.settings = ContinuousBatchingConfig(
            num_blocks=pages, max_batch_tokens=most, allow_block_sharing=False, **wanted
        )

    def __call__(self, prompts: list[list[int]]) -> Answers:
        answers = self.model.generate_batch(
            prompts,
            generation_config=self.generation,
            continuous_batching_config=self.settings,
            persistent_manager=True,
            record_timestamps=True,
        )
        failed = [answer.error for answer in answers.values() if answer.error]
        if failed or len(answers) != len(prompts):
            raise RuntimeError(f"{len(answers) - len(failed)} of {len(prompts)} requests were answered; {failed[:1]}")
        begun = min(answer.created_time for answer in answers.values())
        self.serving = max(answer.timestamps[-1] for answer in answers.values()) - begun
        return [list(answer.generated_tokens) for answer in answers.values()]

    def remarks(self) -> dict[str, Any]:
        """How it ran."""
        return {"attention": self.attention}

    def done(self) -> None:
        """Ends its thread, and lets go of its cache."""
        self.model.destroy_cached_continuous_batching_manager()


def _agree(found: Answers, wanted: Answers, most: int | None = None) -> float:
    """The share of equal tokens, of all or of each answer's first ones."""
    pairs = [pair for f, w in zip(found, wanted, strict=True) for pair in zip(f[:most], w[:most], strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def _compare(
    ways: dict[str, Callable[[], _Ours | _Theirs]],
    prompts: list[list[int]],
    new: int,
    exact: bool,
    results: Results,
    args: argparse.Namespace,
) -> None:
    """All ways with the same prompts; what gives other tokens is not timed."""
    rows: dict[str, dict[str, Any]] = {}
    live: dict[str, _Ours | _Theirs] = {}
    wanted: Answers = []
    for name, make in ways.items():
        row: dict[str, Any] = {"requests": len(prompts), "prompt_tokens": sum(map(len, prompts)), "variant": name}
        started = time.perf_counter()
        try:
            way = live[name] = make()
            found = [way(prompts) for _ in range(_UNTIMED)][-1]
        except Exception as failure:
            results.say(f"{name} is left out: {one_line(failure)}")
            if name in live:
                live.pop(name).done()
            continue
        row["first_s"] = round(time.perf_counter() - started, 2)
        wanted = wanted or found
        row |= {"agree": round(_agree(found, wanted), 4), "first_agree": round(_agree(found, wanted, 1), 4)}
        row["right"] = row["agree"] == 1 if exact else row["first_agree"] >= _FIRST
        rows[name] = row | way.remarks()
    times: dict[str, list[float]] = {name: [] for name, row in rows.items() if row["right"]}
    calls: dict[str, list[float]] = {name: [] for name in times}
    for _ in range(max(2, args.repeats // 4)):
        for name, spent in times.items():
            synchronize(args.device)
            started = time.perf_counter()
            live[name](prompts)
            synchronize(args.device)
            calls[name].append(time.perf_counter() - started)
            spent.append(getattr(live[name], "serving", calls[name][-1]))
    for name, spent in times.items():
        row, median = rows[name], statistics.median(spent)
        row["tokens_per_s"] = round(len(prompts) * new / median, 1)
        row |= {"serving_s": round(median, 4), "call_s": round(statistics.median(calls[name]), 4)}
    for row in rows.values():
        results.add(**row)
    for way in live.values():
        way.done()
