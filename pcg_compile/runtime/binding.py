"""A binding: the captured graphs and programs made for one set of addresses."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..fx.plan import Plan
from ..memory.buffers import FlatBuffers
from ..memory.ranges import FixedMemory
from ..torch_compat.cuda import unowned_alias
from .capture import CapturedGraph
from .full_graph import FullGraph
from .program import Body, Program
from .shared import Shared

__all__ = ["Binding"]

#: Programs kept for sizes that came up lately; one holds views and closures, no memory of its own.
_KEPT_STEPS = 512


@dataclass(eq=False)
class Binding:
    """Captured graphs read the memory at the addresses they were made with, so each set of addresses has its own."""

    shared: Shared
    #: Addresses of the inputs bound by address, each at its input's position.
    by_position: list[int]
    #: Identity of what comes from the step: captured graphs belong to a cache.
    step_key: Hashable
    buffers: FlatBuffers
    #: The compiled models that use it, weakly; more than one where models share their weights.
    callers: list[weakref.ref[Any]] = field(default_factory=list)
    captured_graphs: dict[tuple[int, tuple[int, ...]], CapturedGraph] = field(default_factory=dict)
    steps: OrderedDict[tuple[int, ...], Program] = field(default_factory=OrderedDict)
    placed: dict[tuple[Hashable, tuple[int, ...]], torch.Tensor] = field(default_factory=dict)
    #: Parameters and what else is read where it lies, by position: its addresses, which keep no memory.
    memory: dict[int, torch.Tensor] = field(default_factory=dict)
    #: Where all of these lie, once a step has compared them with its arguments; see Note [memory by range].
    fixed: FixedMemory | None = None
    #: Failed tries by (item, key): a captured graph is retried once.
    failures: dict[tuple[int, tuple[int, ...]], int] = field(default_factory=dict)
    #: How often ``memory_budget`` has made the newest bucket go together with those that it shares memory with.
    squeezed_out: dict[tuple[int, ...], int] = field(default_factory=dict)
    #: Buckets that were given up, with the reason.
    given_up: dict[tuple[int, ...], str] = field(default_factory=dict)
    #: Buckets that get no full CUDA graph, since it did not fit ``memory_budget``.
    piecewise: set[tuple[int, ...]] = field(default_factory=set)
    #: What programs of one bucket share, by bucket.
    bodies: dict[tuple[int, ...], Body] = field(default_factory=dict)
    #: Buckets that have captured graphs, all symbols' sizes each.
    buckets: set[tuple[int, ...]] = field(default_factory=set)
    #: Whole steps as one captured graph, by bucket.
    full_graphs: dict[tuple[int, ...], FullGraph] = field(default_factory=dict)

    #: The user's parameters and buffers, with the addresses that captured graphs read.
    parameters: list[tuple[weakref.ref[torch.Tensor], int]] = field(default_factory=list)
    #: The cache that captured graphs read.
    cache: weakref.ref[Any] | None = None
    #: Whether a parameter or the cache is gone.
    anchor_lost: bool = False

    def used_by(self, caller: object) -> bool:
        """Whether a compiled model has been served from it."""
        return any(ref() is caller for ref in self.callers)

    def stale(self) -> bool:
        """Whether no step can come back to these captured graphs: what they read is gone, or lies elsewhere now."""
        if self.anchor_lost:
            return True
        alive = ((parameter(), address) for parameter, address in self.parameters)
        return any(p is None or p.data_ptr() != address for p, address in alive)

    def place(
        self, node: Hashable, slot: Hashable, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Static memory for a value at one shape: always the same, since captured graphs remember it."""
        key = (node, shape)
        tensor = self.placed.get(key)
        if tensor is None:
            tensor = self.placed[key] = self.buffers.tensor(slot, shape, strides, dtype)
        return tensor

    def held(self, position: int, argument: torch.Tensor) -> torch.Tensor:
        """An argument's memory as a tensor of ours, which does not keep it: that is the caller's to free.

        It is read only in steps whose argument lies at the same address.
        """
        tensor = self.memory.get(position)
        if tensor is None:
            with torch.inference_mode(False), torch.no_grad():
                tensor = self.memory[position] = unowned_alias(argument)
        return tensor

    def program(self, sizes: tuple[int, ...]) -> Program | None:
        """The program of some sizes, or None."""
        program = self.steps.get(sizes)
        if program is not None:
            self.steps.move_to_end(sizes)
        return program

    def remember(self, sizes: tuple[int, ...], program: Program) -> None:
        """Keeps the program of some sizes; the longest unused go."""
        self.steps[sizes] = program
        if len(self.steps) > _KEPT_STEPS:
            self.steps.popitem(last=False)

    def nbytes(self) -> int:
        """Bytes of the static buffers, outgrown ones that captured graphs still use among them."""
        storages = [tensor.untyped_storage() for tensor in self.placed.values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def forget(self, bucket: tuple[int, ...] | None = None) -> None:
        """Drops the captured graphs and programs of one bucket (all symbols' sizes), or all of them."""
        if bucket is None:
            self.captured_graphs.clear()
            self.buckets.clear()
            self.steps.clear()
            self.full_graphs.clear()
            self.bodies.clear()
            self.placed.clear()
            self.memory.clear()
            self.buffers = FlatBuffers(self.shared.device)
            return
        self.buckets.discard(bucket)
        full_graph = self.full_graphs.pop(bucket, None)
        if full_graph is not None:
            full_graph.captured_graphs.clear()
        self.bodies.pop(bucket, None)
        stale = [sizes for sizes, step in self.steps.items() if step.bucket == bucket]
        for sizes in stale:
            del self.steps[sizes]
        used = {key for step in self.steps.values() for key in step.body.capture_keys}
        keys = {key for key in self.captured_graphs if key not in used and _within(key, bucket, self.shared.plan)}
        for key in keys:
            del self.captured_graphs[key]
        if not self.captured_graphs:
            # Nobody remembers an address any more.
            self.placed.clear()
            self.buffers = FlatBuffers(self.shared.device)


def _within(key: tuple[int, tuple[int, ...]], bucket: tuple[int, ...], plan: Plan) -> bool:
    item = plan.items[key[0]]
    sizes = dict(zip(plan.symbols, bucket, strict=True))
    return key[1] == tuple(sizes[s] for s in item.piece.symbols)  # type: ignore[union-attr]
