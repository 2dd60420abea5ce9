"""Random ragged batches for paged attention, and what they give in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

from pcg_compile.attention.base import AttentionCall, AttentionShape
from pcg_compile.attention.ragged import RaggedAttention, Tiling

#: Small tiles, so small batches have several, and few enough programs that keys are divided or not by chance.
SMALL = Tiling(16, 16, programs=4)

#: What attention can be asked for, one by one and in combinations that meet in models.
FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "not causal": {"causal": False},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "window on both sides": {"window": 5, "causal": False},
    "chunks": {"chunk": 16},
    "window in chunks": {"chunk": 24, "window": 9},
    "spans": {"spans": True},
    "spans beside a window": {"spans": True, "window": 6},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "sinks and a window": {"sinks": True, "window": 8},
    "alibi": {"slopes": True},
    "softcap, alibi, sinks, chunks": {"softcap": 5.0, "slopes": True, "sinks": True, "chunk": 32},
    "negative scale": {"scale": -0.3},
    "a scale of zero": {"scale": 0.0},
    "many heads a group": {"heads": 14, "kv_heads": 2},
    "three heads a group": {"heads": 6, "kv_heads": 2},
    "one head a group": {"heads": 3, "kv_heads": 3},
    "one key head": {"heads": 20, "kv_heads": 1},
    "head size 16": {"head_dim": 16},
    "head size 24": {"head_dim": 24},
    "head size 80": {"head_dim": 80},
    "head size 96": {"head_dim": 96},
    "head size 256": {"head_dim": 256, "kv_heads": 1, "heads": 2},
    "values of another size": {"head_dim": 48, "v_dim": 20},
    "pages of 1": {"page_size": 1},
    "pages of 3": {"page_size": 3},
    "pages of 16": {"page_size": 16},
    "pages of 64": {"page_size": 64},
    "fp8": {"kv_dtype": torch.float8_e4m3fn},
    "fp8, softcap, window": {"kv_dtype": torch.float8_e4m3fn, "softcap": 4.0, "window": 12},
    "two loops": {"tiling": Tiling(32, 16, programs=2, phases=True)},
    "two loops and a window": {"tiling": Tiling(32, 16, programs=2, phases=True), "window": 20},
    "two loops, not causal": {"tiling": Tiling(32, 16, programs=2, phases=True), "causal": False},
    "two loops and spans": {"tiling": Tiling(32, 16, programs=2, phases=True), "spans": True, "window": 9},
    "two loops and chunks": {"tiling": Tiling(64, 16, programs=2, phases=True), "chunk": 20, "sinks": True},
    "many parts": {"tiling": Tiling(16, 16, programs=64)},
}


@dataclass
class Case:
    """A batch: lengths, page lists in random order, q, k, v, and what a feature needs beside them."""

    qo_lens: list[int]
    kv_lens: list[int]
    tables: list[list[int]]
    page_size: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    mask: dict[str, Any]
    spans: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def random_case(
    seed: int, *, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, v_dim: int | None = None, page_size: int = 4,
    dtype: torch.dtype = torch.float32, kv_dtype: torch.dtype | None = None, scale: float | None = None,
    spans: bool = False, sinks: bool = False, slopes: bool = False, longest: int = 90, prompt: int = 40,
    device: str = "cpu",
    tiling: Tiling | None = None, **mask: Any,
) -> Case:  # fmt: skip
    """A batch of decode requests, prompts, and chunks of prompts, by chance; unwritten slots hold NaN."""
    chance, torch_seed = random.Random(seed), torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch_seed)

    requests = chance.randint(1, 5)
    qo_lens = [chance.choice([1, 1, 1, chance.randint(1, 6), chance.randint(1, prompt)]) for _ in range(requests)]
    kv_lens = [n + chance.choice([0, chance.randint(0, longest)]) for n in qo_lens]
    counts = [-(-n // page_size) for n in kv_lens]
    pages = list(range(1, sum(counts) + 3))
    chance.shuffle(pages)
    tables = [[pages.pop() for _ in range(count)] for count in counts]
    tokens, v_dim, num_pages = sum(qo_lens), v_dim or head_dim, sum(counts) + 3
    q = draw(tokens, heads, head_dim).to(dtype)
    k = torch.full((num_pages, page_size, kv_heads, head_dim), torch.nan, dtype=kv_dtype or dtype)
    v = torch.full((num_pages, page_size, kv_heads, v_dim), torch.nan, dtype=kv_dtype or dtype)
    for length, table in zip(kv_lens, tables, strict=True):
        for page in range(-(-length // page_size)):
            n = min(page_size, length - page * page_size)
            k[table[page], :n], v[table[page], :n] = draw(n, kv_heads, head_dim).to(k), draw(n, kv_heads, v_dim).to(v)
    case = Case(
        qo_lens, kv_lens, tables, page_size, q, k, v, head_dim**-0.5 if scale is None else scale, mask,
        extra={"tiling": tiling},
    )  # fmt: skip
    if spans:
        case.spans = _random_spans(chance, qo_lens, kv_lens)
    if sinks:
        case.sinks = draw(heads)
    if slopes:
        case.slopes = draw(heads).abs()
    if kv_dtype is not None:
        case.k_scales, case.v_scales = draw(kv_heads).abs() + 0.5, draw(kv_heads).abs() + 0.5
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            setattr(case, name, value.to(device))
    return case


def _random_spans(chance: random.Random, qo_lens: list[int], kv_lens: list[int]) -> torch.Tensor:
    """Blocks of new tokens that see each other, between tokens that do not."""
    rows: list[list[int]] = []
    for queries, keys in zip(qo_lens, kv_lens, strict=True):
        at = keys - queries
        while at < keys:
            end = min(keys, at + chance.randint(1, 9))
            together = chance.random() < 0.5
            rows += [[at, end - 1] if together else [p, p] for p in range(at, end)]
            at = end
    return torch.tensor(rows, dtype=torch.int32)


def expected(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """``[tokens, heads, v_dim]`` and the log-sum-exp ``[tokens, heads]``, one request at a time in float64."""
    mask, device = case.mask, case.q.device
    group, size, outs, lses, first = case.q.shape[1] // case.k.shape[2], case.page_size, [], [], 0
    for queries, keys, table in zip(case.qo_lens, case.kv_lens, case.tables, strict=True):
        key = torch.arange(keys, device=device)
        slots = torch.tensor(table, device=device)[key // size] * size + key % size
        k, v = case.k.flatten(0, 1).double()[slots], case.v.flatten(0, 1).double()[slots]
        if case.k_scales is not None and case.v_scales is not None:
            k, v = k * case.k_scales.double()[:, None], v * case.v_scales.double()[:, None]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        rows = slice(first, first + queries)
        at = torch.arange(keys - queries, keys, device=device)[:, None]
        scores = torch.einsum("qhd,khd->hqk", case.q[rows].double(), k) * case.scale
        if mask.get("softcap"):
            scores = mask["softcap"] * torch.tanh(scores / mask["softcap"])
        if case.slopes is not None:
            scores = scores + case.slopes.double()[:, None, None] * (key - at)
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
        if mask.get("causal", True):
            seen &= key <= at
        if mask.get("window"):
            seen &= (key - at).abs() < mask["window"]
        if mask.get("chunk"):
            seen &= key // mask["chunk"] == at // mask["chunk"]
        if case.spans is not None:
            seen |= (key >= case.spans[rows, :1]) & (key <= case.spans[rows, 1:])
        scores = scores.masked_fill(~seen, -torch.inf)
        total = scores
        if case.sinks is not None:
            total = torch.cat([scores, case.sinks.double()[:, None, None].expand(-1, queries, 1)], -1)
        lse = torch.logsumexp(total, -1)
        outs.append(torch.einsum("hqk,khd->qhd", torch.exp(scores - lse[..., None]), v))
        lses.append(lse.T)
        first += queries
    return torch.cat(outs), torch.cat(lses)


class Ragged:
    """The kernels for a case, with room for ``entries`` requests and ``rows`` rows."""

    def __init__(self, case: Case, rows: int, entries: int, tiling: Tiling = SMALL) -> None:
        heads, head_dim = case.q.shape[1:]
        device = case.q.device
        self.case, self.rows, self.entries = case, rows, entries
        shape = AttentionShape(
            heads, case.k.shape[2], head_dim, case.mask.get("window"), case.mask.get("softcap"), case.scale,
            case.q.dtype, case.mask.get("causal", True), case.mask.get("chunk"), case.v.shape[3],
        )  # fmt: skip
        tiling = case.extra.get("tiling") or tiling
        self.run = RaggedAttention(shape, case.page_size, tiling, device, case.spans is not None)
        self.schedule = self.run.new_schedule(self.run.most_items(rows, entries))
        # Nothing may depend on what memory held before.
        self.schedule.items.fill_(77), self.schedule.counters.fill_(5)
        self.workspace = torch.full((self.run.workspace_floats,), torch.nan, device=device)
        self.q = torch.zeros(rows, heads, head_dim, dtype=case.q.dtype, device=device)
        self.out = torch.full((rows, heads, case.v.shape[3]), torch.nan, dtype=case.q.dtype, device=device)
        self.lse = torch.full((rows, heads), torch.nan, device=device)

    def plan(self, case: Case) -> None:
        """Writes a batch's metadata to the device: padding is one more request on page 0, like its first token."""
        pad = self.rows - len(case.q)
        qo, kv, tables = [*case.qo_lens], [*case.kv_lens], [*case.tables]
        if pad:
            qo, kv, tables = [*qo, pad], [*kv, pad], [*tables, [0] * -(-pad // case.page_size)]
        unused = self.entries - len(qo)
        qo, kv, tables = qo + [0] * unused, kv + [0] * unused, tables + [[]] * unused
        ints = {"dtype": torch.int32, "device": case.q.device}
        self.qo_indptr = torch.tensor([0, *qo], **ints).cumsum(0, dtype=torch.int32)
        self.kv_indptr = torch.tensor([0, *map(len, tables)], **ints).cumsum(0, dtype=torch.int32)
        self.kv_lens = torch.tensor(kv, **ints)
        self.kv_indices = torch.tensor([page for table in tables for page in table], **ints)
        self.spans = None
        if case.spans is not None:
            own = torch.arange(pad, **ints)[:, None].expand(-1, 2)
            self.spans = torch.cat([case.spans, own])

    def call(self, keys: torch.Tensor, values: torch.Tensor) -> AttentionCall:
        """What attention reads and writes."""
        case = self.case
        return AttentionCall(self.q, keys, values, self.out, case.sinks, case.slopes, case.k_scales, case.v_scales)

    def __call__(self, times: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        case = self.case
        self.plan(case)
        self.q[: len(case.q)] = case.q
        keys, values = (t.clone() for t in (case.k, case.v))
        keys[0], values[0] = torch.zeros_like(keys[0]), torch.zeros_like(values[0])
        self.run.schedule(self.schedule, self.qo_indptr, self.kv_indptr, self.kv_lens, self.entries)
        for _ in range(times):
            self.run.attend(
                self.schedule, self.call(keys, values), self.kv_indices, self.workspace, self.spans, self.lse
            )
        return self.out, self.lse


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative to the norm of what is wanted; NaN where anything is NaN."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))
