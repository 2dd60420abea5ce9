"""Lookups and writes by index."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from .call import Call, Tracked, rules
from .dims import Dim, Dims, Mixing, broadcast, concrete, has_tokens, is_prefix, need_static, same_size, size_of
from .values import require_in_range

__all__: list[str] = []

_WHOLE_NUMBERS = (torch.int64, torch.int32)


def _looked_up(call: Call, dim: Dim, index: Tracked, *, negative: bool) -> None:
    """Entries of ``dim`` picked by an index: real where the index is, if it counts from the real size."""
    if index.dtype not in _WHOLE_NUMBERS:
        raise Mixing("the size of its result depends on data")
    if not has_tokens(dim):
        if index.source is not None:
            call.other_uses.append(index.source)
        require_in_range(call, index, size_of(dim), negative=negative)
        return
    factors = [factor for factor in dim if factor != 1]
    if index.source is not None and len(factors) == 1 and isinstance(factors[0], sympy.Symbol):
        call.row_indices.append((index.source, factors[0]))
        return
    low, high = index.values.low, index.values.high
    if low is None or high is None or not is_prefix(concrete(dim)):
        raise Mixing("it picks rows by a computed index, which may count from the end")
    for limit in (sympy.Ge(low, 0), sympy.Le(high, size_of(dim) - 1)):
        if limit == sympy.false:
            raise Mixing("it picks rows by a computed index, which may count from the end")
        if limit != sympy.true:
            call.limits.append(limit)
    if index.source is not None:
        call.other_uses.append(index.source)


def _used_as_data(call: Call, *tensors: Tracked) -> None:
    call.other_uses += [t.source for t in tensors if t.source is not None]


@rules("embedding")
def embedding(call: Call) -> Dims:
    weight, indices = call.tensor("weight"), call.tensor("indices")
    _used_as_data(call, weight)
    _looked_up(call, weight.dims[0], indices, negative=False)
    return (*indices.dims, *weight.dims[1:])


@rules("index", "_unsafe_index")
def index(call: Call) -> Dims:
    source = call.tensor("self")
    used = [(i, t) for i, t in enumerate(call.arguments["indices"]) if isinstance(t, Tracked)]
    _used_as_data(call, source)
    for i, tensor in used:
        _looked_up(call, source.dims[i], tensor, negative=True)
    merged = broadcast([tensor.dims for _, tensor in used])
    places = [i for i, _ in used]
    rest = [dim for i, dim in enumerate(source.dims) if i not in places]
    adjacent = places == list(range(places[0], places[-1] + 1))
    at = places[0] if adjacent else 0
    return (*rest[:at], *merged, *rest[at:])


@rules("index_select")
def index_select(call: Call) -> Dims:
    source, chosen = call.tensor("self"), call.tensor("index")
    axis = call.arguments["dim"] % len(source.dims)
    _used_as_data(call, source)
    _looked_up(call, source.dims[axis], chosen, negative=False)
    return (*source.dims[:axis], *(chosen.dims or ((1,),)), *source.dims[axis + 1 :])


@rules("gather")
def gather(call: Call) -> Dims:
    source, chosen = call.tensor("self"), call.tensor("index")
    if not source.dims or not chosen.dims:
        return chosen.dims
    axis = call.arguments["dim"] % len(source.dims)
    _used_as_data(call, source)
    _looked_up(call, source.dims[axis], chosen, negative=False)
    _line_up(source.dims, chosen.dims, axis)
    return tuple(concrete(dim) for dim in chosen.dims)


@rules("take")
def take(call: Call) -> Dims:
    source, chosen = call.tensor("self"), call.tensor("index")
    total: Any = 1
    for dim in source.dims:
        need_static(dim, "looks up in")
        total = total * size_of(dim)
    _used_as_data(call, source)
    _looked_up(call, (total,), chosen, negative=True)
    return chosen.dims


def _line_up(source: Dims, chosen: Dims, axis: int) -> None:
    """The other dimensions pick entry i for entry i. The chosen may be fewer: then the first ones."""
    for i, (one, other) in enumerate(zip(source, chosen, strict=True)):
        if i == axis or size_of(other) == 1 or not (has_tokens(one) or has_tokens(other)):
            continue
        if not has_tokens(one) and is_prefix(concrete(other)):
            continue
        if not same_size(size_of(one), size_of(other)):
            raise Mixing("it combines dimensions whose real entries lie differently")
        broadcast([(one,), (other,)])


@rules("scatter", "scatter_add", "scatter_reduce")
def scatter(call: Call) -> Dims:
    source, chosen = call.tensor("self"), call.tensor("index")
    if not source.dims:
        return ()
    axis = call.arguments["dim"] % len(source.dims)
    need_static(source.dims[axis], "scatters into")
    need_static(chosen.dims[axis], "scatters from")
    _used_as_data(call, source)
    _looked_up(call, source.dims[axis], chosen, negative=False)
    written = call.arguments.get("src")
    result = list(source.dims)
    for i, dim in enumerate(chosen.dims):
        parts = [dim] if not isinstance(written, Tracked) else [dim, written.dims[i]]
        if i == axis or not any(has_tokens(d) for d in (source.dims[i], *parts)):
            continue
        # Row by row; one entry alone would be the first row.
        if any(not same_size(size_of(d), size_of(source.dims[i])) for d in parts):
            raise Mixing("it writes rows whose real entries lie differently")
        result[i] = concrete(broadcast([(source.dims[i],), *((d,) for d in parts)])[0])
    if isinstance(written, Tracked):
        _used_as_data(call, written)
    return tuple(result)


@rules("index_put", "_unsafe_index_put")
def index_put(call: Call) -> Dims:
    source = call.tensor("self")
    used = [(i, t) for i, t in enumerate(call.arguments["indices"]) if isinstance(t, Tracked)]
    for i, tensor in used:
        if tensor.dtype not in _WHOLE_NUMBERS:
            raise Mixing("how many entries it writes depends on data")
        _written(call, source.dims[i], tensor)
    places = [i for i, _ in used]
    merged = broadcast([tensor.dims for _, tensor in used])
    rest = [dim for i, dim in enumerate(source.dims) if i not in places]
    at = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    values = call.tensor("values")
    lined_up = broadcast([(*rest[:at], *merged, *rest[at:]), values.dims])
    _used_as_data(call, source, values)
    kept = iter(lined_up[:at] + lined_up[at + len(merged) :])
    return tuple(dim if i in places else concrete(next(kept)) for i, dim in enumerate(source.dims))


@rules("index_copy", "index_add", "index_fill")
def index_copy(call: Call) -> Dims:
    source, chosen = call.tensor("self"), call.tensor("index")
    axis = call.arguments["dim"] % len(source.dims)
    if chosen.dtype not in _WHOLE_NUMBERS:
        raise Mixing("how many entries it writes depends on data")
    _written(call, source.dims[axis], chosen)
    written = call.arguments.get("source")
    result = source.dims
    if isinstance(written, Tracked):
        along = written.dims[axis] if written.dims else (1,)
        broadcast([chosen.dims or ((1,),), (along,)])
        others = [(*d[:axis], (1,), *d[axis + 1 :]) for d in (source.dims, written.dims or source.dims)]
        merged = broadcast(others)
        result = tuple(source.dims[i] if i == axis else concrete(dim) for i, dim in enumerate(merged))
        _used_as_data(call, written)
    _used_as_data(call, source)
    return result


def _written(call: Call, dim: Dim, index: Tracked) -> None:
    """Entries of ``dim`` written by an index."""
    if index.source is not None:
        call.other_uses.append(index.source)
    if any(has_tokens(d) for d in index.dims) and not index.scratch:
        raise Mixing("padding rows would be written where their index points")
    need_static(dim, "writes by index into")
