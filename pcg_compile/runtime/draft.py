"""A draft: a program under construction, with what is known of its values so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from ..fx.plan import InputSpec, Item
from ..fx.sizes import shape_at, strides_at
from .binding import Binding
from .program import Body, Frame, Free, Operation, Program

__all__ = ["Draft"]

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class Draft:
    """A program under construction.

    Attributes:
        sizes: the real sizes. bucket: the sizes to capture at, or None. at: those of static memory.
        compiled: False where pieces run eagerly.
        requests: whether a padding request covers the padding; else ops that declare metadata get the real rows.
        static: values that lie in static memory. slots: places in the frame of those that do not.
        new: keys of the captures made so far. keep: results of captured graphs, by the item that last reads them.
        copied: inputs that are copied into static memory.
        fallbacks: (reason, where) of these real sizes. bucket_fallbacks: those of every program of the bucket.
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
        self.sizes, self.bucket, self.step, self.compiled = sizes, bucket, step, True
        self.at = bucket if bucket is not None else sizes
        self.key = None if bucket is None else tuple(bucket[s] for s in self.plan.symbols)
        self.frame = Frame(dict(sizes), args)
        self.loads: list[Operation] = []
        self.operations: list[Operation] = []
        self.static: dict[fx.Node, torch.Tensor] = {}
        self.slots: dict[fx.Node, int] = {}
        self.new: list[tuple[int, tuple[int, ...]]] = []
        self.keep: dict[int, list[Any]] = {}
        self.copied: list[InputSpec] = []
        self.capture_keys: list[tuple[int, tuple[int, ...]]] = []
        self.fallbacks: list[tuple[str, str]] = []
        self.bucket_fallbacks: dict[str, str] = {}
        self.complete, self.provisional, self.requests = True, False, True
        self.covered: Any = None
        padded = bucket is not None and any(sizes[s] != n for s, n in bucket.items() if s in self.plan.dims)
        if padded and self.plan.requests:
            check = self.plan.request_checker(sizes, self.at)
            self.requests = check is not None and check(args, True)
            self.covered = check if self.requests else None
        self._layouts: dict[fx.Node, Layout] = {}

    def layouts(self, nodes: Sequence[fx.Node]) -> list[Layout]:
        """Shape, strides and dtype of values in static memory."""
        for node in nodes:
            if node not in self._layouts:
                fake = self.plan.value(node)
                self._layouts[node] = (shape_at(fake, self.at), strides_at(fake, self.at), fake.dtype)
        return [self._layouts[node] for node in nodes]

    def place(self, node: fx.Node) -> torch.Tensor:
        """Static memory for the value of a node, at the bucket's size."""
        shape, strides, dtype = self.layouts([node])[0]
        return self.binding.place(node, ("value", self.plan.slots[node]), shape, strides, dtype)

    def late(self, node: fx.Node) -> int:
        """The frame's slot of a value that nothing static holds."""
        if node not in self.slots:
            self.slots[node] = len(self.frame.values)
            self.frame.values.append(None)
        return self.slots[node]

    def run(self, operation: Operation) -> None:
        """Adds an operation, and runs it."""
        self.operations.append(operation)
        operation.call()

    def last_read_at(self, index: int) -> list[fx.Node]:
        """The values in the frame that the item at ``index`` is the last to read."""
        return [node for node in self.slots if self.plan.last_read.get(node) == index]

    def free_after(self, item: Item) -> None:
        """Frees the values in the frame that an item is the last to read.

        A step without captured graphs then needs the memory that eager needs, and not that of all layers.
        """
        slots = [self.slots[node] for node in self.last_read_at(item.index)]
        if slots:
            self.run(Free.of(item, partial(_free, self.frame.values, slots)))

    def drop_new_captures(self) -> None:
        """No bucket stays half captured."""
        for key in self.new:
            self.binding.captured_graphs.pop(key, None)
        self.new.clear()

    def bucket_name(self) -> Any:
        """The bucket as users name it: a size, or a tuple of the dynamic sizes."""
        names = [self.at[s] for s in self.plan.symbols if s in self.plan.dims]
        return names[0] if len(names) == 1 else tuple(names)

    def body(self) -> Body:
        """What lies between inputs and outputs, with all that was added."""
        shared = tuple(self.bucket_fallbacks.items())
        return Body(tuple(self.operations), tuple(self.capture_keys), dict(self.static), None, shared)

    def program(self, body: Body, emit: Operation) -> Program:
        """The finished program."""
        real = tuple(self.sizes[s] for s in self.plan.symbols)
        return Program(
            real, self.key, self.shared.counters, self.frame, tuple(self.loads), body, emit,
            (*body.fallbacks, *self.fallbacks), self.covered, self.complete, self.provisional,
        )  # fmt: skip


def _free(values: list[Any], slots: Sequence[int]) -> None:
    for slot in slots:
        values[slot] = None
