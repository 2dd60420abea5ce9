"""Programs: what a step of certain sizes runs, as a flat list of typed operations. ``print(program)`` lists them.

A step calls the operations in order (:meth:`Program.run`); all that changes from step to step reaches them through the
program's :class:`Frame`. A full CUDA graph takes the place of everything between the inputs and the outputs: such a
step loads, replays once and emits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import sympy
import torch
from torch import fx
from torch.profiler import record_function

from ..counters import Counters
from ..fx.plan import Item
from ..step_state import DoesNotFit
from ..torch_compat.profiling import profiler_records
from .full_graph import FullGraph

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Body", "Call", "Confirm", "CopyRows", "Emit", "Frame", "Free", "Kind", "Load", "LookUpRows", "Operation",
    "PadInput", "PrepareMetadata", "Program", "RepeatRowZero", "Replay", "RunPiece", "RunSplitOp", "size_name",
]  # fmt: skip

Call = Callable[[], Any]
Check = Callable[[Sequence[Any]], Any]
Kind = Literal["inputs", "replay", "piece", "split op", "metadata", "outputs"]


def size_name(sizes: Sequence[int]) -> str:
    """Sizes as traces name them: "7", "16x2", "fixed size" where none is dynamic."""
    return "x".join(map(str, sizes)) or "fixed size"


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of a program.

    Attributes:
        call: does it, with everything bound; what a step calls.
        name: of the piece, split op or tensors. module: the path of the module it stands in. where: the user's line.
        index: of the item of the plan that it belongs to; -1 for what belongs to none.
    """

    call: Call
    name: str = ""
    module: str = ""
    where: str = ""
    index: int = -1
    kind: ClassVar[Kind] = "piece"

    @classmethod
    def of(cls, item: Item, call: Call) -> Self:
        """An operation that an item of the plan needs."""
        return cls(call, item.name, item.module, item.where, item.index)

    def __str__(self) -> str:
        parts = (f"{type(self).__name__:15}", f"{self.name:24}", self.module, self.where)
        return "  ".join(part for part in parts if part).rstrip()


class Load(Operation):
    """Puts arguments where the program reads them, padded to the bucket."""

    kind: ClassVar[Kind] = "inputs"


class PadInput(Operation):
    """Fills the padding of an input that must not repeat row 0: slots, and masks that are summed over."""

    kind: ClassVar[Kind] = "inputs"


class LookUpRows(Operation):
    """Looks row indices up at the real size: negative ones and those out of range are what they are in eager."""

    kind: ClassVar[Kind] = "inputs"


class Confirm(Operation):
    """Waits for the other ranks to agree on the sizes, ahead of the first collective."""

    kind: ClassVar[Kind] = "metadata"


class Replay(Operation):
    """Replays a captured graph."""

    kind: ClassVar[Kind] = "replay"


class RunPiece(Operation):
    """Runs a piece that has no captured graph."""


class RunSplitOp(Operation):
    """Runs a split op."""

    kind: ClassVar[Kind] = "split op"


class PrepareMetadata(Operation):
    """Pads or prepares a step's metadata."""

    kind: ClassVar[Kind] = "metadata"


class CopyRows(Operation):
    """Copies real rows to memory laid out as eager's, or back."""


class RepeatRowZero(Operation):
    """Pads what was written between captured graphs."""


class Free(Operation):
    """Lets go of values after their last reader."""


class Emit(Operation):
    """Makes the outputs, copied out of static memory."""

    kind: ClassVar[Kind] = "outputs"


@dataclass(eq=False)
class Frame:
    """What a running program hands from operation to operation.

    Attributes:
        sizes: of the step, with those that only the data tell.
        args: the call's arguments. values: what nothing static holds.
    """

    sizes: dict[sympy.Symbol, int]
    args: Sequence[Any] = ()
    values: list[Any] = field(default_factory=list)

    def clear(self, args: Sequence[Any] = ()) -> None:
        """Lets go of all values; ``args`` are those of the step that goes on."""
        self.args = args
        if self.values:
            self.values[:] = [None] * len(self.values)


Fallbacks = tuple[tuple[str, str], ...]


@dataclass(eq=False)
class Body:
    """What lies between inputs and outputs; programs of a bucket share it where nothing in it depends on real sizes.

    Attributes:
        operations: in order. calls: theirs.
        capture_keys: (item, sizes) of the captured graphs among them. replays: their number.
        static: values that lie in static memory.
        full_graph: the same operations as one captured graph, or None.
        fallbacks: (reason, where) to count at each step.
    """

    operations: tuple[Operation, ...]
    capture_keys: tuple[tuple[int, tuple[int, ...]], ...] = ()
    static: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    full_graph: FullGraph | None = None
    fallbacks: Fallbacks = ()

    def __post_init__(self) -> None:
        self.calls: Sequence[Call] = tuple(op.call for op in self.operations)
        self.replays = len(self.capture_keys)


@dataclass(eq=False)
class Program:
    """What a step of certain sizes runs.

    Attributes:
        bucket: the size of every symbol in the captured graphs, None where the step runs at its exact sizes.
        loads, body, emit: its operations.
        fallbacks: (reason, where) to count at each step, the body's among them.
        covered: ``fn(args, wait)``: whether a padding request covers a call's padding; None where nothing asks.
        complete: whether it can serve again; not after a capture that failed.
        provisional: whether the next step of the same sizes is built again.
        apart: addresses of arguments that were found disjoint from what the graph writes; see Note [memory by range].
    """

    sizes: tuple[int, ...]
    bucket: tuple[int, ...] | None
    counters: Counters
    frame: Frame
    loads: tuple[Operation, ...]
    body: Body
    emit: Operation
    fallbacks: Fallbacks = ()
    covered: Callable[[Sequence[Any], bool], bool] | None = None
    complete: bool = True
    provisional: bool = False
    apart: set[tuple[int, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._load_calls = tuple(op.call for op in self.loads)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """All of them, in order; piece by piece, where there is a full CUDA graph too."""
        return (*self.loads, *self.body.operations, self.emit)

    def operations_of_step(self) -> tuple[Operation, ...]:
        """Those of the running step: with one replay, where its batch has a full CUDA graph by now."""
        full_graph = self.body.full_graph
        if full_graph is not None and full_graph.wanted:
            try:
                captured = full_graph.captured_graphs.get(full_graph.prepare())
            except DoesNotFit:
                captured = None
            if captured is not None:
                prepare = PrepareMetadata(full_graph.prepare, "the step's metadata")
                return (*self.loads, prepare, Replay(captured.replay, "full CUDA graph"), self.emit)
        return self.operations

    @property
    def replays(self) -> int:
        """Captured graphs that a step replays, piece by piece."""
        return self.body.replays

    def __str__(self) -> str:
        full = self.body.full_graph is not None and self.body.full_graph.wanted
        where = "at its exact size" if self.bucket is None else f"in bucket {self.bucket}"
        lines = [f"program of sizes {self.sizes} {where}: {self.replays} replays"]
        lines += [f"{i:4d}  {op}" for i, op in enumerate(self.operations)]
        if full:
            between = f"{len(self.loads)} to {len(self.operations) - 2}"
            lines.append(f"{between}: one Replay of the full CUDA graph, where the batch fits")
        return "\n".join(lines)

    def load(self, args: Sequence[Any]) -> None:
        """Puts the arguments in place, as the pieces expect them."""
        self.frame.args = args
        for call in self._load_calls:
            call()

    def run_body(self) -> None:
        """Runs piece by piece what lies between inputs and outputs."""
        for call in self._calls_in_ranges() if profiler_records() else self.body.calls:
            call()
        self.counters.replays += self.body.replays

    def _calls_in_ranges(self) -> Iterator[Call]:
        """The body's calls, each to be called inside a range of ``torch.profiler``; NVTX has it under ``emit_nvtx``."""
        for op in self.body.operations:
            if isinstance(op, (Replay, RunPiece, RunSplitOp, PrepareMetadata)):
                module = f" ({op.module})" if op.module else ""
                with record_function(f"pcg {op.kind}: {op.name}{module}"):
                    yield op.call
            else:
                yield op.call

    def run_in_range(self, args: Sequence[Any], check: Check | None = None) -> Any:
        """The same as :meth:`run`, in one range of ``torch.profiler``."""
        full = ", full CUDA graph" if self.body.full_graph is not None and self.body.full_graph.wanted else ""
        bucket = "at its exact size" if self.bucket is None else f"in bucket {size_name(self.bucket)}"
        with record_function(f"pcg step: {size_name(self.sizes)} {bucket}{full}"):
            return self.run(args, check)

    def run(self, args: Sequence[Any], check: Check | None = None) -> Any:
        """One step; returns its outputs.

        Args:
            check: called with the arguments once their loads are launched. Gives all arguments of the graph, or None:
                the program is not right for this call. Then nothing else runs, and None is returned.
        """
        frame, full_graph = self.frame, self.body.full_graph
        # A split op may call its own graph, and thereby this program.
        before, frame.args = frame.args, args
        try:
            for call in self._load_calls:
                call()
            if check is not None:
                frame.args = check(args)
                if frame.args is None:
                    return None
            if full_graph is None or not full_graph.wanted or not full_graph.run():
                self.run_body()
            return self.emit.call()
        finally:
            frame.clear(before)
