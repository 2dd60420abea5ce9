"""New tokens a second of generate_batch: nano-vllm's workload, a rollout of GRPO's kind, and one request alone."""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import pcg_compile as pcg

from .common import Results, one_line, synchronize
from .windows import profile_of

__all__ = ["add_arguments", "run"]

_WORKLOADS = ("nano", "llama", "grpo", "single")
_VARIANTS = ("pcg", "transformers", "static", "generate")
#: Requests that one call of ``generate()`` pads to one length.
_PADDED = 32
#: New tokens of a request with the slower variants at the most.
_MOST_NEW = 128
_TARGETS = ["q_proj", "v_proj"]
_NOTES = {
    "nano": "256 requests, 100 to 1,024 tokens in and out, a model of Qwen3-0.6B's shape (bench.py of nano-vllm)",
    "llama": "64 requests of the same kind, a Llama of 1B parameters",
    "grpo": "32 prompts, 8 samples each, one LoRA adapter of rank 16, a Llama of 1B parameters",
    "single": "one request, 128 new tokens, a Llama of 1B parameters",
    "pcg": "pcg_compile.integrations.transformers.generate_batch",
    "transformers": "generate_batch of transformers with its best attention that is installed, all requests with the "
    "mean of new tokens, at most 128; one run after one of 4 tokens, by the same manager",
    "static": 'generate(cache_implementation="static") on up to 32 of the requests, padded on the left, with the mean '
    "of new tokens, at most 128; one run after the first",
    "generate": "the same without a static cache",
    "limit": "256 (or all) requests that decode at the middle of their lengths, launched without waiting for a token",
    "busy": "share of the wall time in which a kernel runs, by torch's profiler, in windows of up to 32 steps of a run",
    "host_us": "the host's time for a step in the same run, without waiting for the device: median, largest tenth",
    "kernels_us, host_ops_us": "of these windows, the largest by microseconds a step",
    "first_s": "seconds of the first run: compiling and capturing",
}


@dataclass
class Workload:
    """Prompts, new tokens of each, and samples of each prompt."""

    prompts: list[list[int]]
    news: list[int]
    samples: int = 1
    adapter: bool = False

    @property
    def tokens(self) -> int:
        """All new tokens."""
        return sum(self.news) * self.samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", help=f"comma-separated, of {', '.join(_WORKLOADS)} (all)")
    parser.add_argument("--variants", help=f"comma-separated, of {', '.join(_VARIANTS)} (all)")
    parser.add_argument("--compiler", choices=("inductor", "eager"), help="what pcg compiles with (tiny: eager)")


def run(args: argparse.Namespace) -> None:
    """Every workload with every variant; greedy answers are compared with each other first."""
    variants = args.variants.split(",") if args.variants else list(_VARIANTS)
    with Results(args, "throughput", _NOTES) as results:
        for name in args.workloads.split(",") if args.workloads else _WORKLOADS:
            workload = _workload(name, args.tiny, args.quick)
            model = _model(name, args)
            for variant in variants:
                row: dict[str, Any] = {"workload": name, "variant": variant}
                try:
                    row |= _measure(_RUN[variant], model, workload, args)
                except Exception as failure:
                    # A rival that does not run on this machine is a remark, not the end of the benchmark.
                    results.say(f"{name}: {variant} is left out: {one_line(failure)}")
                    continue
                results.add(**row)
            del model
            if args.device.type == "cuda":
                torch.cuda.empty_cache()


def _workload(name: str, tiny: bool, quick: bool) -> Workload:
    chance = random.Random(0)
    count, least, most = {
        "nano": (256, 100, 1024),
        "llama": (64, 100, 1024),
        "grpo": (32, 100, 256),
        "single": (1, 128, 128),
    }[name]
    if tiny:
        count, least, most = min(count, 4), 3, 9
    elif quick:
        count = min(count, 32)
    prompts = [[chance.randrange(3, 60) for _ in range(chance.randint(least, most))] for _ in range(count)]
    news = [chance.randint(least, most) for _ in range(count)]
    return Workload(prompts, news, 8 if name == "grpo" else 1, name == "grpo")


def _model(name: str, args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    torch.manual_seed(0)
    if args.tiny:
        config: Any = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64,
        )  # fmt: skip
    elif name == "nano":
        config = Qwen3Config(
            hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
        )  # fmt: skip
    else:
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=32000, max_position_embeddings=8192,
        )  # fmt: skip
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    with args.device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def _measure(make: Callable[..., Any], model: Any, workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    serve = make(model, workload, args)
    try:
        started = time.perf_counter()
        serve.warm_up()
        first = time.perf_counter() - started
        times = []
        for _ in range(1 if args.quick else serve.runs):
            synchronize(args.device)
            started = time.perf_counter()
            tokens = serve()
            synchronize(args.device)
            times.append(time.perf_counter() - started)
        if tokens != serve.tokens:
            raise RuntimeError(f"{tokens} new tokens, {serve.tokens} wanted")
        seconds = statistics.median(times)
        row = {"requests": serve.requests, "samples": workload.samples, "new_tokens": tokens}
        row |= {"tokens_per_s": round(tokens / seconds, 1), "ms_per_token": round(1e3 * seconds / tokens, 4)}
        return row | {"seconds": round(seconds, 3), "first_s": round(first, 2)} | serve.remarks(tokens / seconds)
    finally:
        serve.close()


def _save_adapter(model: Any, folder: str, device: torch.device) -> None:
    from peft import LoraConfig, get_peft_model

    with device:
        base = type(model)(model.config)
    config = LoraConfig(r=16, target_modules=_TARGETS, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)


class _Pcg:
    """generate_batch's session, with a number of new tokens for each request."""

    def __init__(self, model: Any, workload: Workload, args: argparse.Namespace) -> None:
        from pcg_compile.integrations.generation import Engine, Request, Sampling
        from pcg_compile.integrations.transformers import cache_for

        self.workload, self.model, self.args = workload, model, args
        self.requests, self.tokens, self.runs, self.warm_up = len(workload.prompts), workload.tokens, 3, self
        self.folder = tempfile.TemporaryDirectory()
        self.adapter = self._add_adapter() if workload.adapter else None
        lengths = [len(prompt) + new for prompt, new in zip(workload.prompts, workload.news, strict=True)]
        pages = 1 + sum(-(-length // 16) for length in lengths) * workload.samples
        self.most = max(lengths)
        cache = cache_for(model, num_pages=pages, max_requests=256)
        compiler = args.compiler or ("inductor" if args.device.type == "cuda" else "eager")
        options = {"compiler": compiler, "max_tokens": 64 if args.tiny else 8192}
        self.engine = Engine(model, cache, 64 if args.tiny else 256, options["max_tokens"], options)
        self.request, self.sampling = Request, Sampling

    def _add_adapter(self) -> str:
        _save_adapter(self.model, self.folder.name, self.args.device)
        self.pool = pcg.lora.AdapterPool(self.model, max_adapters=2, max_rank=16, target_modules=_TARGETS)
        self.pool.load("adapter", self.folder.name)
        return "adapter"

    @torch.no_grad()
    def __call__(self, watch: Callable[[Any], None] | None = None) -> int:
        from pcg_compile.integrations.generation import Session
        from pcg_compile.integrations.generation.engine import attending_through_pcg

        work = self.workload
        heat = 1.0 if work.samples > 1 else 0.0
        with attending_through_pcg(self.model), Session(self.engine, self.most) as session:
            for i, (prompt, new) in enumerate(zip(work.prompts, work.news, strict=True)):
                for sample in range(work.samples):
                    sampling = self.sampling(temperature=heat, seed=i * work.samples + sample)
                    session.add(self.request(f"{i}.{sample}", i, prompt, new, sampling, adapter=self.adapter))
            if watch is not None:
                watch(session)
            requests = [request for request, _ in session.run(tokens=False)]
        errors = [request.error for request in requests if request.error is not None]
        if errors:
            raise errors[0]
        return sum(len(request.generated) for request in requests)

    def remarks(self, rate: float) -> dict[str, Any]:
        """Fallbacks, and the share of the limit."""
        stats = pcg.stats(self.engine.forward(self.workload.samples > 1))
        row: dict[str, Any] = {"fallbacks": [f"{f.reason} ({f.count})" for f in stats.fallbacks]}
        if self.args.device.type == "cuda":
            limit = self._limit()
            row |= {"limit_tokens_per_s": round(limit, 1), "of_limit": round(rate / limit, 3)}
            row |= profile_of(self, max(self.workload.news), self.args.device)
        return row

    @torch.no_grad()
    def _limit(self, steps: int = 40) -> float:
        """Tokens a second of decoding steps launched one after the other, at the middle of the requests' lengths."""
        from pcg_compile.integrations.generation.engine import attending_through_pcg

        engine, work = self.engine, self.workload
        count = min(engine.slots, len(work.prompts) * work.samples)
        lengths = [len(work.prompts[i % len(work.prompts)]) + work.news[i % len(work.news)] // 2 for i in range(count)]
        pages = [engine.cache.allocate(-(-length // 16)) for length in lengths]
        adapters = [self.adapter] * count if self.adapter else None
        batch = pcg.Batch([1] * count, lengths, pages, adapters=adapters, ids=[5] * count)
        rows, forward, state = engine.send(range(count)), engine.forward(work.samples > 1), engine.state
        engine.begin()
        with attending_through_pcg(self.model), pcg.step(batch, engine.cache):
            ids, positions = batch.ids, batch.positions

            def one() -> None:
                forward(ids, positions, rows, rows, state.last, state.floats, state.longs, state.seen)

            for _ in range(5):
                one()
            synchronize(self.args.device)
            started = time.perf_counter()
            for _ in range(steps):
                one()
            synchronize(self.args.device)
            seconds = (time.perf_counter() - started) / steps
        engine.end()
        for some in pages:
            engine.cache.free(some)
        return count / seconds

    def close(self) -> None:
        """Takes the adapters off the model."""
        if self.adapter:
            self.pool.close()
        self.folder.cleanup()


def _new_of(workload: Workload) -> int:
    return min(round(sum(workload.news) / len(workload.news)), _MOST_NEW)


class _Transformers:
    """transformers' own continuous batching."""

    runs = 1

    def __init__(self, model: Any, workload: Workload, args: argparse.Namespace) -> None:
        from transformers import GenerationConfig
        from transformers.utils import import_utils

        self.model, self.workload = model, workload
        better = [
            f"flash_attention_{i}" for i in (3, 2) if getattr(import_utils, f"is_flash_attn_{i}_available", bool)()
        ]
        self.attention = better[0] if better else "sdpa"
        self.requests, self.new = len(workload.prompts), _new_of(workload)
        self.tokens = self.new * self.requests * workload.samples
        self.config = GenerationConfig(
            do_sample=workload.samples > 1, num_return_sequences=workload.samples, eos_token_id=-1, pad_token_id=0
        )
        if workload.adapter:
            with tempfile.TemporaryDirectory() as folder:
                _save_adapter(model, folder, args.device)
                model.load_adapter(folder, "adapter")

    def warm_up(self) -> int:
        """Makes the manager, and captures what it captures."""
        return self(4)

    def __call__(self, new: int | None = None) -> int:
        found = self.model.generate_batch(
            self.workload.prompts, generation_config=self.config, progress_bar=False, persistent_manager=True,
            max_new_tokens=new or self.new,
        )  # fmt: skip
        return sum(len(output.generated_tokens) for output in found.values())

    def remarks(self, rate: float) -> dict[str, Any]:
        """Its attention."""
        return {"attention": self.attention}

    def close(self) -> None:
        """Ends the manager."""
        self.model.destroy_cached_continuous_batching_manager()


class _Generate:
    """generate(), with the cache that ``settings`` name; transformers compiles for a static one."""

    settings: Mapping[str, Any] = {}
    runs = 1

    def __init__(self, model: Any, workload: Workload, args: argparse.Namespace) -> None:
        prompts = [prompt for prompt in workload.prompts for _ in range(workload.samples)][:_PADDED]
        self.model, self.requests, self.warm_up = model, len(prompts), self
        self.new = _new_of(workload)
        self.tokens, longest = self.requests * self.new, max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        self.ids = torch.tensor(padded, device=args.device)
        self.mask = (self.ids > 0).long()

    @torch.no_grad()
    def __call__(self) -> int:
        found = self.model.generate(
            self.ids, attention_mask=self.mask, max_new_tokens=self.new, min_new_tokens=self.new, do_sample=False,
            **self.settings,
        )  # fmt: skip
        return int(found.numel() - self.ids.numel())

    def remarks(self, rate: float) -> dict[str, Any]:
        """Nothing to say."""
        return {}

    def close(self) -> None:
        """Nothing is kept."""


class _Static(_Generate):
    """generate() with a static cache."""

    settings: Mapping[str, Any] = {"cache_implementation": "static"}


_RUN: dict[str, Callable[..., Any]] = {
    "pcg": _Pcg,
    "transformers": _Transformers,
    "static": _Static,
    "generate": _Generate,
}
