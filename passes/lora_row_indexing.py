"""Rules of ops that pick rows by an index, or put them where an index says."""

from __future__ import annotations

from typing import Any

import torch

from .lora_orders import Dim, Lost, Rows, State, axes_of, each_once
from .lora_row_rules import Result, RowCall, pointwise, rule, with_dims
from .safety_dims import as_expr

__all__: list[str] = []


@rule("embedding")
def looked_up(c: RowCall) -> Result:
    """Rows of a table, in the order of what looks them up."""
    return _picked(c, c.get("weight"), [c.get("indices")])


@rule("index", "_unsafe_index")
def indexed(c: RowCall) -> Result:
    return _picked(c, c.get("self"), c.arguments["indices"])


@rule("index_select")
def chosen(c: RowCall) -> Result:
    source = c.get("self")
    return _picked(c, source, [*[None] * (c.arguments["dim"] % max(1, source.dim())), c.get("index")])


def _picked(c: RowCall, source: torch.Tensor, indices: list[Any]) -> State:
    state, shape = c.state(source), c.shape
    if isinstance(state, Lost):
        return state
    used = [i for i, index in enumerate(indices) if index is not None]
    given = [indices[i] for i in used]
    masks = any(index.dtype in (torch.bool, torch.uint8) for index in given)
    dims = list(state.dims) if isinstance(state, Rows) else [((as_expr(size), None),) for size in source.shape]
    if masks and (len(given) > 1 or given[0].dim() > 1):
        return c.lost() if isinstance(state, Rows) and axes_of(state.dims) else _index_lost(c, given)
    rank = max(index.dim() for index in given)
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    kept = [dim for i, dim in enumerate(dims) if i not in used]
    picked = [dims[i] for i in used]
    if isinstance(state, Rows) and axes_of(picked):
        if any(not axes_of([dim]) for dim in picked):
            return c.lost()
        axes = axes_of(picked)
        if len(set(axes)) != len(axes):
            return c.lost()
        keys = [c.key(index) for index in given]
        places = shape[first : first + rank]
        order, new = c.orders.take(state.order, picked, keys, places, tuple(given))
        return c.orders.rows(order, (*kept[:first], *new, *kept[first:]))
    # Nothing that is picked from is of a token: the rows are those of the index, and what is left of the source's.
    if masks:
        return _index_lost(c, given)
    states: list[tuple[State, int]] = []
    for index in given:
        own = c.state(index)
        if isinstance(own, Rows):
            own = with_dims(c, own, (*own.dims, *[_one() for _ in range(len(shape) - first - rank)]))
            states.append((own, len(own.dims)))
        elif own is not None:
            return own
    if isinstance(state, Rows):
        between: list[Dim] = [((size, None),) for size in shape[first : first + rank]]
        states.append((with_dims(c, state, (*kept[:first], *between, *kept[first:])), len(shape)))
    return c.orders.meet(states, shape)


def _one() -> Dim:
    return ((1, None),)


def _index_lost(c: RowCall, given: list[torch.Tensor]) -> State:
    return c.lost() if any(c.state(index) is not None for index in given) else None


@rule("gather")
def gathered(c: RowCall) -> Result:
    source, index = c.get("self"), c.get("index")
    state, own, shape = c.state(source), c.state(index), c.shape
    if isinstance(state, Lost):
        return state
    rank = source.dim()
    d = c.arguments["dim"] % max(1, rank)
    if not isinstance(state, Rows) or not rank or not axes_of([state.dims[d]]):
        states: list[tuple[State, int]] = [(own, rank)]
        if isinstance(state, Rows) and rank:
            if any(_shorter(c, state, i, shape) for i in range(rank) if i != d):
                return c.lost()
            columns: Dim = ((shape[d], None),)
            dims = [columns if i == d else _resized(dim, shape[i]) for i, dim in enumerate(state.dims)]
            states.append((with_dims(c, state, dims), rank))
        return c.orders.meet(states, shape)
    # The index must be alike along the columns, and lie with the rows along the other dimensions.
    where: dict[Any, int] = {}
    order, dims = state.order, list(state.dims)
    for i, dim in enumerate(state.dims):
        if i != d and axes_of([dim]) and as_expr(index.shape[i]) != c.orders.size(dim):
            # The index may have fewer rows; the first ones are meant.
            order, dims[i] = c.orders.piece(order, dim, 0, shape[i], 1, shape[i])
    state = c.orders.rows(order, dims)
    for i, dim in enumerate(state.dims):
        if i == d:
            continue
        if axes_of([dim]):
            if len(dim) != 1:
                return c.lost()
            where[dim[0][1]] = i
        elif as_expr(index.shape[i]) != 1 and as_expr(index.stride(i)) != 0:
            return Lost("it gathers other rows for each column")
    kept = [axis for axis in state.order.axes if axis not in axes_of([state.dims[d]])]
    if set(kept) != set(where):
        return c.lost()
    places = (*(where[axis] for axis in kept), d)
    order, new = c.orders.gather(state.order, state.dims[d], c.key(index), shape[d], index, places)
    return c.orders.rows(order, [new if i == d else _resized(dim, shape[i]) for i, dim in enumerate(state.dims)])


def _shorter(c: RowCall, rows: Rows, i: int, shape: tuple[Any, ...]) -> bool:
    return bool(axes_of([rows.dims[i]])) and c.orders.size(rows.dims[i]) != shape[i]


def _resized(dim: Dim, size: Any) -> Dim:
    return dim if axes_of([dim]) else ((size, None),)


@rule("repeat_interleave")
def repeats(c: RowCall) -> Result:
    """Indices to repeat rows by: they lie in no order of rows themselves."""
    return None


@rule("nonzero", "bincount", "histc", "searchsorted", "bucketize", "unique_dim", "_unique2", "one_hot")
def of_no_row(c: RowCall) -> Result:
    if c.op.name().startswith(("aten::searchsorted", "aten::bucketize")):
        value = c.get("self", "input")
        return c.state(value) if isinstance(value, torch.Tensor) else None
    return [None] * len(c.results)


@rule("scatter", "scatter_add", "scatter_reduce", "index_put", "_unsafe_index_put", "index_add", "index_copy",
      "index_fill", "index_reduce", "masked_scatter", "_index_put_impl_")  # fmt: skip
def put(c: RowCall) -> Result:
    """Rows that come back to where they were picked from are in that order again."""
    target = c.get("self")
    state = c.state(target)
    if isinstance(state, Lost):
        return state
    values = c.get("values", "source", "src")
    indices = c.get("indices", "index")
    if isinstance(indices, torch.Tensor):
        d = c.arguments["dim"] % max(1, target.dim())
        scatters = "scatter" in c.op.name()
    elif isinstance(indices, (list, tuple)) and len([i for i in indices if i is not None]) == 1:
        d = next(i for i, index in enumerate(indices) if index is not None)
        indices, scatters = indices[d], False
    elif isinstance(indices, (list, tuple)):
        known = isinstance(values, torch.Tensor) and c.state(values) is not None
        return c.lost() if known else state
    else:
        return pointwise(c)
    given = c.state(values) if isinstance(values, torch.Tensor) else None
    if isinstance(given, Lost):
        return given
    if isinstance(given, Rows) and given.order.kind == "take" and not scatters:
        back = _put_back(c, target, d, indices, given)
        if back is not None:
            return c.orders.meet([(state, target.dim()), (back, target.dim())], [as_expr(s) for s in target.shape])
    along = [s for s in (state, given, c.state(indices) if scatters else None) if isinstance(s, Rows)]
    if scatters:
        if any(len(s.dims) <= d or axes_of([s.dims[d]]) for s in along):
            return _kept(c, state, given)
        states: list[tuple[State, int]] = [(_columns(c, s, d), len(s.dims)) for s in along]
        return c.orders.meet(states, [as_expr(size) for size in target.shape])
    if isinstance(given, Rows) and axes_of(given.dims):
        mask = indices.dtype is torch.bool
        columns = d >= target.dim() - 1 and not mask and indices.dim() == 1 and len(given.dims) == target.dim()
        if not columns or axes_of([given.dims[d]]):
            return _kept(c, state, given)
        return c.orders.meet([(state, target.dim()), (_columns(c, given, d), target.dim())], target.shape)
    return state


def _columns(c: RowCall, rows: Rows, d: int) -> Rows:
    return with_dims(c, rows, [((1, None),) if i == d else dim for i, dim in enumerate(rows.dims)])


def _kept(c: RowCall, state: State, given: State) -> State:
    """Where rows are put in an order that is not known to be the target's."""
    return c.lost() if isinstance(given, Rows) and axes_of(given.dims) else state


def _put_back(c: RowCall, target: torch.Tensor, d: int, index: torch.Tensor, given: Rows) -> Rows | None:
    """Where ``target[index] = source[index]``: the source's rows."""
    source, before, keys, sizes = given.order.parts
    if len(before) != 1 or keys != (c.key(index),) or c.orders.size(before[0]) != as_expr(target.shape[d]):
        return None
    new = given.order.axes[len(given.order.axes) - len([s for s in sizes if s != 1]) :]
    if len(given.dims) != target.dim() or len(sizes) != 1 or axes_of([given.dims[d]]) != new:
        return None
    dims = [before[0] if i == d else dim for i, dim in enumerate(given.dims)]
    rows = Rows(source, tuple(dims))
    return c.orders.rows(source, dims) if each_once(rows, dims) else None
