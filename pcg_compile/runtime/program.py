"""A program: everything one step runs, as a flat list of calls with all arguments bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from ..memory.views import unexpanded
from ..stats import Counters
from ..torch_compat.cuda import foreach_copy
from .full_graph import FullGraph
from .row_padding import PaddedLoad, StackedLoad

__all__ = ["Body", "Op", "Program"]

Op = Callable[[], Any]


@dataclass
class Program:
    """What a step of certain sizes runs.

    Attributes:
        bucket: the size of every symbol in the captured graphs, None where the step runs at its exact sizes.
        ops: replays and calls, in order.
        targets, sources: static memory for the inputs, and the arguments to copy there.
        late_inputs: (frame slot, argument) of inputs that are read where they lie.
        frame: results of calls that nothing static holds, emptied after the step.
        emit: makes the outputs.
        replays: captured graphs that a step replays.
    """

    bucket: tuple[int, ...] | None
    counters: Counters
    ops: list[Op] = field(default_factory=list)
    #: For each op the index of the item that it belongs to, for reports.
    op_items: list[int] = field(default_factory=list)
    #: What is done to the copied inputs before anything reads them.
    prologue: list[Op] = field(default_factory=list)
    #: The same step as one captured graph, or None.
    full_graph: FullGraph | None = None
    #: Has ranks agree, ahead of the first collective.
    confirm: Op | None = None
    targets: list[torch.Tensor] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    #: (static memory, argument, dimensions) of arguments that are expanded: the first entries along those.
    expanded: list[tuple[torch.Tensor, int, list[int]]] = field(default_factory=list)
    #: Loads of arguments with padding behind their rows.
    padded: list[PaddedLoad | StackedLoad] = field(default_factory=list)
    late_inputs: list[tuple[int, int]] = field(default_factory=list)
    frame: list[Any] = field(default_factory=list)
    #: Sizes, and sizes that only the data tell, as the step goes on.
    sizes: dict[sympy.Symbol, int] = field(default_factory=dict)
    emit: Callable[[Sequence[Any]], Any] = lambda args: ()
    replays: int = 0
    capture_keys: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    #: Fallbacks to count at each step: (reason, where). The first ``bucket_fallbacks`` are of every program of the
    #: bucket, whatever its real sizes.
    fallbacks: list[tuple[str, str]] = field(default_factory=list)
    bucket_fallbacks: int = 0
    #: ``fn(args, wait)``: whether a padding request covers the padding of a call, or None where nothing asks.
    covered: Callable[[Sequence[Any], bool], bool] | None = None
    #: Addresses of arguments that were found disjoint from what the graph writes; see Note [memory by range].
    apart: set[tuple[int, ...]] = field(default_factory=set)
    #: Whether the program can serve again; not after a failed captured graph.
    complete: bool = True
    #: Whether the next step of the same sizes is to be built anew.
    provisional: bool = False

    def fall_back_with_bucket(self, reason: str, where: str) -> None:
        """Counts a fallback, once a step whatever the number of places, that all programs of the bucket share."""
        if all(reason != known for known, _ in self.fallbacks):
            self.fallbacks.insert(self.bucket_fallbacks, (reason, where))
            self.bucket_fallbacks += 1

    def load(self, args: Sequence[Any]) -> None:
        """Puts the arguments where the program reads them."""
        if self.targets:
            foreach_copy(self.targets, [args[i] for i in self.sources])
        for target, position, dims in self.expanded:
            target.copy_(unexpanded(args[position], dims))
        for load in self.padded:
            load.run(args)
        for slot, position in self.late_inputs:
            self.frame[slot] = args[position]

    def start(self, args: Sequence[Any]) -> None:
        """Puts the arguments in place, as the pieces expect them."""
        self.load(args)
        for op in self.prologue:
            op()

    def run_pieces(self) -> None:
        """Replays and calls, in order."""
        for op in self.ops:
            op()
        self.counters.replays += self.replays

    def run(self, args: Sequence[Any]) -> Any:
        """One step."""
        self.start(args)
        try:
            if self.confirm is not None and self.full_graph is not None and self.full_graph.wanted:
                self.confirm()
            if self.full_graph is None or not self.full_graph.wanted or not self.full_graph.run():
                self.run_pieces()
            return self.emit(args)
        finally:
            if self.frame:
                self.frame[:] = [None] * len(self.frame)


@dataclass(frozen=True)
class Body:
    """What the programs of a bucket have in common, where everything runs at the bucket's size."""

    static: dict[fx.Node, torch.Tensor]
    ops: list[Op]
    op_items: list[int]
    replays: int
    capture_keys: list[tuple[int, tuple[int, ...]]]
    full_graph: FullGraph | None
    fallbacks: list[tuple[str, str]]
