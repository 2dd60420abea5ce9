"""What is known while the program of a step is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from ..fx.plan import InputSpec
from ..fx.sizes import shape_at, strides_at
from .binding import Binding
from .program import Op, Program

__all__ = ["Building", "Layout"]

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class Building:
    """A program under construction, and the step that runs on the way.

    Attributes:
        sizes: the real sizes. bucket: the sizes to capture at, or None. at: those of static memory.
        compiled: False where pieces run eagerly.
        static: values that lie in static memory. slots: the frame's slots of those that do not.
        new: keys of the captures made so far. keep: results of captured graphs, by the item that last reads them.
        copied: inputs that are copied into static memory.
    """

    def __init__(
        self,
        binding: Binding,
        sizes: Mapping[sympy.Symbol, int],
        bucket: Mapping[sympy.Symbol, int] | None,
        args: Sequence[Any],
        step: Any,
    ) -> None:
        self.binding, self.shared, self.plan = binding, binding.shared, binding.shared.plan
        self.sizes, self.bucket, self.args, self.step, self.compiled = sizes, bucket, args, step, True
        self.at = bucket if bucket is not None else sizes
        self.program = Program(
            None if bucket is None else tuple(bucket[s] for s in self.plan.symbols), self.shared.counters
        )
        self.program.sizes.update(sizes)
        self.static: dict[fx.Node, torch.Tensor] = {}
        self.slots: dict[fx.Node, int] = {}
        self.new: list[tuple[int, tuple[int, ...]]] = []
        self.keep: dict[int, list[Any]] = {}
        self.copied: list[InputSpec] = []
        #: Whether a padding request covers the padding in this step; else ops that declare metadata get the real rows.
        self.requests = True
        padded = bucket is not None and any(sizes[s] != n for s, n in bucket.items() if s in self.plan.dims)
        if padded and self.plan.requests:
            check = self.plan.request_checker(sizes, self.at)
            self.requests = check is not None and check(args, True)
            self.program.covered = check if self.requests else None
        self._layouts: dict[fx.Node, Layout] = {}

    def layouts(self, nodes: Sequence[fx.Node]) -> list[Layout]:
        """Shape, strides and dtype of values in static memory."""
        for node in nodes:
            if node not in self._layouts:
                fake = self.plan.value(node)
                self._layouts[node] = (shape_at(fake, self.at), strides_at(fake, self.at), fake.dtype)
        return [self._layouts[node] for node in nodes]

    def add(self, op: Op) -> Any:
        """Adds a call to the program, and makes it."""
        self.program.ops.append(op)
        return op()

    def late(self, node: fx.Node) -> int:
        """The frame's slot of a value that nothing static holds."""
        if node not in self.slots:
            self.slots[node] = len(self.program.frame)
            self.program.frame.append(None)
        return self.slots[node]

    def free_after(self, index: int) -> None:
        """Frees the values that nothing static holds and that the item at ``index`` is the last to read.

        A step that runs without captured graphs then needs the memory that eager needs, and not that of all layers.
        """
        slots = [self.slots[node] for node in self.last_read_at(index)]
        if slots:
            self.add(partial(_free, self.program.frame, slots))

    def last_read_at(self, index: int) -> list[fx.Node]:
        """The values in the frame that the item at ``index`` is the last to read."""
        return [node for node in self.slots if self.plan.last_read.get(node) == index]

    def drop_new_captures(self) -> None:
        """No bucket stays half captured."""
        for key in self.new:
            self.binding.captured_graphs.pop(key, None)
        self.new.clear()

    def bucket_name(self) -> Any:
        """The bucket as users name it: a size, or a tuple of the dynamic sizes."""
        names = [self.at[s] for s in self.plan.symbols if s in self.plan.dims]
        return names[0] if len(names) == 1 else tuple(names)


def _free(frame: list[Any], slots: Sequence[int]) -> None:
    for slot in slots:
        frame[slot] = None
