"""Which token each entry of a tensor belongs to, as an address into a list of tokens.

Entry ``[i, j, ...]`` of a tensor belongs to ``tokens[offset + i * stride_i + j * stride_j + ...]``, just as memory is
addressed; along a dimension of stride 0 (columns, repetitions) the token is the same. Views, permutations, slices,
selections and flips therefore change numbers only. What picks or joins tokens in another way makes a new list.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..padding_safety.dims import as_expr, expanded, quotient

#: Factors (size, stride) of a dimension, outermost first; none of size 1.
Dim = tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class Order:
    """A list of tokens: the step's own, entries that ``index`` picks of a part, or several parts one behind the other.

    Attributes:
        size: number of entries. parts: rows of one dimension each. key: of the values of the index.
        index: None in the other cases. along: the only dimension of it that counts, or None for all of them.
        place: the node behind which the list can be computed.
    """

    size: Any
    parts: tuple[Rows, ...] = ()
    key: Hashable = None
    index: torch.Tensor | None = field(default=None, compare=False)
    along: int | None = None
    place: fx.Node | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Rows:
    """The token of each entry of a tensor."""

    order: Order
    offset: Any
    dims: tuple[Dim, ...]

    def like(self, dims: Iterable[Dim]) -> Rows:
        """Other dimensions of the same list."""
        return Rows(self.order, self.offset, tuple(dims))

    def replaced(self, d: int, *dims: Dim) -> Rows:
        """The same with ``dims`` in the place of one dimension."""
        return self.like((*self.dims[:d], *dims, *self.dims[d + 1 :]))

    @property
    def in_order(self) -> bool:
        """Whether its entries are the step's tokens, one after the other."""
        whole = fused(factor for dim in self.dims for factor in dim)
        return not self.order.parts and self.offset == 0 and whole == fused([(self.order.size, 1)])


@dataclass(frozen=True)
class Lost:
    """Why it is unknown which tokens a tensor's rows belong to."""

    reason: str


State = Rows | Lost | None


def size_of(factors: Iterable[tuple[Any, Any]]) -> Any:
    """The number of entries."""
    total: Any = 1
    for size, _ in factors:
        total = total * size
    return expanded(total)


def fused(factors: Iterable[tuple[Any, Any]]) -> Dim:
    """The same entries in as few factors as possible."""
    found: list[tuple[Any, Any]] = []
    for size, stride in factors:
        if size == 1:
            continue
        if found and found[-1][1] == expanded(size * stride):
            size = expanded(found.pop()[0] * size)
        found.append((size, stride))
    return tuple(found)


def columns(size: Any) -> Dim:
    """A dimension along which the token stays the same."""
    return fused([(as_expr(size), 0)])


def regroup(rows: Rows, shape: Sequence[Any]) -> Rows | None:
    """The rows of a view; None where it cannot be told."""
    left = list(fused(factor for dim in rows.dims for factor in dim))
    dims: list[Dim] = []
    for missing in map(expanded, shape):
        taken: list[tuple[Any, Any]] = []
        while missing != 1:
            if not left:
                return None
            have, stride = left.pop(0)
            rest = quotient(missing, have)
            if rest is None:
                inner = quotient(have, missing)
                if inner is None:
                    return None
                left.insert(0, (inner, stride))
                have, stride, rest = missing, expanded(stride * inner), 1
            taken.append((have, stride))
            missing = rest
        dims.append(fused(taken))
    return None if left else rows.like(dims)


def aligned(rows: Rows, shape: Sequence[Any]) -> Rows:
    """The rows of a tensor that is broadcast to ``shape``."""
    missing = len(shape) - len(rows.dims)
    dims = [*[()] * missing, *rows.dims]
    return rows.like(dim or columns(size) for dim, size in zip(dims, shape, strict=True))


def meet(states: Iterable[State], shape: Sequence[Any]) -> State:
    """The rows of a tensor whose entries are each made of the entries there of others, which must agree."""
    found: State = None
    for state in states:
        if isinstance(state, Lost):
            return state
        if state is not None:
            own = aligned(state, shape)
            if any(moving(dim) and size_of(dim) != expanded(size) for dim, size in zip(own.dims, shape, strict=True)):
                return Lost("it combines some of its rows with others")
            if found is not None and own != found:
                return Lost("it combines rows in several orders")
            found = own
    return found


def moving(*dims: Dim) -> bool:
    """Whether the token changes along dimensions."""
    return any(stride != 0 for dim in dims for _, stride in dim)


def listed(rows: Rows, d: int, order: Order, sizes: Sequence[Any]) -> Rows:
    """Rows of a new list, which lies along dimensions of ``sizes`` in the place of dimension ``d``."""
    strides = [size_of((size, 0) for size in sizes[i + 1 :]) for i in range(len(sizes))]
    new = [fused([(expanded(size), stride)]) for size, stride in zip(sizes, strides, strict=True)]
    return Rows(order, 0, (*rows.dims[:d], *new, *rows.dims[d + 1 :]))


def unpicked(rows: Rows, d: int) -> Rows | None:
    """The rows that an index picked ``rows`` from; None where they have been moved since."""
    part = rows.order.parts[0]
    whole = rows.offset == 0 and fused(rows.dims[d]) == fused([(rows.order.size, 1)])
    return Rows(part.order, part.offset, rows.dims).replaced(d, part.dims[0]) if whole else None
