"""Engines that capture one piece at one bucket: a CUDA graph, or a static replay on the CPU."""

from __future__ import annotations

import contextlib
import gc
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import PCGError
from ..memory.views import assign
from ..torch_compat.cuda import abandon_capture

__all__ = [
    "CapturedGraph", "CudaGraphs", "Engine", "StaticReplay", "capture_device", "engine_for", "first_line", "gc_frozen",
    "no_autocast_cache", "rng_unchanged", "undone",
]  # fmt: skip


@dataclass
class CapturedGraph:
    """One piece at one bucket: results at fixed addresses, and what computes them again from the static inputs."""

    outputs: list[torch.Tensor]
    replay: Callable[[], None]
    nbytes: int = 0


class Engine(ABC):
    """Captures pieces. ``capture`` also runs the piece once, so the step in which it happens goes on."""

    @abstractmethod
    def capture(
        self,
        run: Callable[[], Sequence[torch.Tensor]],
        place: Callable[[int, torch.Tensor], torch.Tensor],
        warm_up: Callable[[], None] | None,
        pool: Hashable = None,
        ready: Callable[[], None] = lambda: None,
    ) -> CapturedGraph:
        """Captures ``run``, which reads static inputs only.

        Args:
            run: the compiled piece with its static inputs bound.
            place: static memory for result ``i``, of its shape and strides.
            warm_up: runs the piece once without effects, where that has not happened yet.
            pool: captures with the same value reuse each other's freed memory. They must always be replayed in the
                order in which they were captured, see Note [pools].
            ready: called when the captured graph is made, before anything with a collective in it has run.
        """

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Around all captured graphs of one step, or of a whole warm-up."""
        yield

    def nbytes(self) -> int:
        """Bytes of the device that captured graphs hold, beside the static buffers that they read and write."""
        return 0

    def give_back(self) -> None:  # noqa: B027 - most engines keep nothing
        """Returns memory to the device that was needed for a time, and that torch keeps for later."""

    def release(self) -> None:  # noqa: B027 - most engines hold nothing
        """Frees what captured graphs hold of the device and of its communicators; they cannot be replayed any more."""


class StaticReplay(Engine):
    """The same address discipline on a CPU: a replay runs the piece again, and its results land in place."""

    def capture(
        self,
        run: Callable[[], Sequence[torch.Tensor]],
        place: Callable[[int, torch.Tensor], torch.Tensor],
        warm_up: Callable[[], None] | None,
        pool: Hashable = None,
        ready: Callable[[], None] = lambda: None,
    ) -> CapturedGraph:
        outputs: list[torch.Tensor] = []
        copies: list[int] = []
        results = run()
        for i, result in enumerate(results):
            target = place(i, result)
            if target is not result:
                assign(target, result)
                copies.append(i)
            outputs.append(target)
        ready()

        def replay() -> None:
            again = run()
            for i in copies:
                assign(outputs[i], again[i])

        size = sum(outputs[i].untyped_storage().nbytes() for i in copies)
        return CapturedGraph(outputs, replay, size)


@dataclass
class _Pool:
    """A memory pool, the captured graphs that live in it, and the bytes that it has taken for them.

    The graphs share its memory, so it comes back with the last of them and not before.
    """

    handle: Any
    graphs: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    nbytes: int = 0


class CudaGraphs(Engine):
    """CUDA graphs that share memory pools.

    Note [pools]. A capture's temporaries lie in memory that later captures may take for their results. That is
    right as long as all captures of a pool which one step replays were captured together, in the same order. Pieces
    that use the same dynamic sizes are: they share a key, so a bucket captures all of them or none. Pieces with other
    sizes are captured in other steps (a tail keyed by tokens and kept rows, say, beside layers keyed by tokens alone),
    and have a pool of their own. A step replays its pieces or its full CUDA graph, so these share a pool. The full
    graph leaves its results where the last piece has its own. Nobody holds that memory: the full graph's own values
    may lie there, until its results are copied in the end.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pools: dict[Hashable, _Pool] = {}
        self.stream = torch.cuda.Stream(device)

    def _pool(self, name: Hashable) -> _Pool:
        """The pool of a name; a new one where no captured graph is left, since torch frees such a pool for good."""
        pool = self.pools.get(name)
        if pool is None or not pool.graphs:
            pool = self.pools[name] = _Pool(torch.cuda.graph_pool_handle())
        return pool

    def capture(
        self,
        run: Callable[[], Sequence[torch.Tensor]],
        place: Callable[[int, torch.Tensor], torch.Tensor],
        warm_up: Callable[[], None] | None,
        pool: Hashable = None,
        ready: Callable[[], None] = lambda: None,
    ) -> CapturedGraph:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            if warm_up is not None:
                warm_up()
            # Behind the warm-up: what libraries keep for a new stream is not the captured graph's.
            before = _reserved(self.device)
            made = self._capture(run, pool)
            if made is None:
                # Nothing can be freed during a capture: what other pools have cached is returned before the second try.
                torch.cuda.empty_cache()
                before = _reserved(self.device)
                made = self._capture(run, pool, last=True)
                assert made is not None
        graph, outputs = made
        current.wait_stream(self.stream)
        ready()
        graph.replay()
        return CapturedGraph(outputs, graph.replay, _reserved(self.device) - before)

    def _capture(
        self, run: Callable[[], Sequence[torch.Tensor]], pool: Hashable, last: bool = False
    ) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]] | None:
        """One try; None where memory ran out and this is not the last one."""
        graph, shared = torch.cuda.CUDAGraph(), self._pool(pool)
        before = _reserved(self.device)
        try:
            # "thread_local": another thread's allocation must not break this capture.
            graph.capture_begin(pool=shared.handle, capture_error_mode="thread_local")
            outputs = list(run())
            graph.capture_end()
        except BaseException as error:
            # A pool that can be used again is: what this try has left in it is freed with the pool's last capture.
            if not abandon_capture(graph, shared.handle, self.device):
                self.pools.pop(pool, None)
            if last or not isinstance(error, torch.OutOfMemoryError):
                raise
            return None
        finally:
            shared.nbytes += max(0, _reserved(self.device) - before)
        shared.graphs.add(graph)
        return graph, outputs

    def nbytes(self) -> int:
        """Bytes of the pools that hold a graph."""
        return sum(pool.nbytes for pool in self.pools.values() if pool.graphs)

    def give_back(self) -> None:
        torch.cuda.empty_cache()

    def release(self) -> None:
        """Takes all graphs apart, whoever refers to them."""
        for pool in self.pools.values():
            for graph in list(pool.graphs):
                graph.reset()
            pool.graphs.clear()

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Collects garbage when all is captured, not in between: a collection walks all of a model's objects."""
        with gc_frozen():
            yield


@contextlib.contextmanager
def gc_frozen() -> Iterator[None]:
    """No garbage collection inside: it would slow the capture down, and may free CUDA memory in the middle of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def rng_unchanged(device: torch.device) -> Iterator[None]:
    """Random numbers drawn inside are drawn again behind it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def no_autocast_cache() -> Iterator[None]:
    """A cast weight in autocast's cache would be freed under a captured graph that reads it."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def first_line(error: Exception) -> str:
    """An error in one line: its type, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def undone(tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """A function that gives tensors back the values that they have now."""
    before = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)

    return restore


def _reserved(device: torch.device) -> int:
    """``torch.cuda.memory_reserved()``, which looks up a hundred other figures on the way."""
    return int(torch.cuda.memory_stats_as_nested_dict(device)["reserved_bytes"]["all"]["current"])


def capture_device(example_inputs: Sequence[Any]) -> torch.device:
    """CUDA where an input lies there, else the CPU.

    Raises:
        PCGError: inputs on two CUDA devices.
    """
    devices = {x.device for x in example_inputs if isinstance(x, torch.Tensor) and x.device.type == "cuda"}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise PCGError(
            f"the graph has inputs on several CUDA devices ({names})\n"
            "  A captured graph belongs to one device.\n"
            "  Compile the part on each device by itself, or move the inputs: tensor.to(model.device)"
        )
    return next(iter(devices), torch.device("cpu"))


def engine_for(device: torch.device) -> Engine:
    """The engine of a capture device."""
    return CudaGraphs(device) if device.type == "cuda" else StaticReplay()
