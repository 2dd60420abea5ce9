"""Ranges of memory, and which of them share bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .buffers import extent

__all__ = ["FixedMemory", "Range", "any_overlap", "overlap", "range_of"]

#: Candidates that the exact comparison of two strided tensors may try; beyond, they count as overlapping.
_MOST_WORK = 100_000


class Range(NamedTuple):
    """The bytes from a tensor's first element to past its last one, and how its elements lie in them.

    Numbers alone: a range keeps no memory alive.
    """

    start: int
    end: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @property
    def __array_interface__(self) -> dict[str, Any]:
        strides = tuple(self.itemsize * stride for stride in self.strides)
        data = (self.start, True)
        return {"version": 3, "typestr": f"|V{self.itemsize}", "shape": self.shape, "strides": strides, "data": data}


def range_of(tensor: torch.Tensor) -> Range | None:
    """The range of a strided tensor; None where it has no element, or no memory that could be compared."""
    if tensor.layout != torch.strided or not tensor.numel():
        return None
    shape, strides, itemsize = tuple(tensor.shape), tensor.stride(), tensor.element_size()
    start = tensor.data_ptr()
    return Range(start, start + extent(shape, strides) * itemsize, shape, strides, itemsize)


def overlap(one: Range, other: Range) -> bool:
    """Whether two tensors have a byte in common; columns of one matrix, say, have none although their ranges cross."""
    if one.start >= other.end or other.start >= one.end:
        return False
    try:
        # numpy compares addresses alone and reads nothing, so they may be a GPU's.
        return bool(np.shares_memory(np.asarray(one), np.asarray(other), max_work=_MOST_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class Intervals:
    """Ranges, merged where they touch, for a fast look at what none of them is near to."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self.ranges = sorted(ranges)
        self.starts: list[int] = []
        self.ends: list[int] = []
        for one in self.ranges:
            if self.ends and one.start <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], one.end)
            else:
                self.starts.append(one.start)
                self.ends.append(one.end)

    def meet(self, one: Range) -> bool:
        before = bisect_left(self.starts, one.end) - 1
        if before < 0 or self.ends[before] <= one.start:
            return False
        return any(overlap(one, other) for other in self.ranges)


class FixedMemory:
    """The inputs of a binding that lie where they lie for all of its steps: bound by address, or the step's cache."""

    def __init__(self, written: list[Range], read: list[Range]) -> None:
        self.written, self.all = Intervals(written), Intervals([*written, *read])
        self.overlapping = any_overlap([(one, True) for one in written] + [(one, False) for one in read])


def any_overlap(ranges: Sequence[tuple[Range, bool]]) -> bool:
    """Whether one that is written overlaps any other."""
    if not any(written for _, written in ranges):
        return False
    ranges = sorted(ranges)
    for i, (one, written) in enumerate(ranges):
        for other, other_written in ranges[i + 1 :]:
            if other.start >= one.end:
                break
            if (written or other_written) and overlap(one, other):
                return True
    return False
