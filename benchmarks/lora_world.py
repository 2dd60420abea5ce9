"""What ``lora`` runs: models that share weights, adapters that are loaded while serving, and the ways over them."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import pcg_compile as pcg

from .common import Results, one_line, synchronize
from .lora_ways import (
    TARGETS,
    Mix,
    Ours,
    Theirs,
    Way,
    bare_copy,
    history_of,
    load_peft,
    make_llama,
    make_mix,
    save_adapter,
)
from .models import PAGE_SIZE, Shape
from .variants import bucket_of

__all__ = ["MAX_RANK", "MIXED", "SLOTS", "World"]

#: Of the one pool that all ranks are served by.
SLOTS, MAX_RANK = 16, 64
#: Ranks of mixed adapters, in turn.
MIXED = (8, 16, 32, 64)


@dataclass
class World:
    """What all ways share, and the adapters that are loaded now."""

    shape: Shape
    args: argparse.Namespace
    traffic: Sequence[tuple[str, int]]
    counts: Sequence[int]
    folder: Path
    #: Of the adapters that are loaded now: what they are called, their ranks and folders.
    label: str = ""
    ranks: dict[str, int] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    ways: dict[str, Way] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from pcg_compile.integrations.transformers import cache_for

        device = self.args.device
        self.plain = make_llama(self.shape, device)
        self.pooled, self.bare = bare_copy(self.plain), bare_copy(self.plain)
        self.pool = pcg.lora.AdapterPool(self.pooled, SLOTS, MAX_RANK, TARGETS)
        # A decode's history is 512 tokens at most; a prompt's last page is its own.
        pages = [33 * n if kind == "decode" else -(-n // PAGE_SIZE) + 2 * SLOTS for kind, n in self.traffic]
        self.cache = cache_for(self.plain, 1 + sum(pages), PAGE_SIZE)
        for tensor in self.cache.k + self.cache.v:
            tensor.normal_()
        # Each has pages of its own: a prompt must not overwrite a decode's history.
        self.pages = {where: self.cache.allocate(n) for where, n in zip(self.traffic, pages, strict=True)}
        self.histories = {
            size: history_of(self.mix(kind, size, 1), self.cache) for kind, size in self.traffic if kind == "decode"
        }

    def mix(self, kind: str, size: int, count: int) -> Mix:
        """The batch in which ``count`` adapters are named."""
        # Before any is loaded, the same batch but for its names.
        names = list(self.ranks)[:count] or [""] * count
        return make_mix(self.shape, self.cache, self.pages[kind, size], kind, size, names)

    def compile(self, results: Results) -> None:
        """Compiles and captures both models, before any adapter is loaded."""
        compiler = self.args.compiler or ("eager" if self.args.tiny else "inductor")
        options = {"compiler": compiler, "cudagraph_mode": self.args.cudagraph_mode}
        mixes = [self.mix(kind, size, count) for kind, size in self.traffic for count in self.counts]
        buckets = sorted({bucket_of(sum(mix.qo_lens)) for mix in mixes})
        for name, model, pooled in (("pcg", self.plain, False), ("pcg-lora", self.pooled, True)):
            compiled = torch.compile(model, backend="pcg", options=options)
            started = time.perf_counter()
            mix = mixes[-1]
            batch = pcg.Batch(mix.qo_lens, mix.kv_lens, mix.page_table)
            with pcg.step(batch, self.cache):
                inputs = {"input_ids": mix.ids[None], "position_ids": batch.positions[None]}
                pcg.warmup(compiled, **inputs, buckets=buckets, progress=False)
            seconds, stats = time.perf_counter() - started, pcg.stats(compiled)
            results.add(
                what="captures", variant=name, seconds=round(seconds, 2), pieces=stats.pieces,
                compiled=stats.compiled, captured=stats.captured, buckets=len(stats.buckets),
                mib=round(sum(bucket.bytes for bucket in stats.buckets.values()) / 2**20, 2),
                pool_mib=round(self.pool.nbytes() / 2**20, 1) if pooled else None,
                fallbacks=[f"{f.reason} ({f.count})" for f in stats.fallbacks],
            )  # fmt: skip
            self.ways[name] = Ours(compiled, pooled, self.cache, pooled)
        self.ways["pcg-base"] = Ours(self.ways["pcg-lora"].model, False, self.cache)

    def load(self, label: str, results: Results) -> None:
        """Other adapters, all of a rank or of mixed ones, one more than the pool has slots; while serving."""
        for name in self.ranks:
            self.pool.unload(name)
        self.label, self.folders, self.ranks = label, {}, {}
        ranks = MIXED if label == "mixed" else (int(label),)
        sizes: dict[str, int] = {}
        for i in range(self.pool.max_adapters + 1):
            name, rank = f"rank{label}-{i}", ranks[i % len(ranks)]
            self.folders[name] = self.folder / name
            sizes[name] = save_adapter(self.folders[name], self.plain, rank, i)
            self.ranks[name] = rank
        served, device, loads, reloads = self.ways["pcg-lora"], self.args.device, [], []
        self._serve(served, None)
        before = pcg.stats(served.model)
        for name, folder in self.folders.items():
            synchronize(device)
            started = time.perf_counter()
            self.pool.load(name, folder)
            synchronize(device)
            loads.append((time.perf_counter() - started, sizes[name]))
            self._serve(served, name)
        for _ in range(self.args.repeats):
            name = next(name for name in self.ranks if name not in self.pool.resident)
            synchronize(device)
            started = time.perf_counter()
            self.pool.pin(name)
            synchronize(device)
            reloads.append((time.perf_counter() - started, sizes[name]))
            self.pool.unpin(name)
            self._serve(served, name)
        after = pcg.stats(served.model)
        made = sum(getattr(after, key) - getattr(before, key) for key in ("captured", "compiled", "graphs"))
        peft_s = self._load_peft(results)
        results.add(
            what="load", ranks=label, adapters=len(loads), mib=round(statistics.median(sizes.values()) / 2**20, 3),
            load_ms=_median_ms(loads), load_gib_s=_gib_s(loads), reload_ms=_median_ms(reloads),
            reload_gib_s=_gib_s(reloads), peft_load_ms=round(1e3 * peft_s, 2) if peft_s else None,
            captured_before=before.captured, captured_after=after.captured, compiled_before=before.compiled,
            compiled_after=after.compiled, made=made,
        )  # fmt: skip
        if made:
            results.say(f"{made} captured graphs, compiled pieces or graphs were made while adapters were loaded")

    def _serve(self, way: Way, name: str | None) -> None:
        """One step in which all requests but a few have an adapter."""
        mix = self.mix(*self.traffic[0], 1)
        mix.adapters[:] = [name if one is not None else None for one in mix.adapters]
        with way.enter(mix) as call:
            call()

    def _load_peft(self, results: Results) -> float | None:
        """Makes the ways of PEFT, with the adapters that batches name; gives its seconds an adapter."""
        self.ways.pop("peft-lora", None)
        self.ways.pop("peft-base", None)
        folders = dict(list(self.folders.items())[: max(self.counts)])
        try:
            synchronize(self.args.device)
            started = time.perf_counter()
            model = load_peft(bare_copy(self.bare), folders)
            synchronize(self.args.device)
        except Exception as error:
            reason = "needs peft" if isinstance(error, ImportError) else one_line(error)
            results.say(f"PEFT is left out, and pcg compared with the uncompiled model: {reason}")
            return None
        self.ways["peft-lora"] = Theirs(model, True, self.histories)
        self.ways["peft-base"] = Theirs(model, False, self.histories)
        return (time.perf_counter() - started) / len(folders)

    def uncompiled(self, named: bool) -> Way:
        """The model with the pool as it is: what pcg is compared with where PEFT is not there."""
        return Ours(self.pooled, named, self.cache)


def _median_ms(times: Sequence[tuple[float, int]]) -> float:
    return round(1e3 * statistics.median(seconds for seconds, _ in times), 3)


def _gib_s(times: Sequence[tuple[float, int]]) -> float:
    return round(statistics.median(size / seconds for seconds, size in times) / 2**30, 3)
