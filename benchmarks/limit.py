"""What a full-graph CUDA graph takes, captured by hand: the limit of any scheme with the same kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import pcg_compile as pcg
from pcg_compile.step import require_step

from .compiled import Bound, Compiled, attending
from .models import PAGE_SIZE, Lists
from .variants import Call, NotHere, Variant, bucket_of
from .wrappers import Wrapper

__all__ = ["Breakable", "LimitBucket", "LimitExact"]


class Captured(Variant):
    """A capture of what ``compile`` compiled, made for each size, with static inputs."""

    def build(self, example: Lists) -> None:
        if self.world.device.type != "cuda":
            raise NotHere("needs CUDA")
        if "compile" not in self.world.built:
            raise NotHere("captures what the variant compile compiles: name it, too")
        compiled = self.world.built["compile"]
        assert isinstance(compiled, Compiled)
        self.compiled = compiled

    def rows(self, n: int) -> int:
        """Rows that the model sees."""
        return bucket_of(n)

    def inputs(self, rows: int) -> None:
        """Static inputs ``[rows]``."""
        ints = {"dtype": torch.int64, "device": self.world.device}
        self.ids, self.positions, self.slots = (torch.zeros(rows, **ints) for _ in range(3))

    def fill(self, lists: Lists, batch: pcg.Batch) -> None:
        """Copies a batch to the static inputs; the slots too."""
        tables = batch.tables(PAGE_SIZE)
        n = batch.num_tokens
        self.ids[:n].copy_(lists.ids)
        self.positions[:n].copy_(torch.from_numpy(tables.positions))
        assert tables.slots is not None
        self.slots[:n].copy_(torch.from_numpy(tables.slots))
        self.slots[n:].zero_()

    def record(self, call: Callable[[], torch.Tensor]) -> None:
        """Captures a call, after two that warm it up."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = call()

    def done(self) -> None:
        for name in ("graph", "result", "wrapper"):
            self.__dict__.pop(name, None)


class LimitExact(Captured):
    about = "one CUDA graph of the Inductor-compiled model and FlashInfer, at exactly n tokens: the replay alone"
    serves = False

    def build(self, example: Lists) -> None:
        super().build(example)
        if importlib.util.find_spec("flashinfer") is None:
            raise NotHere("needs FlashInfer")
        # It grows with heads, tiles and head size: 400 to 800 MB at 4,096 tokens.
        size = (1 << 30) if max(self.world.sizes) <= 1024 else (2 << 30)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.world.device)

    def rows(self, n: int) -> int:
        return n

    def request_slots(self, batch: pcg.Batch) -> int:
        """Requests that the captured graph is made for."""
        return batch.num_requests

    def ready(self, examples: Sequence[Lists]) -> None:
        batch = examples[0].batch()
        self.requests, rows = self.request_slots(batch), self.rows(batch.num_tokens)
        self.wrapper = Wrapper(self.world.cache, self.world.shape.heads, self.requests, self.workspace)
        self.inputs(rows)
        self.prepare(examples[0], batch)
        with torch.no_grad(), attending(self.wrapper.attend):
            self.record(lambda: self.compiled._call(self.ids, self.positions, self.slots))

    def prepare(self, lists: Lists, batch: pcg.Batch) -> None:
        """Brings a batch to the device and plans it."""
        self.fill(lists, batch)
        self.wrapper.plan(batch.padded(self.ids.numel(), PAGE_SIZE, self.requests))

    @contextmanager
    def enter(self, lists: Lists) -> Iterator[Call]:
        batch = lists.batch()
        self.prepare(lists, batch)
        graph, result = self.graph, self.result[: batch.num_tokens]

        def call() -> torch.Tensor:
            graph.replay()
            return result

        yield call


class LimitBucket(LimitExact):
    about = "the same graph at pcg's bucket, with up to 64 request slots: the replay alone"

    def rows(self, n: int) -> int:
        return bucket_of(n)

    def request_slots(self, batch: pcg.Batch) -> int:
        return max(batch.num_requests + 1, min(64, bucket_of(batch.num_tokens)))


class Breakable(Captured):
    about = "breakable-cuda-graphs on the Inductor-compiled model, attention bound by hand between its segments"

    def build(self, example: Lists) -> None:
        super().build(example)
        if importlib.util.find_spec("breakable_cuda_graphs") is None:
            raise NotHere("breakable-cuda-graphs is not installed (pip install breakable-cuda-graphs)")

    def ready(self, examples: Sequence[Lists]) -> None:
        self.captured = False
        self.inputs(self.rows(len(examples[0].ids)))
        with self.enter(examples[0]):
            self.record(lambda: self.compiled._call(self.ids, self.positions, self.slots))
        self.captured = True
        super().ready(examples)

    def record(self, call: Callable[[], torch.Tensor]) -> None:
        from breakable_cuda_graphs import BreakableCUDAGraph, breakable_graph

        for _ in range(2):
            call()
        torch.cuda.synchronize()
        self.graph = BreakableCUDAGraph()
        with breakable_graph(self.graph):
            self.result = call()

    @contextmanager
    def enter(self, lists: Lists) -> Iterator[Call]:
        from breakable_cuda_graphs import no_graph

        batch = lists.batch()
        with pcg.step(batch, self.world.cache):
            n, rows = batch.num_tokens, self.ids.numel()
            self.bound = Bound(self.world, require_step("a benchmark"), rows, True)
            positions = batch.positions
            self.slots.copy_(self.bound.slots)
            self.ids[:n].copy_(lists.ids)
            self.positions[:n].copy_(positions)
            if self.captured:
                graph, result = self.graph, self.result[:n]

                def call() -> torch.Tensor:
                    graph.replay()
                    return result

                yield call
                return

            # The captured graph keeps the function: it asks for the step's plan when it runs.
            run = no_graph(lambda q, k_cache, v_cache, out: self.bound.run(q, k_cache, v_cache, out))

            def attend(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, layer: int) -> torch.Tensor:
                out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
                run(q, k_cache, v_cache, out)
                return out

            with attending(attend):
                yield lambda: self.compiled._call(self.ids, self.positions, self.slots)[:n]
