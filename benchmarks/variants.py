"""The ways of running a step that ``step`` compares."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import pcg_compile as pcg
from pcg_compile.attention import AttentionShape
from pcg_compile.runtime.buckets import default_table
from pcg_compile.step import StepState, require_step
from pcg_compile.torch_internals import compile_for_all_sizes, mark_dynamic

from .models import ATTEND, PAGE_SIZE, Attend, Lists, Llama, Shape, dtype_of, share
from .wrappers import Wrapper, pages

__all__ = [
    "Bound",
    "Call",
    "Compiled",
    "Eager",
    "NotHere",
    "Partition",
    "Pcg",
    "PcgInputs",
    "PcgSlice",
    "PcgWhole",
    "ReduceOverhead",
    "Variant",
    "World",
    "attending",
    "bucket_of",
]

Call = Callable[[], torch.Tensor]


class NotHere(Exception):
    """Why a variant does not run here."""


@dataclass
class World:
    """What all variants share: weights, one cache, the sizes that will be run."""

    shape: Shape
    model: Llama
    cache: pcg.PagedKVCache
    device: torch.device
    compiler: str
    sizes: Sequence[int]
    built: dict[str, Variant] = field(default_factory=dict)

    def attention(self) -> str:
        """The attention shape of all layers, as plans are keyed by it."""
        shape = self.shape
        return AttentionShape(
            shape.heads, shape.kv_heads, shape.head_dim, None, None, shape.head_dim**-0.5, dtype_of(self.device)
        ).encode()


def bucket_of(n: int) -> int:
    """The bucket of pcg's default table."""
    return next(b for b in default_table(8192) if b >= n)


class Variant(ABC):
    """One way of running a step. ``about`` says what is timed."""

    about = ""
    #: Whether ``enter`` is a way that one would serve by, so that its time is worth reporting.
    serves = True

    def __init__(self, world: World) -> None:
        self.world = world

    def build(self, example: Lists) -> None:
        """Compiles, with a batch of the largest size as the example.

        Raises:
            NotHere: it cannot run on this machine.
        """

    def ready(self, examples: Sequence[Lists]) -> None:
        """Records what the next size needs; the examples have that size."""
        for lists in examples[:1]:
            for _ in range(3):
                with self.enter(lists) as call:
                    call()

    @abstractmethod
    def enter(self, lists: Lists) -> Any:
        """A context that prepares a step from host lists, and gives the call that runs the model."""

    def remark(self) -> str | None:
        """How the last size ran, where that is not as asked for."""
        return None

    def done(self) -> None:
        """Lets go of what only this size needs."""


class Eager(Variant):
    about = "the model as it is"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.model: Callable[..., torch.Tensor] = world.model

    @contextmanager
    def enter(self, lists: Lists) -> Iterator[Call]:
        batch = lists.batch()
        with pcg.step(batch, self.world.cache):
            positions = batch.positions
            yield lambda: self.model(lists.ids, positions)


class Pcg(Eager):
    """The unmodified model through the backend; buckets of the sizes are recorded by ``pcg.warmup``."""

    about = 'torch.compile(model, backend="pcg", options={"attention": "eager"})'
    attention = "eager"
    padding = "auto"

    def options(self) -> dict[str, Any]:
        return {"compiler": self.world.compiler, "attention": self.attention, "padding": self.padding}

    def compile(self) -> Any:
        return torch.compile(share(self.world.model, self.world.shape), backend="pcg", options=self.options())

    def build(self, example: Lists) -> None:
        compiled = self.compile()
        buckets = sorted({bucket_of(n) for n in self.world.sizes})
        batch = example.batch()
        with pcg.step(batch, self.world.cache):
            pcg.warmup(compiled, example.ids, batch.positions, buckets=buckets, progress=False)
        self.model = compiled

    def ready(self, examples: Sequence[Lists]) -> None:
        super().ready(examples)
        before = pcg.stats(self.model)
        with self.enter(examples[0]) as call:
            call()
        after = pcg.stats(self.model)
        self.replays = after.replays - before.replays
        self.reasons = [f.reason for f in after.fallbacks if f not in before.fallbacks]

    def remark(self) -> str | None:
        if self.reasons or not self.replays:
            return "; ".join(self.reasons) or "no recording was replayed"
        return None


class PcgSlice(Pcg):
    about = "pcg with padding='slice': attention sees the real tokens only"
    padding = "slice"


class PcgInputs(Pcg):
    about = '@pcg.piecewise(guards="inputs", attention="eager")'

    def compile(self) -> Any:
        model = share(self.world.model, self.world.shape)
        dynamic = {"ids": 0, "positions": 0}
        return pcg.piecewise(dynamic=dynamic, guards="inputs", **self.options())(model.forward)


class PcgWhole(Pcg):
    about = 'pcg with options={"attention": "captured"}: one recording for a whole step'
    attention = "captured"

    def ready(self, examples: Sequence[Lists]) -> None:
        super().ready(examples)
        if self.replays != 1:
            raise NotHere(self.remark() or f"{self.replays} recordings were replayed, not one")


class Bound:
    """Attention of one step, bound by hand with pcg's planner: what ``bench::attend`` calls."""

    def __init__(self, world: World, state: StepState, rows: int, padded: bool) -> None:
        text = world.attention()
        self.cache, self.impl = world.cache, world.cache.impl(text)
        self.slots = state.prepare(rows, "request" if padded else "slice", [text]).slots
        self.plan = state.plan(text, rows)

    def attend(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, layer: int) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.run(q, k_cache, v_cache, out)
        return out

    def run(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor) -> None:
        self.impl.bind(q, pages(k_cache), pages(v_cache), out)(self.plan)


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """``bench::attend`` calls ``attend`` inside."""
    token = ATTEND.set(attend)
    try:
        yield
    finally:
        ATTEND.reset(token)


class Compiled(Variant):
    """Inductor, one graph for all sizes; the limit and breakable graphs record what it compiled."""

    about = "torch.compile, dynamic sizes; attention bound by hand, its metadata from pcg's planner"
    mode: dict[str, Any] = {}
    padded = False

    def build(self, example: Lists) -> None:
        if self.world.compiler == "eager":
            raise NotHere("needs Inductor: leave out --tiny, or pass --compiler inductor")
        options = self.options()
        self.model = torch.compile(share(self.world.model, self.world.shape, self.world.cache), **options)
        for _ in range(2):
            with self.enter(example) as call:
                call()

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
        with compile_for_all_sizes(lambda: [mark_dynamic(t, [0]) for t in tensors]):
            return self.model(*tensors)


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
