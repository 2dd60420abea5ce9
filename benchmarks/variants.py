"""The ways of running a step that ``step`` compares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import pcg_compile as pcg
from pcg_compile.attention import AttentionShape
from pcg_compile.runtime.buckets import default_table

from .models import Lists, Llama, Shape, dtype_of, share

__all__ = [
    "Call",
    "Eager",
    "NotHere",
    "Pcg",
    "PcgFullGraph",
    "PcgInputs",
    "PcgSlice",
    "Variant",
    "World",
    "attention_of",
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

    def __post_init__(self) -> None:
        #: Of the cache at first, keys of all layers, then values.
        self.contents = [tensor.clone() for tensor in self.cache.flat_k + self.cache.flat_v]


def attention_of(shape: Shape, device: torch.device, backend: str = "auto") -> str:
    """The attention shape of all layers, as plans are keyed by it."""
    scale, heads, dtype = shape.head_dim**-0.5, (shape.heads, shape.kv_heads), dtype_of(device)
    return AttentionShape(*heads, shape.head_dim, None, None, scale, dtype, backend=backend).encode()


def bucket_of(n: int) -> int:
    """The bucket of pcg's default table."""
    return next(b for b in default_table(8192) if b >= n)


class Variant(ABC):
    """One way of running a step. ``about`` says what is timed."""

    about = ""
    #: Whether ``enter`` is a way that one would serve by, so its time is worth reporting.
    serves = True

    def __init__(self, world: World) -> None:
        self.world = world

    def build(self, example: Lists) -> None:  # noqa: B027 - nothing to compile is no error
        """Compiles, with a batch of the largest size as the example.

        Raises:
            NotHere: it cannot run on this machine.
        """

    def ready(self, examples: Sequence[Lists]) -> None:
        """Captures what the next size needs; the examples have that size."""
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

    def done(self) -> None:  # noqa: B027
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
    """The unmodified model through the backend; buckets of the sizes are captured by ``pcg.warmup``."""

    about = 'torch.compile(model, backend="pcg", options={"cudagraph_mode": "piecewise"})'
    cudagraph_mode = "piecewise"
    padding = "auto"

    def options(self) -> dict[str, Any]:
        return {"compiler": self.world.compiler, "cudagraph_mode": self.cudagraph_mode, "padding": self.padding}

    def compile(self) -> Any:
        return torch.compile(share(self.world.model, self.world.shape), backend="pcg", options=self.options())

    def build(self, example: Lists) -> None:
        compiled = self.compile()
        batch = example.batch()
        with pcg.step(batch, self.world.cache):
            pcg.warmup(compiled, example.ids, batch.positions, buckets=self.buckets(), progress=False)
        self.model = compiled

    def buckets(self) -> list[int]:
        """What is captured ahead of time."""
        return sorted({bucket_of(n) for n in self.world.sizes})

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
            return "; ".join(self.reasons) or "no captured graph was replayed"
        return None


class PcgSlice(Pcg):
    about = "pcg with padding='slice': attention sees the real tokens only"
    padding = "slice"


class PcgInputs(Pcg):
    about = '@pcg.piecewise(guards="inputs", cudagraph_mode="piecewise")'

    def compile(self) -> Any:
        model = share(self.world.model, self.world.shape)
        dynamic = {"ids": 0, "positions": 0}
        return pcg.piecewise(dynamic=dynamic, guards="inputs", **self.options())(model.forward)


class PcgFullGraph(Pcg):
    about = 'pcg with options={"cudagraph_mode": "full"}: one captured graph for a full CUDA graph'
    cudagraph_mode = "full"

    def ready(self, examples: Sequence[Lists]) -> None:
        super().ready(examples)
        if self.replays != 1:
            raise NotHere(self.remark() or f"{self.replays} captured graphs were replayed, not one")
