"""Which token each row of a tensor belongs to: an *order* of tokens, and where its axes lie in the tensor.

An order is an expression over the tokens of one input: the tokens as they came, some of them picked by an index,
reversed, one behind the other, and so on. It has named axes. A tensor's dimensions are lists of factors, outermost
first, and a factor may be an axis of the order: a view regroups factors and leaves the order alone.

Equal orders are one object, so whether two tensors have their rows in the same order is a question of identity.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from .safety_dims import as_expr

__all__ = ["Axis", "Dim", "Lost", "Order", "Orders", "Rows", "State", "axes_of", "each_once", "plain_dims"]


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of an order; two axes of one size are two."""

    size: Any


#: A size, and the axis that it is, if any.
Factor = tuple[Any, "Axis | None"]
Dim = tuple[Factor, ...]


@dataclass(frozen=True, eq=False)
class Order:
    """How rows are made of tokens.

    Attributes:
        kind: "tokens", or the name of what was done to ``parts``. axes: of the result.
        parts: orders, dimensions and numbers, by kind; see :class:`Orders`.
        tensors: indices, as the fake tensors that the graph computes. place: the node behind which it can be computed.
        whole: False where some rows are of no token, such as those of a prefix.
    """

    kind: str
    axes: tuple[Axis, ...]
    parts: tuple[Any, ...]
    tensors: tuple[torch.Tensor, ...] = ()
    place: fx.Node | None = None
    whole: bool = True


@dataclass(frozen=True)
class Rows:
    """The order of a tensor's rows, and its dimensions. Axes that it lacks were summed up, or are alike for all."""

    order: Order
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Lost:
    """Why it cannot be told which tokens a tensor's rows belong to."""

    reason: str


State = Rows | Lost | None


def axes_of(dims: Sequence[Dim]) -> tuple[Axis, ...]:
    """The axes among the factors of dimensions."""
    return tuple(axis for dim in dims for _, axis in dim if axis is not None)


def plain_dims(shape: Sequence[Any]) -> tuple[Dim, ...]:
    """Dimensions without any axis."""
    return tuple(((as_expr(size), None),) for size in shape)


def quotient(whole: Any, part: Any) -> Any:
    """``whole / part`` where that is a whole number at all sizes, else None."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    ratio = sympy.cancel(sympy.sympify(whole) / sympy.sympify(part))
    if ratio.is_Integer:
        return int(ratio)
    return ratio if ratio.as_numer_denom()[1] == 1 else None


class Orders:
    """Makes orders; those that are made alike are one."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Order] = {}
        #: The node that is being followed.
        self.place: fx.Node | None = None
        #: Permutations by the key of their values, and the keys of their inverses.
        self.permutations: set[Hashable] = set()
        self.inverses: dict[Hashable, Hashable] = {}
        #: Indices that are others divided by a number: the key and tensor of the other, and the number.
        self.quotients: dict[Hashable, tuple[Hashable, torch.Tensor, int]] = {}

    def _make(
        self,
        key: tuple[Hashable, ...],
        parts: tuple[Any, ...],
        kept: Sequence[Axis],
        new: Sequence[Any],
        tensors: tuple[torch.Tensor, ...] = (),
        whole: bool = True,
    ) -> Order:
        order = self._known.get(key)
        if order is None:
            axes = (*kept, *(Axis(size) for size in new))
            order = self._known[key] = Order(str(key[0]), axes, parts, tensors, self.place, whole)
        return order

    def tokens(self, root: fx.Node, sizes: Sequence[Any]) -> Order:
        """The tokens as an input has them, row-major over ``sizes``."""
        return self._make(("tokens", root), (root,), (), sizes)

    def take(
        self, order: Order, dims: Sequence[Dim], keys: Sequence[Hashable], shape: Sequence[Any],
        tensors: tuple[torch.Tensor, ...],
    ) -> tuple[Order, tuple[Dim, ...]]:  # fmt: skip
        """Entries picked by an index for each of ``dims``; the result has the axes of ``shape`` in their place."""
        if len(dims) == 1 and keys[0] in self.quotients:
            # x[i // k] is x.repeat_interleave(k)[i]: the tokens of a dispatch to k experts each.
            key, tensor, count = self.quotients[keys[0]]
            dims, keys, tensors = [(*dims[0], (count, None))], [key], (tensor,)
        if len(dims) == 1 and order.kind == "take" and keys[0] in self.inverses:
            parent, before, used, _ = order.parts
            same = used == (self.inverses[keys[0]],) and [self.size(before[0])] == [as_expr(size) for size in shape]
            if len(before) == 1 and same and axes_of(dims) == order.axes[-1:]:
                return parent, (before[0],)
        kept = [axis for axis in order.axes if axis not in axes_of(dims)]
        sizes = tuple(as_expr(size) for size in shape)
        parts = (order, tuple(dims), tuple(keys), sizes)
        new = [size for size in sizes if size != 1]
        made = self._make(("take", *parts), parts, kept, new, tensors, order.whole)
        axes = iter(made.axes[len(kept) :])
        return made, tuple(((size, None if size == 1 else next(axes)),) for size in sizes)

    def gather(
        self, order: Order, dim: Dim, key: Hashable, size: Any, index: torch.Tensor, where: tuple[int, ...]
    ) -> tuple[Order, Dim]:
        """Entries of a dimension picked for each entry of the other axes.

        Args:
            where: the dimensions of ``index`` that the other axes lie along, in their order, and that of the entries.
        """
        kept = [axis for axis in order.axes if axis not in axes_of([dim])]
        parts = (order, dim, size, where)
        made = self._make(("gather", *parts, key), parts, kept, [] if size == 1 else [size], (index,), order.whole)
        return made, ((size, None if size == 1 else made.axes[-1]),)

    def piece(self, order: Order, dim: Dim, start: Any, stop: Any, step: int, size: Any) -> tuple[Order, Dim]:
        """A slice of a dimension; of one entry it is :meth:`fix`."""
        start, stop = as_expr(start), as_expr(stop)
        if order.kind == "cat" and step == 1 and axes_of([dim]) == order.axes[-1:]:
            first: Any = 0
            for part, of, length in order.parts[0]:
                if first == start and sympy.simplify(sympy.sympify(length) - size) == 0 and part is not None:
                    return part, of
                first = as_expr(first + length)
        if size == 1:
            return self.fix(order, dim, start), ((1, None),)
        kept = [axis for axis in order.axes if axis not in axes_of([dim])]
        parts = (order, dim, start, stop, step)
        made = self._make(("piece", *parts), parts, kept, [size], (), order.whole)
        return made, ((size, made.axes[-1]),)

    def fix(self, order: Order, dim: Dim, index: Any) -> Order:
        """One entry of a dimension."""
        kept = [axis for axis in order.axes if axis not in axes_of([dim])]
        parts = (order, dim, as_expr(index))
        return self._make(("fix", *parts), parts, kept, [], (), order.whole)

    def moved(self, kind: str, order: Order, dim: Dim, by: Any = None) -> tuple[Order, Dim]:
        """A dimension whose entries are reversed ("flip") or moved round by a number ("roll")."""
        if kind == "flip" and order.kind == "flip" and axes_of([dim]) == order.axes[-1:]:
            return order.parts[0], order.parts[1]
        kept = [axis for axis in order.axes if axis not in axes_of([dim])]
        size = self.size(dim)
        made = self._make((kind, order, dim, as_expr(by)), (order, dim, by), kept, [size], (), order.whole)
        return made, ((size, made.axes[-1]),)

    def cat(self, parts: Sequence[tuple[Order | None, Dim, Any]], others: Sequence[Axis]) -> tuple[Order, Dim]:
        """One behind the other, along one dimension of each; what has no order is of no token."""
        size: Any = 0
        for _, _, length in parts:
            size = as_expr(size + length)
        whole = all(order is not None and order.whole for order, _, _ in parts)
        made = self._make(("cat", *parts), (tuple(parts),), others, [size], (), whole)
        return made, ((size, made.axes[-1]),)

    def split(self, order: Order, axis: Axis, outer: Any, inner: Any) -> Order:
        """An axis as two."""
        kept = [one for one in order.axes if one is not axis]
        parts = (order, axis, outer, inner)
        return self._make(("split", *parts), parts, kept, [outer, inner], (), order.whole)

    @staticmethod
    def size(dim: Dim) -> Any:
        """The number of entries of a dimension."""
        total: Any = 1
        for size, _ in dim:
            total = total * size
        return as_expr(sympy.expand(total)) if isinstance(total, sympy.Basic) else total

    def rows(self, order: Order, dims: Sequence[Dim]) -> Rows:
        """Rows, with an axis that was split and lies in one dimension again put together."""
        dims = tuple(dims)
        while order.kind == "split":
            parent, axis, _, _ = order.parts
            joined = tuple(_joined(dim, order.axes[-2:], axis) for dim in dims)
            if joined == dims:
                break
            order, dims = parent, joined
        return Rows(order, dims)

    def regroup(self, rows: Rows, shape: Sequence[Any]) -> Rows | None:
        """The rows of a view; None where it cannot be told."""
        order = rows.order
        left: list[Factor] = [factor for dim in rows.dims for factor in dim if factor[0] != 1]
        result: list[Dim] = []
        for size in map(as_expr, shape):
            taken: list[Factor] = []
            missing = size
            while missing != 1:
                if not left:
                    return None
                have, axis = left.pop(0)
                rest = quotient(missing, have)
                if rest is None:
                    more = quotient(have, missing)
                    if more is None:
                        return None
                    if axis is None:
                        left.insert(0, (more, None))
                    else:
                        order = self.split(order, axis, missing, more)
                        axis, inner = order.axes[-2:]
                        left.insert(0, (more, inner))
                    have, rest = missing, 1
                taken.append((have, axis))
                missing = rest
            result.append(tuple(taken) or ((1, None),))
        return None if left else self.rows(order, result)

    def meet(self, states: Sequence[tuple[State, int]], shape: Sequence[Any]) -> State:
        """The rows of a tensor of ``shape`` each of whose entries is made of the entries there of others.

        Args:
            states: of each, and its number of dimensions.
        """
        lost = next((state for state, _ in states if isinstance(state, Lost)), None)
        if lost is not None:
            return lost
        dims = list(plain_dims(shape))
        found: Rows | None = None
        for state, _ in states:
            if not isinstance(state, Rows):
                continue
            axes = axes_of(state.dims)
            if found is None or (axes and not axes_of(found.dims)):
                found = state
            elif axes and axes_of(found.dims) and state.order is not found.order:
                return Lost("it combines rows in several orders")
        if found is None:
            return None
        for state, rank in states:
            if not isinstance(state, Rows) or state.order is not found.order:
                continue
            for i in range(rank):
                k, dim = i - rank + len(dims), state.dims[i]
                if not axes_of([dim]):
                    continue
                if axes_of([dims[k]]) and dims[k] != dim:
                    return Lost("it combines rows in several orders")
                dims[k] = dim
        axes = axes_of(dims)
        if len(set(axes)) != len(axes):
            return Lost("it combines rows with columns")
        return Rows(found.order, tuple(dims))


def _joined(dim: Dim, pair: tuple[Axis, ...], axis: Axis) -> Dim:
    for i in range(len(dim) - 1):
        if (dim[i][1], dim[i + 1][1]) == pair:
            return (*dim[:i], (axis.size, axis), *dim[i + 2 :])
    return dim


def each_once(rows: Rows, dims: Sequence[Dim]) -> bool:
    """Whether dimensions have every axis of the order."""
    axes = axes_of(dims)
    return len(axes) == len(rows.order.axes) and set(axes) == set(rows.order.axes)
