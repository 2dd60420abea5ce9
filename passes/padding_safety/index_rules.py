"""The rules of the padding analysis for ops that read or write by index."""

from __future__ import annotations

import sympy

from .dims import Dim, Dims, Mixing, broadcast, counts_alike, has_tokens, size_of
from .rules import Call, Tracked, axis_of, need_static, numbers_are_static, rule, tensors_of


@rule("embedding")
def embedding(call: Call) -> Dims:
    weight, indices = call.tensor("weight"), call.tensor("indices")
    need_static(weight.dims[0], "looks up rows of")
    return (*indices.dims, *weight.dims[1:])


@rule("bucketize searchsorted")
def search(call: Call) -> Dims:
    """Places of values in sorted rows, which are read whole."""
    values = call.arguments["self"]
    rows = tensors_of(call.arguments.get(name) for name in ("boundaries", "sorted_sequence", "sorter"))
    for row in rows:
        need_static(row.dims[-1], "searches")
    dims = values.dims if isinstance(values, Tracked) else ()
    if len(rows[0].dims) > 1:
        return (*broadcast([rows[0].dims[:-1], dims[:-1]]), *dims[-1:])
    return dims


@rule("isin")
def is_among(call: Call) -> Dims:
    """Which entries are in a set, which is read whole."""
    entries, those = call.arguments.get("elements"), call.arguments.get("test_elements")
    for dim in those.dims if isinstance(those, Tracked) else ():
        need_static(dim, "searches")
    return entries.dims if isinstance(entries, Tracked) else ()


def _others_alike(source: Tracked, index: Tracked, axis: int) -> list[tuple[Dim, Dim]]:
    pairs = [pair for i, pair in enumerate(zip(source.dims, index.dims, strict=True)) if i != axis]
    for one, other in pairs:
        broadcast([(one,), (other,)])
    return pairs


@rule("gather")
def gather(call: Call) -> Dims:
    source, index = call.tensor("self"), call.tensor("index")
    axis = axis_of(source.dims, call.arguments["dim"])
    need_static(source.dims[axis], "gathers from")
    _others_alike(source, index, axis)
    return index.dims


@rule("scatter scatter_add scatter_reduce")
def scatter(call: Call) -> Dims:
    source, index = call.tensor("self"), call.tensor("index")
    axis = axis_of(source.dims, call.arguments["dim"])
    need_static(source.dims[axis], "scatters into")
    need_static(index.dims[axis], "scatters from")
    numbers_are_static(call)
    for one, other in _others_alike(source, index, axis):
        if has_tokens(other) and not counts_alike(one, other):
            # With fewer rows than there are to write to, the index's padding would write real ones.
            call.equals.append((size_of(other), size_of(one)))
    return source.dims


@rule("take")
def take(call: Call) -> Dims:
    """Entries of the flattened tensor, counted from its end where negative."""
    for dim in call.tensor("self").dims:
        need_static(dim, "takes entries of")
    return call.tensor("index").dims


def _gathered(call: Call, source: Tracked, index: Tracked, axis: int, place: int) -> None:
    """Rows picked by index: right where the index tensor's values are the caller's own, counted from the real size."""
    if not has_tokens(source.dims[axis]):
        if index.source is not None:
            call.row_indices.append((index.source, None))
        return
    if place in call.sized:
        # In eager these lie within the real entries, or it raises.
        return
    factors = [f for f in source.dims[axis] if f != 1]
    if len(factors) != 1 or not isinstance(factors[0], sympy.Symbol) or index.source is None:
        raise Mixing("it picks rows by an index that may count from the end")
    call.row_indices.append((index.source, factors[0]))


@rule("index _unsafe_index")
def index(call: Call) -> Dims:
    source = call.tensor("self")
    used = {i: t for i, t in enumerate(call.arguments["indices"]) if isinstance(t, Tracked)}
    for i, tensor in used.items():
        _gathered(call, source, tensor, i, i)
    merged = broadcast([tensor.dims for tensor in used.values()])
    rest = [d for i, d in enumerate(source.dims) if i not in used]
    # Behind the dimensions ahead of them where they are neighbours, else first.
    at = min(used) if max(used) - min(used) == len(used) - 1 else 0
    return (*rest[:at], *merged, *rest[at:])


@rule("index_select")
def index_select(call: Call) -> Dims:
    source, chosen = call.tensor("self"), call.tensor("index")
    axis = axis_of(source.dims, call.arguments["dim"])
    _gathered(call, source, chosen, axis, 0)
    return (*source.dims[:axis], *(chosen.dims or ((1,),)), *source.dims[axis + 1 :])


@rule("put index_put index_copy index_add index_fill _unsafe_index_put")
def index_put(call: Call) -> Dims:
    source, values = call.tensor("self"), call.arguments.get("values")
    indices = tensors_of([call.arguments.get("indices", call.arguments.get("index"))])
    if len(indices) == 1 and indices[0].is_mask and isinstance(values, Tracked) and not values.dims:
        # One value for what a mask selects fills it, entry by entry.
        mask = indices[0].dims
        return (*broadcast([source.dims[: len(mask)], mask]), *source.dims[len(mask) :])
    if any(has_tokens(d) for tensor in indices if not tensor.scratch for d in tensor.dims):
        raise Mixing("padding rows would be written where their index points")
    if any(map(has_tokens, source.dims)):
        raise Mixing("it writes by index into a tensor that holds padding")
    return source.dims


@rule("slice_scatter select_scatter")
def slice_scatter(call: Call) -> Dims:
    source, part = call.tensor("self"), call.tensor("src")
    axis = axis_of(source.dims, call.arguments.get("dim", 0))
    numbers_are_static(call)
    if len(part.dims) < len(source.dims):
        part = Tracked((*part.dims[:axis], (1,), *part.dims[axis:]))
    if has_tokens(source.dims[axis]):
        if size_of(part.dims[axis]) != size_of(source.dims[axis]):
            raise Mixing("it writes a part of a dimension that holds padding")
        return broadcast([source.dims, part.dims])
    _others_alike(source, part, axis)
    return source.dims


@rule("copy_")
def copy_into(call: Call) -> Dims:
    target, source = call.tensor("self"), call.tensor("src")
    broadcast([target.dims, source.dims])
    if any(map(has_tokens, source.dims)) and not any(map(has_tokens, target.dims)):
        raise Mixing("it writes padding into a tensor without any")
    return target.dims
