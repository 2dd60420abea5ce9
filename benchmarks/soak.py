"""Random traffic for minutes or for thousands of steps, compared with eager as it goes: nothing may grow or drift."""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import pcg_compile as pcg
from pcg_compile.registry import runtimes

from .common import Results, synchronize
from .models import SHAPES, Llama, Shape, dtype_of, make_model

__all__ = ["add_arguments", "run"]

_BUCKETS = [4, 8, 16, 32, 64]
_PAGE_SIZE, _PAGES, _MOST_REQUESTS, _LONGEST = 4, 512, 12, 96
_ADAPTERS, _SLOTS, _RANK = 6, 3, 4
_TARGETS = ("qkv", "out", "down")
_COMPARED = 50
_DROPPED = "a bucket dropped by the traffic"
#: Largest difference from eager over eager's largest value, by device: the rounding of float32, of bfloat16.
_LIMITS = {"cpu": 1e-5, "cuda": 0.05}
#: What may grow, in MiB and in objects: programs of sizes that were not met before, fragments of the heap.
_GROWTH_MIB, _GROWTH_OBJECTS = 16, 10_000
_NOTES = {
    "worst": "largest difference from eager over eager's largest value, over all comparisons",
    "memory_mib": "of the process (GPU: reserved on the device) when a fifth of the steps were made, and at the end",
    "objects": "of Python's garbage collector, at the same two moments",
    "captures_mib": "of captured graphs and their buffers, at the most, and the budget",
    "evicted": "buckets dropped because of the budget, and by the traffic itself, one in 200 steps",
    "recompiled": "graphs that Dynamo made after the first fifth of the steps",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="how long (60; tiny 5), where --steps is not given")
    parser.add_argument("--steps", type=int, help="how many steps instead")
    parser.add_argument("--seed", type=int, default=0, help="of the traffic")


def run(args: argparse.Namespace) -> None:
    """Serves random traffic; an exception, a difference or growing memory ends it with exit code 1."""
    seconds = args.seconds or (5 if args.tiny else 60)
    shape = SHAPES["tiny"]
    if args.device.type == "cuda":
        shape = Shape("soak", 2, 256, 4, 2, 64, 512, 100)
    with Results(args, "soak", _NOTES) as results, tempfile.TemporaryDirectory() as folder, torch.no_grad():
        soak = Soak(shape, args.device, args.seed, Path(folder))
        started, i, early = time.perf_counter(), 0, None
        while i < args.steps if args.steps else time.perf_counter() - started < seconds:
            soak.step(compare=i % _COMPARED == 0)
            i += 1
            part = i / args.steps if args.steps else (time.perf_counter() - started) / seconds
            if early is None and part >= 0.2 and all(b in pcg.stats(soak.compiled).buckets for b in _BUCKETS):
                early = soak.figures()
        results.add(**soak.verdict(early))
        if soak.faults:
            raise SystemExit("; ".join(soak.faults))


@dataclass
class Request:
    """What is served: its tokens so far and in all, its pages, its adapter."""

    wanted: int
    adapter: str | None
    done: int = 0
    pages: list[int] = field(default_factory=list)


class Soak:
    """A model, its traffic, and what is watched."""

    def __init__(self, shape: Shape, device: torch.device, seed: int, folder: Path) -> None:
        self.device, self.draw, self.folder = device, random.Random(seed), folder
        torch.manual_seed(seed)
        self.model: Llama = make_model(shape, device, seed)
        self.pool = pcg.lora.AdapterPool(self.model, max_adapters=_SLOTS, max_rank=_RANK, target_modules=list(_TARGETS))
        self.names = [f"adapter{i}" for i in range(_ADAPTERS)]
        for name in self.names:
            _save_adapter(folder / name, shape, self.draw.randint(1, _RANK))
        self.known: set[str] = set()
        sizes: dict[str, Any] = {
            "num_layers": shape.layers, "num_pages": _PAGES, "page_size": _PAGE_SIZE, "max_requests": 64,
            "num_kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "dtype": dtype_of(device), "device": device,
        }  # fmt: skip
        self.cache, self.other = (pcg.PagedKVCache(**sizes) for _ in range(2))
        self.vocab = shape.vocab
        # Two thirds of what all buckets would take, so some are dropped and captured again. On a GPU the largest bucket
        # alone takes nearly all of it, which the others share.
        everything = self._compile(None)
        self.budget = everything if device.type == "cuda" else 2 * everything // 3
        self._compile(self.budget)
        self.requests: list[Request] = []
        self.steps = self.compared = self.most_bytes = self.loads = self.dropped = 0
        self.worst = 0.0
        self.faults: list[str] = []

    def _compile(self, budget: int | None) -> int:
        torch._dynamo.reset()
        options = {"compiler": "eager", "buckets": _BUCKETS, "memory_budget": budget}
        self.compiled = torch.compile(self.model, backend="pcg", options=options, dynamic=True)
        if budget is None:
            batch = pcg.Batch([3, 5], [3, 5], [[1], [2, 3]], adapters=[None, None])
            with pcg.step(batch, self.cache):
                ids = torch.zeros(8, dtype=torch.int64, device=self.device)
                pcg.warmup(self.compiled, ids, batch.positions, progress=False)
        return sum(runtime.nbytes() for runtime in runtimes(self.compiled))

    # -- traffic --------------------------------------------------------------------------------------------------

    def step(self, compare: bool) -> None:
        """One step of whatever the traffic is now."""
        self._change_adapters()
        if self.draw.random() < 0.005:
            self._drop_a_bucket()
        self._admit()
        parts = list(self._chosen())
        for request, n in parts:
            request.done += n
            request.pages += self.cache.allocate(-(-request.done // _PAGE_SIZE) - len(request.pages))
        batch = pcg.Batch(
            [n for _, n in parts], [r.done for r, _ in parts], [list(r.pages) for r, _ in parts],
            adapters=[r.adapter for r, _ in parts],
        )  # fmt: skip
        ids = torch.tensor([self.draw.randrange(self.vocab) for _ in range(batch.num_tokens)], device=self.device)
        if compare:
            for mine, copy in zip(self._memory(self.cache), self._memory(self.other), strict=True):
                copy.copy_(mine)
        with pcg.step(batch, self.cache):
            got = self.compiled(ids, batch.positions)
        if compare:
            self._compare(batch, ids, got)
        self.most_bytes = max(self.most_bytes, sum(runtime.nbytes() for runtime in runtimes(self.compiled)))
        self.steps += 1
        for request in [r for r in self.requests if r.done >= r.wanted]:
            self.requests.remove(request)
            self.cache.free(request.pages)

    def _admit(self) -> None:
        while len(self.requests) < _MOST_REQUESTS and (not self.requests or self.draw.random() < 0.3):
            known = sorted(self.known)
            adapter = self.draw.choice([None, *known]) if known else None
            self.requests.append(Request(self.draw.randint(2, _LONGEST), adapter))

    def _chosen(self) -> Iterator[tuple[Request, int]]:
        """Requests of this step with their new tokens: chunks of prompts, single tokens, of few adapters at a time."""
        room, adapters = self.draw.choice((5, 20, 40, 70)), set()
        for request in self.draw.sample(self.requests, len(self.requests)):
            left = min(request.wanted - request.done, room)
            if left <= 0 or (request.adapter and len(adapters | {request.adapter}) > _SLOTS):
                continue
            if request.adapter:
                adapters.add(request.adapter)
            n = 1 if self.draw.random() < 0.6 else self.draw.randint(1, left)
            room -= n
            yield request, n

    def _change_adapters(self) -> None:
        if self.draw.random() < 0.1 or not self.known:
            name = self.draw.choice(self.names)
            if name not in self.known:
                self.pool.load(name, self.folder / name)
                self.known.add(name)
                self.loads += 1
        if self.draw.random() < 0.02 and len(self.known) > 1:
            name = self.draw.choice(sorted(self.known))
            if all(request.adapter != name for request in self.requests):
                self.pool.unload(name)
                self.known.discard(name)

    def _drop_a_bucket(self) -> None:
        """As a budget would."""
        found = [(r, bucket) for r in runtimes(self.compiled) for b in r.bindings for bucket in sorted(b.buckets)]
        if found:
            runtime, bucket = self.draw.choice(found)
            runtime.drop(None, bucket, _DROPPED)
            self.dropped += 1

    # -- what is watched --------------------------------------------------------------------------------------------

    def _compare(self, batch: pcg.Batch, ids: torch.Tensor, got: torch.Tensor) -> None:
        with pcg.step(batch, self.other):
            want = self.model(ids, batch.positions)
        pairs = [(got, want)]
        # Page 0 belongs to nobody.
        pairs += [(a[1:], b[1:]) for a, b in zip(self._memory(self.cache), self._memory(self.other), strict=True)]
        worst = 0.0
        for mine, theirs in pairs:
            scale = theirs.float().abs().max().clamp_min(1e-6)
            difference = ((mine.float() - theirs.float()).abs().max() / scale).item()
            # NaN is the worst of all, and no comparison with it says so.
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
        self.compared += 1
        self.worst = max(self.worst, worst)
        if worst > _LIMITS[self.device.type]:
            self.faults.append(f"step {self.steps}: differs from eager by {worst:.2g}")

    def _memory(self, cache: pcg.PagedKVCache) -> list[torch.Tensor]:
        return cache.k + cache.v

    def figures(self) -> dict[str, float]:
        """Memory now, in MiB, objects alive, and graphs so far."""
        gc.collect()
        synchronize(self.device)
        if self.device.type == "cuda":
            # What nobody uses any more, the memory of captured graphs that are gone among it.
            torch.cuda.empty_cache()
            used = torch.cuda.memory_reserved(self.device)
        else:
            used = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        graphs = pcg.stats(self.compiled).graphs
        return {"memory_mib": round(used / 2**20, 1), "objects": len(gc.get_objects()), "graphs": graphs}

    def verdict(self, early: dict[str, float] | None) -> dict[str, Any]:
        """All figures; what is wrong with them goes to ``faults``."""
        end, stats = self.figures(), pcg.stats(self.compiled)
        begin = early or end
        evicted = sum(f.count for f in stats.fallbacks if "memory_budget" in f.reason)
        if early is None:
            self.faults.append("not every bucket was met: too short a run shows nothing")
        for what, most in (("memory_mib", _GROWTH_MIB), ("objects", _GROWTH_OBJECTS)):
            if end[what] > begin[what] + most:
                self.faults.append(f"{what} grew from {begin[what]} to {end[what]}")
        if self.most_bytes > self.budget:
            self.faults.append(f"captured graphs held {self.most_bytes} bytes, the budget is {self.budget}")
        if end["graphs"] > begin["graphs"]:
            self.faults.append(f"{end['graphs'] - begin['graphs']} graphs were compiled while serving")
        if stats.replays == 0 or evicted + self.dropped == 0:
            self.faults.append("nothing was replayed, or no bucket was ever evicted: the run shows nothing")
        expected = ("memory_budget", "largest bucket", _DROPPED)
        other = [f.reason for f in stats.fallbacks if not any(text in f.reason for text in expected)]
        if other:
            self.faults.append(f"fallbacks: {other}")
        return {
            "steps": self.steps, "compared": self.compared, "worst": float(f"{self.worst:.3g}"),
            "memory_mib": f"{begin['memory_mib']} -> {end['memory_mib']}",
            "objects": f"{begin['objects']} -> {end['objects']}",
            "captures_mib": f"{self.most_bytes / 2**20:.2f} of {self.budget / 2**20:.2f}",
            "captured": stats.captured, "replays": stats.replays, "evicted": evicted + self.dropped,
            "adapter_loads": self.loads, "recompiled": end["graphs"] - begin["graphs"],
            "fallbacks": {f.reason: f.count for f in stats.fallbacks}, "faults": list(self.faults),
        }  # fmt: skip


def _save_adapter(folder: Path, shape: Shape, rank: int) -> None:
    """A folder as PEFT writes it, with random weights."""
    from safetensors.torch import save_file

    heads = shape.heads * shape.head_dim
    rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    sizes = {"qkv": (shape.hidden, rows), "out": (heads, shape.hidden), "down": (shape.mlp, shape.hidden)}
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(_TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(shape.layers):
        for name in _TARGETS:
            inputs, outputs = sizes[name]
            path = f"base_model.model.blocks.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, inputs) * inputs**-0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(outputs, rank) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
