"""How padded inputs lie in memory, where their strides are not those of their sizes.

A slice of a wider tensor has a stride that no size tells, and Dynamo gives it a symbol of its own once it varies. Such
a symbol is no size: nothing has as many rows, and nothing is padded to it. At a bucket it takes a value of its own, one
for all steps, at which the static buffers of the inputs have no two elements in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch

from .sizes import evaluate, expr_of, shape_at, strides_at, symbols_of

Sizes = Mapping[sympy.Symbol, int]
#: Rows of a static buffer begin at multiples of this many elements where the graph's guards allow it.
_ALIGNMENT = 16


@dataclass
class Layouts:
    """The strides and storage offsets of inputs that are symbols.

    Attributes:
        inputs: fake values of the inputs that are copied into static buffers.
        strides: symbols that are a stride of an input and a size of none.
        offsets: symbols that occur in storage offsets alone: static buffers have none.
    """

    inputs: tuple[torch.Tensor, ...] = ()
    strides: frozenset[sympy.Symbol] = frozenset()
    offsets: frozenset[sympy.Symbol] = frozenset()
    _known: dict[tuple[tuple[str, int], ...], dict[sympy.Symbol, int] | None] = field(default_factory=dict)

    @staticmethod
    def of(inputs: Sequence[torch.Tensor], sizes: frozenset[sympy.Symbol]) -> Layouts:
        """Those of a graph's inputs, whose shapes have the symbols ``sizes``."""
        plain = [value for value in inputs if value.layout == torch.strided and symbols_of(value)]
        strides = frozenset().union(*(_free(value.stride()) for value in plain)) - sizes
        offsets = frozenset().union(*(_free((value.storage_offset(),)) for value in plain)) - sizes - strides
        return Layouts(tuple(plain), strides, offsets)

    @property
    def symbols(self) -> frozenset[sympy.Symbol]:
        """Symbols that are no tensor's size."""
        return self.strides | self.offsets

    def at(self, sizes: Sizes, chosen: Sizes, allows: Callable[[Sizes], bool]) -> dict[sympy.Symbol, int] | None:
        """A value for each symbol at the buckets ``chosen``; None where the graph's guards leave none.

        Args:
            sizes: of the step, strides included. allows: whether the guards allow sizes and strides.
        """
        key = tuple(sorted((str(s), n) for s, n in chosen.items()))
        if key not in self._known:
            self._known[key] = self._find(sizes, chosen, allows)
        return self._known[key]

    def _find(self, sizes: Sizes, chosen: Sizes, allows: Callable[[Sizes], bool]) -> dict[sympy.Symbol, int] | None:
        inputs = [value for value in self.inputs if symbols_of(value) <= sizes.keys()]
        values = {s: 0 for s in self.offsets if s in sizes}
        if values and not allows({**chosen, **values}):
            values = {s: sizes[s] for s in values}
        open_ = sorted((s for s in self.strides if s in sizes), key=lambda s: sizes[s])
        for symbol in open_:
            # Later ones are as long as they must be to hold earlier ones.
            known = {**chosen, **values}
            least = max((n for value in inputs for n in _least(symbol, value, sizes, known)), default=1)
            for candidate in _candidates(least, sizes[symbol]):
                if allows({**known, symbol: candidate}):
                    values[symbol] = candidate
                    break
            else:
                return None
        at = {**chosen, **values}
        # A layout whose elements share memory in the step may do so in the static buffer, but not with padding.
        if any(
            _overlaps(value, at) and (not _overlaps(value, sizes) or _overlaps(value, at, True)) for value in inputs
        ):
            return None
        return values


def _free(numbers: Sequence[object]) -> frozenset[sympy.Symbol]:
    return frozenset().union(*(symbols_of(number) for number in numbers))


def _candidates(least: int, real: int) -> Iterator[int]:
    """Strides to try: the first aligned one, the smallest ones, the step's own."""
    aligned = -(-least // _ALIGNMENT) * _ALIGNMENT
    yield from (aligned, aligned + _ALIGNMENT, least, least + 1, least + 2)
    if real >= least:
        yield real


def _least(symbol: sympy.Symbol, value: torch.Tensor, sizes: Sizes, known: Sizes) -> Iterator[int]:
    """The smallest values of a stride's symbol at which the dimensions inside of it do not reach the next entry."""
    real, shape = strides_at(value, sizes), shape_at(value, known)
    extent = 1
    for dim in sorted(range(len(shape)), key=lambda d: real[d]):
        stride = value.stride(dim)
        unknown = symbols_of(stride) - known.keys()
        if symbol in unknown:
            # Linear in the symbol, and without others that are unknown, or the check of all layouts refuses it.
            expr = expr_of(stride).xreplace({s: sympy.Integer(1 if s == symbol else sizes[s]) for s in unknown})
            factor = int(expr.xreplace({s: sympy.Integer(known[s]) for s in expr.free_symbols}))
            if shape[dim] > 1 and factor > 0:
                yield -(-extent // factor)
            return
        if unknown:
            return
        extent += max(shape[dim] - 1, 0) * int(evaluate(stride, known))


def _overlaps(value: torch.Tensor, sizes: Sizes, rows: bool = False) -> bool:
    """Whether two elements may lie in one place; expanded dimensions do not count.

    With ``rows``, only whether two may that differ in their index along a dynamic dimension: a row and its padding.
    """
    extent, counts = 1, not rows
    dims = zip(strides_at(value, sizes), shape_at(value, sizes), map(symbols_of, value.shape), strict=True)
    for stride, size, dynamic in sorted(dims, key=lambda dim: dim[:2]):
        if stride == 0 or size <= 1:
            continue
        counts = counts or bool(dynamic)
        if counts and stride < extent:
            return True
        extent += (size - 1) * stride
    return False
