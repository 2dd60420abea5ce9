"""The plan of a graph: its inputs, its pieces and split ops in order, and everything else that no bucket changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import sympy
import torch
from torch import fx

from ..passes.context import StepInput
from ..split_ops import SplitOp
from .contexts import Autocast
from .facts import NodeFacts
from .request_conditions import Request
from .sizes import symbols_of
from .strides import Layouts
from .submodules import Compiled, Piece

__all__ = ["NOT_YET", "InputSpec", "Item", "PieceItem", "Plan", "SplitOpItem"]


def _not_compiled(*args: Any) -> Any:
    raise AssertionError("a piece of a plan runs before it was compiled")


#: What a piece of a plan is before it is compiled.
NOT_YET = Compiled(_not_compiled)


@dataclass(frozen=True)
class InputSpec:
    """One placeholder: a size, a number, a static tensor (parameter, buffer), a user's one, or one from the step."""

    node: fx.Node
    kind: Literal["size", "number", "static", "bound", "user", "step"]
    value: Any
    #: Position among the arguments of the call; -1 for what comes from the step.
    position: int
    step: StepInput | None = None
    #: What padding rows must hold (a slot that nobody owns), or None.
    pad_value: int | None = None


@dataclass
class PieceItem:
    """A piece in its place."""

    piece: Piece
    index: int
    compiled: Compiled
    where: str
    #: The path of the module that it begins in, and what reports call it.
    module: str = ""
    name: str = ""
    #: "trivial" items launch no kernel: they are made once and neither captured nor counted.
    trivial: bool = False
    #: Views and uninitialized memory alone: once made, there is nothing to do in a step.
    idle: bool = False
    #: None where the piece may be captured, else why not.
    refusal: str | None = None
    safety: Any = None
    #: True where a result shares memory with something that is written later: a copy of it would go stale.
    shares_written: bool = False
    #: True where only a probe can tell whether padding matters; what the probe found, once it ran.
    needs_probe: bool = False
    probed: str | None = None
    #: The buckets (of the piece's symbols) at which it was probed.
    probed_at: set[tuple[int, ...]] = field(default_factory=set)
    #: How often the probe could not tell.
    no_verdicts: int = 0
    #: Why this is a split op after all, compiled on its own (its eager form would be a dense fallback), or None.
    split_reason: str | None = None

    @property
    def is_piece(self) -> bool:
        """Whether it counts as a piece."""
        return not self.trivial and self.split_reason is None

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes whose tensors it makes for others."""
        return self.piece.outputs

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The nodes whose tensors it reads."""
        return self.piece.inputs


@dataclass
class SplitOpItem:
    """A split op in its place."""

    node: fx.Node
    index: int
    op: SplitOp
    reason: str
    where: str
    mode: Literal["request", "slice"]
    outputs: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    #: Argument nodes whose tensors the op writes.
    writes: tuple[fx.Node, ...]
    autocast: Autocast
    module: str = ""
    #: True where no captured graph can hold it, so each step counts it as a fallback.
    counted: bool = False
    #: Of an op in request mode that is given its metadata: what must hold of a step. Where it does not, it gets slices.
    request: Request | None = None

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.op.name

    @property
    def function(self) -> Callable[..., Any]:
        """What it calls, under the autocast regions that it stands in."""
        target: Any = self.node.target
        function = self.op.function
        if function is None and self.node.op == "call_method":
            function = lambda self, *args, **kwargs: getattr(self, str(target))(*args, **kwargs)
        return self.in_autocast(function if function is not None else target)

    def in_autocast(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call under those regions."""
        regions = self.autocast

        def run(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                for device, dtype, enabled, cache in regions:
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
                return call(*args, **kwargs)

        return run if regions else call

    def path_of(self, output: fx.Node) -> tuple[int, ...]:
        """The indices that lead from what it gives to one of its outputs."""
        path: list[int] = []
        while output is not self.node:
            path.insert(0, output.args[1])  # type: ignore[arg-type]
            output = output.args[0]  # type: ignore[assignment]
        return tuple(path)


Item = PieceItem | SplitOpItem


@dataclass
class Plan:
    """Everything about a graph that does not depend on a bucket."""

    gm: fx.GraphModule
    facts: Mapping[fx.Node, NodeFacts]
    inputs: tuple[InputSpec, ...]
    items: list[Item]
    outputs: Any
    symbols: tuple[sympy.Symbol, ...]
    #: How to read each symbol from the arguments: (position, dim), dim -1 for an int.
    sizes: tuple[tuple[int, int], ...]
    #: The capture device: nothing on another one is static.
    device: torch.device
    #: Symbols that are a dimension of some input, so padding can change them. A stride is none.
    dims: frozenset[sympy.Symbol]
    #: Strides and offsets of inputs that are symbols of their own.
    layouts: Layouts
    #: Why no step of this graph can use captured graphs, or None.
    refusal: str | None = None
    #: Why every step runs Dynamo's own graph eagerly, or None.
    eager: str | None = None
    mutated: frozenset[fx.Node] = field(default_factory=frozenset)
    slots: dict[fx.Node, int] = field(default_factory=dict)
    last_use: dict[fx.Node, int] = field(default_factory=dict)
    #: The last item that makes or reads the tensor of a node, where the graph does not return it.
    last_read: dict[fx.Node, int] = field(default_factory=dict)
    #: The place of the first item that talks to other ranks, if any does.
    first_collective: int = 0
    #: Arguments that pick rows of a dynamic size: a negative one counts from the real size, not from the bucket.
    row_indices: dict[fx.Node, sympy.Symbol] = field(default_factory=dict)
    #: Masks that are padded with zeros along some sizes, by name: sums over these were judged by that.
    zeroed: dict[str, set[sympy.Symbol]] = field(default_factory=dict)

    def value(self, node: fx.Node) -> Any:
        """The fake value of a node."""
        return self.facts[node].value

    def wants_static(self, node: fx.Node) -> bool:
        """Whether anyone reads a value at the bucket's size, from static memory."""
        value = self.value(node)
        if value.device != self.device or not symbols_of(value) <= set(self.symbols):
            return False
        readers = (item for item in self.items if node in item.reads)
        return any(s.mode == "request" if isinstance(s, SplitOpItem) else s.refusal is None for s in readers)

    def attribute(self, node: fx.Node) -> Any:
        """What a ``get_attr`` node gives."""
        value: Any = self.gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """What must hold of a step for a padding request to cover the padding of every op in request mode."""
        found = (s.request for s in self.items if isinstance(s, SplitOpItem) and s.mode == "request")
        return tuple(dict.fromkeys(request for request in found if request is not None))

    def request_checker(
        self, sizes: Mapping[sympy.Symbol, int], bucket: Mapping[sympy.Symbol, int]
    ) -> Callable[[Sequence[Any], bool], bool] | None:
        """``fn(args, wait)``: whether it does for a call of these sizes; None: whatever the values, it does not."""
        if not all(request.fits(sizes, bucket) for request in self.requests):
            return None
        positions = {spec.node: spec.position for spec in self.inputs}
        checks = [request.checker(sizes, positions) for request in self.requests if request.ends]
        return lambda args, wait: all(check(args, wait) for check in checks)

    @property
    def token_sizes(self) -> list[tuple[Any, SplitOp]]:
        """The numbers of tokens, ints or SymInts, that the step's metadata are prepared for, attention's first."""
        items = [s for s in self.items if isinstance(s, SplitOpItem) and s.op.own_metadata and s.op.bucket_args]
        arguments = [(item.node.args[item.op.bucket_args[0]], item.op) for item in items]
        found = [(self.value(a) if isinstance(a, fx.Node) else a, op) for a, op in arguments]
        return sorted(found, key=lambda pair: pair[1].optional_step)
