"""Continuous batching: requests come and go, prefill in chunks beside decoding, one batch a step, an adapter a request.

    python examples/continuous_batching.py                  # tokens stream to the terminal
    python examples/continuous_batching.py --check          # and each answer equals the request's served alone

All that a server needs of pcg is here: pages for keys and values, a Batch a step, the model called inside it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.live import Live
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import pcg_compile as pcg
from pcg_compile.integrations.transformers import cache_for

VOCABULARY = 1000


@dataclass(eq=False)
class Request:
    """A prompt, what was generated, and where its keys and values lie."""

    name: str
    prompt: list[int]
    want: int
    adapter: str | None = None
    output: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    #: Tokens whose keys and values are in the cache.
    cached: int = 0

    @property
    def waiting(self) -> list[int]:
        """Tokens that the model has not seen yet: the rest of the prompt, or the last one generated."""
        return (self.prompt + self.output)[self.cached :]

    @property
    def done(self) -> bool:
        """Whether it has all that it wants."""
        return len(self.output) >= self.want


class Scheduler:
    """Chooses a step's tokens: one for every request that decodes, then pieces of prompts while there is room."""

    def __init__(self, cache: pcg.PagedKVCache, most_tokens: int, most_requests: int) -> None:
        self.cache, self.most_tokens, self.most_requests = cache, most_tokens, most_requests
        self.queue: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.queue.append(request)

    def _admit(self) -> None:
        """Starts requests in order of arrival while pages for their whole length are free."""
        while self.queue and len(self.running) < self.most_requests:
            first = self.queue[0]
            pages = -(-(len(first.prompt) + first.want) // self.cache.page_size)
            if pages > self.cache.free_pages:
                break
            first.pages = self.cache.allocate(pages)
            self.running.append(self.queue.popleft())

    def next_step(self) -> list[tuple[Request, list[int]]]:
        """The requests of the next step and their new tokens; [] where there is nothing to do."""
        self._admit()
        # Requests that decode come first, so that a long prompt delays nobody's next token by more than a chunk.
        order = sorted(self.running, key=lambda request: len(request.waiting) > 1)
        chosen: list[tuple[Request, list[int]]] = []
        room = self.most_tokens
        for request in order:
            tokens = request.waiting[:room]
            if tokens:
                chosen.append((request, tokens))
                room -= len(tokens)
        return chosen

    def finish(self, request: Request) -> None:
        """Gives a request's pages back."""
        self.running.remove(request)
        self.cache.free(request.pages)


@torch.no_grad()
def serve(
    call: Callable[..., Any],
    cache: pcg.PagedKVCache,
    arrivals: Iterator[Request | None],
    most_tokens: int = 64,
    most_requests: int = 16,
) -> Iterator[tuple[int, int, list[tuple[Request, int]]]]:
    """Serves requests as they arrive; yields (tokens, requests, new tokens by request) of every step.

    ``arrivals`` gives a request that has come, or None where none has for now; it ends when no more will come.
    """
    scheduler, open_ = Scheduler(cache, most_tokens, most_requests), True
    while open_ or scheduler.queue or scheduler.running:
        while open_ and (arrived := next(arrivals, False)) is not None:
            open_ = arrived is not False
            if isinstance(arrived, Request):
                scheduler.add(arrived)
        chosen = scheduler.next_step()
        if not chosen:
            continue
        requests = [request for request, _ in chosen]
        lengths = [len(tokens) for _, tokens in chosen]
        adapters = [request.adapter for request in requests]
        batch = pcg.Batch(
            lengths,
            [request.cached + new for request, new in zip(requests, lengths, strict=True)],
            [request.pages for request in requests],
            adapters=adapters if any(adapters) else None,
        )
        ids = torch.tensor([token for _, tokens in chosen for token in tokens], device=cache.device)
        with pcg.step(batch, cache):
            logits = call(input_ids=ids[None], position_ids=batch.positions[None]).logits[0]
        ends = torch.tensor(lengths, device=cache.device).cumsum(0) - 1
        sampled = logits[ends].argmax(-1).tolist()
        new: list[tuple[Request, int]] = []
        for request, length, token in zip(requests, lengths, sampled, strict=True):
            request.cached += length
            if not request.waiting:
                # The last chunk of a prompt, or a decoded token: the model has seen all there is.
                request.output.append(token)
                new.append((request, token))
                if request.done:
                    scheduler.finish(request)
        yield sum(lengths), len(requests), new


def make_model(device: str, adapters: Path | None) -> tuple[torch.nn.Module, list[str]]:
    """A Llama with random weights, of about 1B parameters on a GPU; with adapters of random weights where wanted."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = (2048, 8192, 16, 32, 8) if device == "cuda" else (64, 128, 2, 4, 2)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def fresh(attention: str) -> torch.nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCABULARY, **dict(zip(names, sizes, strict=True)))
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).to(device).eval()

    model = fresh("pcg")
    if adapters is None:
        return model, []
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj"]
    pool = pcg.lora.AdapterPool(model, max_adapters=4, max_rank=16, target_modules=targets)
    for name, rank in (("french", 8), ("sql", 16)):
        config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
        get_peft_model(fresh("sdpa"), config).save_pretrained(adapters / name)
        pool.load(name, adapters / name)
    return model, ["french", "sql"]


def make_requests(count: int, adapters: list[str], seed: int = 0) -> list[Request]:
    """Prompts of 3 to 60 tokens that want 4 to 24 more, some for an adapter."""
    random.seed(seed)
    return [
        Request(
            f"#{i}",
            [random.randrange(VOCABULARY) for _ in range(random.randint(3, 60))],
            random.randint(4, 24),
            random.choice([None, *adapters]),
        )
        for i in range(count)
    ]


def trickle(requests: list[Request], seed: int = 1) -> Iterator[Request | None]:
    """Requests that arrive over time: at some steps one, at others none."""
    chance = random.Random(seed)
    waiting = deque(requests)
    while waiting:
        yield waiting.popleft() if chance.random() < 0.4 else None


def main() -> None:
    """Serves, with tokens as they come, and a live line: requests, tokens a second, bucket, padding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--no-adapters", action="store_true", help="the base model alone")
    parser.add_argument("--check", action="store_true", help="serve every request alone as well, and compare")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as directory:
        model, adapters = make_model(device, None if options.no_adapters else Path(directory))
    settings = {"buckets": [4, 8, 16, 32, 64], "compiler": "inductor" if device == "cuda" else "eager"}
    compiled = torch.compile(model, backend="pcg", options=settings)
    cache = cache_for(model, num_pages=256)
    requests = make_requests(options.requests, adapters)
    started, tokens = time.perf_counter(), 0
    streams: dict[str, str] = {}
    with Live(refresh_per_second=10) as live:
        for step_tokens, running, new in serve(compiled, cache, trickle(requests)):
            tokens += len(new)
            bucket = next(b for b in settings["buckets"] if b >= step_tokens)
            table = Table("requests", "tokens/s", "tokens in the step", "bucket", "padding")
            rate = tokens / (time.perf_counter() - started)
            table.add_row(str(running), f"{rate:.0f}", str(step_tokens), str(bucket), f"{1 - step_tokens / bucket:.0%}")
            for request, token in new:
                start = f"{request.name} ({request.adapter or 'base'}):"
                streams[request.name] = f"{streams.get(request.name, start)} {token}"
                if request.done:
                    live.console.print(streams.pop(request.name))
            live.update(Group(table, *streams.values()))
    stats = pcg.stats(compiled)
    print(f"{stats.steps} steps, {stats.captured} recordings, {stats.replays} replays, fallbacks: {stats.fallbacks}")
    if options.check:
        agree = 0
        for request in requests:
            alone = Request(request.name, request.prompt, request.want, request.adapter)
            for _ in serve(model, cache, iter([alone])):
                pass
            same = sum(a == b for a, b in zip(request.output, alone.output, strict=True))
            # Kernels for other numbers of rows round otherwise, which can decide between two tokens.
            assert device == "cuda" or same == request.want, f"{request.name}: {same} of {request.want} tokens agree"
            agree += same == request.want
        print(f"{agree} of {len(requests)} answers equal those of requests served alone")


if __name__ == "__main__":
    main()
