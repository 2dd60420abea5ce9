"""Bucket tables, and the choice of a bucket for the sizes of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import sympy

from ..fx.strides import Layouts
from ..options import Options

if TYPE_CHECKING:
    from ..passes.padding_safety.reach import Reach

__all__ = ["BucketChooser", "Choice", "default_table"]

_DOUBLING_LIMIT = 256
_LARGEST_STEP = 0.12
_PADDING_LIMIT = 1.25
#: Below this many tokens the time of a step hardly follows the tokens, so padding costs nothing.
_PADDING_MATTERS = 256


def default_table(max_tokens: int) -> tuple[int, ...]:
    """2, 4, 8, ... 256, then steps of at most 12 %, up to ``max_tokens``."""
    sizes: list[int] = []
    size = 2
    while size < max_tokens:
        sizes.append(size)
        size = size * 2 if size < _DOUBLING_LIMIT else int(size * (1 + _LARGEST_STEP)) // 8 * 8
    return (*sizes, max_tokens)


@dataclass(frozen=True)
class Choice:
    """The bucket of each dynamic size, or None and the reason why a step runs at its exact sizes."""

    sizes: Mapping[sympy.Symbol, int] | None
    reason: str = ""


@dataclass
class BucketChooser:
    """Chooses buckets that the graph's guards allow.

    Attributes:
        options: the table and its limits.
        conditions: sympy relations on the symbols; a bucket satisfies all of them: a graph that was traced for
            2 <= n <= 15 is wrong at 16, and says nothing.
        assumed: the same, of what the compiler took for granted: Dynamo does not see to it that steps satisfy these.
        products: for each tensor with dynamic sizes, the symbols that it carries.
    """

    options: Options
    conditions: Sequence[sympy.Basic]
    products: Iterable[tuple[sympy.Symbol, ...]]
    #: (size, size): equal in the step and at the buckets chosen.
    equals: Sequence[tuple[sympy.Expr, sympy.Expr]] = ()
    assumed: Sequence[sympy.Basic] = ()
    #: Indices that must stay within what they look up at the buckets chosen.
    reaches: Sequence[Reach] = ()
    #: Strides of inputs that are symbols: they are not padded, and known once all sizes are.
    layouts: Layouts = field(default_factory=Layouts)
    #: Sizes of inputs that are no plain symbol: where one is 0, there is no row 0 to pad with.
    rows: Sequence[sympy.Expr] = ()
    table: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.table = self.options.buckets or default_table(self.options.max_tokens)
        self.products = tuple(set(self.products))
        self._reaching = tuple(dict.fromkeys(s for reach in self.reaches for s in reach.symbols))
        self._left: dict[tuple[int | None, ...], str | None] = {}
        self._pinned = {
            side
            for condition in self.conditions
            if isinstance(condition, sympy.Eq)
            for side, other in (condition.args, condition.args[::-1])
            if isinstance(side, sympy.Symbol) and isinstance(other, sympy.Integer)
        }

    def choose(self, sizes: Mapping[sympy.Symbol, int], bucketed: Sequence[sympy.Symbol]) -> Choice:
        """The smallest allowed bucket >= its size for every symbol in ``bucketed``; others stay exact."""
        # A graph for one size only, such as Dynamo makes for 1, is captured at that size.
        open_ = [symbol for symbol in bucketed if symbol not in self._pinned]
        smallest = min((sizes[symbol] for symbol in bucketed), default=1)
        if smallest < 1:
            return Choice(None, f"a dynamic size is {smallest}")
        # A condition is asked for once the last of its sizes is chosen: two that must be equal are so in the end only.
        chosen = {
            symbol: n for symbol, n in sizes.items() if symbol not in open_ and symbol not in self.layouts.symbols
        }
        for symbol in open_:
            n = sizes[symbol]
            # Without n, which would make a fallback of its own of every size.
            reason = f"a size is beyond the largest bucket, {self.table[-1]}"
            for bucket in self.table:
                if bucket < n:
                    continue
                if self.allows({**chosen, symbol: bucket}):
                    chosen[symbol] = bucket
                    break
                reason = "no bucket for its size lies in the range that the graph's guards allow"
            else:
                return Choice(None, reason)
        for symbols in self.products:
            if not set(symbols) <= chosen.keys():
                continue
            real, padded = (prod(of[s] for s in symbols) for of in (sizes, chosen))
            if padded > self.options.max_tokens and self.options.buckets is None:
                return Choice(None, f"its tokens, padded, exceed max_tokens={self.options.max_tokens}")
            if real > _PADDING_MATTERS and padded > self.max_padding * real:
                return Choice(None, f"its bucket is over max_padding={self.max_padding} times its tokens")
        values = {symbol: sympy.Integer(n) for symbol, n in chosen.items()}
        strides = self.layouts.at(sizes, chosen, self.allows)
        if strides is None:
            return Choice(None, "no layout of an input fits its bucket: guards allow none, or its rows share memory")
        chosen.update(strides)
        exact = {symbol: sympy.Integer(n) for symbol, n in sizes.items()}
        for one, other in self.equals:
            if any(one.xreplace(at) != other.xreplace(at) for at in (exact, values)):
                return Choice(None, f"an index of {one} rows writes to a tensor of {other}")
        if any(size.xreplace(exact) == 0 and size.xreplace(values) != 0 for size in self.rows):
            return Choice(None, "an input has no rows, so there is no row 0 to pad it with")
        left = self._leaves(chosen) if self.reaches and chosen != sizes else None
        return Choice(chosen) if left is None else Choice(None, left)

    def _leaves(self, chosen: Mapping[sympy.Symbol, int]) -> str | None:
        """Why an index cannot be used at these sizes, or None; computed once for each."""
        key = tuple(chosen.get(symbol) for symbol in self._reaching)
        if key not in self._left:
            found = (reach.leaves(chosen) for reach in self.reaches if set(reach.symbols) <= chosen.keys())
            self._left[key] = next((reason for reason in found if reason is not None), None)
        return self._left[key]

    @property
    def max_padding(self) -> float:
        """The largest allowed bucket over tokens ratio."""
        if self.options.max_padding is not None:
            return self.options.max_padding
        return _PADDING_LIMIT if self.options.buckets is None else float("inf")

    def allows(self, sizes: Mapping[sympy.Symbol, int]) -> bool:
        """Whether sizes satisfy the conditions that name no other."""
        values = {symbol: sympy.Integer(n) for symbol, n in sizes.items()}
        for condition in (*self.conditions, *self.assumed):
            result = condition.xreplace(values)
            if result == sympy.false:
                return False
            if result != sympy.true and not result.free_symbols and not bool(result):
                return False
        return True
