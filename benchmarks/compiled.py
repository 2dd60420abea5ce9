"""Variants that Inductor compiles whole, attention bound by hand: the best of what others offer without pcg."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.experimental._config

import pcg_compile as pcg
from pcg_compile.attention.base import AttentionCall
from pcg_compile.step import require_step
from pcg_compile.step_state import StepState

from .models import ATTEND, PAGE_SIZE, Attend, Lists, share
from .variants import Call, NotHere, Variant, World, attention_of, bucket_of
from .wrappers import Wrapper, pages

__all__ = ["Bound", "Compiled", "Partition", "ReduceOverhead", "attending"]


class Bound:
    """Attention of one step, bound by hand: what ``bench::attend`` calls. FlashInfer where it is installed."""

    def __init__(self, world: World, state: StepState, rows: int, padded: bool) -> None:
        there = world.device.type == "cuda" and importlib.util.find_spec("flashinfer") is not None
        text = attention_of(world.shape, world.device, "flashinfer" if there else "auto")
        self.cache = world.cache
        self.slots = state.prepare(rows, "request" if padded else "slice", [text]).slots
        self.impl, self.plan = state.plan(text, rows)

    def attend(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, layer: int) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.run(q, k_cache, v_cache, out)
        return out

    def run(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor) -> None:
        self.impl.run(AttentionCall(q, pages(k_cache), pages(v_cache), out), self.plan)


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """``bench::attend`` calls ``attend`` inside."""
    token = ATTEND.set(attend)
    try:
        yield
    finally:
        ATTEND.reset(token)


class Compiled(Variant):
    """Inductor, one graph for all sizes; the limit and breakable graphs capture what it compiled."""

    about = "torch.compile, dynamic sizes; attention bound by hand, its metadata from pcg's planner"
    mode: dict[str, Any] = {}
    padded = False
    #: Whether the model was called: its graph serves all sizes then.
    compiled = False

    def build(self, example: Lists) -> None:
        if self.world.compiler == "eager":
            raise NotHere("needs Inductor: leave out --tiny, or pass --compiler inductor")
        self.start()
        for _ in range(2):
            with self.enter(example) as call:
                call()

    def start(self) -> None:
        """What is called; nothing is compiled yet."""
        model = share(self.world.model, self.world.shape, self.world.cache)
        self.model, self.compiled = torch.compile(model, **self.options()), False

    def options(self) -> dict[str, Any]:
        return dict(self.mode)

    def rows(self, n: int) -> int:
        """Rows that the model sees."""
        return bucket_of(n) if self.padded else n

    def attender(self, bound: Bound, lists: Lists) -> Attend:
        return bound.attend

    def inputs(self, lists: Lists, positions: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and positions ``[rows]``, padded by the caller with zeros."""
        if rows == positions.numel():
            return lists.ids, positions
        padded = torch.zeros(2, rows, dtype=torch.int64, device=positions.device)
        padded[0, : lists.ids.numel()].copy_(lists.ids)
        padded[1, : lists.ids.numel()].copy_(positions)
        return padded[0], padded[1]

    @contextmanager
    def enter(self, lists: Lists) -> Iterator[Call]:
        batch = lists.batch()
        with pcg.step(batch, self.world.cache):
            n = batch.num_tokens
            rows = self.rows(n)
            bound = Bound(self.world, require_step("a benchmark"), rows, self.padded)
            ids, positions = self.inputs(lists, batch.positions, rows)
            with attending(self.attender(bound, lists)):
                yield lambda: self._call(ids, positions, bound.slots[:rows])[:n]

    def _call(self, *tensors: torch.Tensor) -> torch.Tensor:
        if self.compiled:
            return self.model(*tensors)  # type: ignore[no-any-return]
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
        # A graph for all sizes, 1 included, as @pcg.piecewise has it.
        with torch.fx.experimental._config.patch(backed_size_oblivious=True):
            result: torch.Tensor = self.model(*tensors)
        self.compiled = True
        return result


class ReduceOverhead(Compiled):
    """What one gets who is not told that attention holds a plan."""

    about = 'torch.compile(mode="reduce-overhead"), attention op not excluded, FlashInfer planned as its manual says'
    mode = {"mode": "reduce-overhead"}

    def build(self, example: Lists) -> None:
        if self.world.device.type != "cuda":
            raise NotHere("needs CUDA")
        if importlib.util.find_spec("flashinfer") is not None:
            self.wrapper: Wrapper | None = Wrapper(self.world.cache, self.world.shape.heads)
        else:
            self.wrapper = None
        super().build(example)

    def attender(self, bound: Bound, lists: Lists) -> Attend:
        if self.wrapper is None:
            return bound.attend
        batch = lists.batch()
        self.wrapper.plan(batch.padded(batch.num_tokens, PAGE_SIZE))
        return self.wrapper.attend

    def _call(self, *tensors: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return super()._call(*tensors)


class Partition(Compiled):
    about = "Inductor's graph_partition at the attention op, cudagraph_capture_sizes, padding by the caller"
    padded = True

    def options(self) -> dict[str, Any]:
        buckets = tuple(sorted({bucket_of(n) for n in self.world.sizes}))
        options = {
            "triton.cudagraphs": True,
            "graph_partition": True,
            "custom_should_partition_ops": ["bench::attend"],
            "triton.cudagraph_capture_sizes": buckets,
        }
        known = torch._inductor.config.get_config_copy()
        missing = [name for name in options if name not in known]
        if missing:
            raise NotHere(f"torch {torch.__version__} has no Inductor option {', '.join(missing)}")
        return {"options": options}

    def build(self, example: Lists) -> None:
        if self.world.device.type != "cuda":
            raise NotHere("needs CUDA")
        super().build(example)

    def _call(self, *tensors: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return super()._call(*tensors)
