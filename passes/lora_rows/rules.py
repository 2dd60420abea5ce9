"""What an op does with the tokens of rows: a rule takes those of its arguments and gives those of its results.

What kind of op it is comes from the padding analysis: ops that share a rule there (:mod:`.rules`) share one
here. Without a rule, the rows are lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..padding_safety import indexing, rules, shapes, sums
from ..padding_safety.dims import as_expr
from .calls import Result, RowCall, Rule
from .layouts import (
    Lost,
    Order,
    Rows,
    State,
    aligned,
    columns,
    expanded,
    fused,
    listed,
    meet,
    moving,
    quotient,
    regroup,
    size_of,
    unpicked,
)

__all__ = ["queried", "rows_after"]


def together(c: RowCall) -> Result:
    """Each entry is made of the entries there of all arguments; a number in a tensor is of no row."""
    states = [c.state(t) for t in c.tensors if any(as_expr(size) != 1 for size in t.shape)]
    found = meet(states, c.shape)
    if isinstance(found, Lost) and c.results[0].dtype is torch.bool and found not in states:
        # A comparison of rows is of no row.
        return None
    return found


def of_first(c: RowCall) -> Result:
    """Every entry stays where it is, whatever others have a part in it."""
    return queried(c, c.tensors[0]) if c.tensors else None


def queried(c: RowCall, query: torch.Tensor) -> Result:
    """Results whose rows are the query's; how wide the heads are may change."""
    state = c.state(query)
    if not isinstance(state, Rows):
        return state
    found: list[State] = []
    for result in c.results:
        dims = [columns(size) for size in result.shape]
        fits = len(dims) == len(state.dims) and all(
            size_of(dim) == size_of(own) for dim, own in zip(state.dims, dims, strict=True) if moving(dim)
        )
        own = [dim if moving(dim) else own for dim, own in zip(state.dims, dims, strict=False)]
        found.append(state.like(own) if fits else None)
    return found if found[0] is not None else c.lost()


def with_rows(function: Callable[[RowCall, Rows], Result]) -> Rule:
    """A rule for an op on one tensor, whose rows are known."""

    def rule(c: RowCall) -> Result:
        state = c.state(c.tensors[0])
        return function(c, state) if isinstance(state, Rows) else state

    return rule


def viewed(c: RowCall, rows: Rows) -> Result:
    if isinstance(c.get("dtype"), torch.dtype):
        return rows.replaced(len(rows.dims) - 1, columns(c.shape[-1]))
    return regroup(rows, c.shape) or c.lost()


def permuted(c: RowCall, rows: Rows) -> Result:
    rank, order = len(rows.dims), list(range(len(rows.dims)))
    if "dims" in c.arguments:
        order = [d % rank for d in c.arguments["dims"]]
    elif rank > 1:
        one, two = c.axis(rank, "dim0", 0), c.axis(rank, "dim1", 1)
        order[one], order[two] = two, one
    return rows.like(rows.dims[i] for i in order)


def repeated(c: RowCall, rows: Rows) -> Result:
    counts = c.arguments["repeats"]
    dims = [*[()] * (len(counts) - len(rows.dims)), *rows.dims]
    return rows.like((*columns(count), *dim) for count, dim in zip(counts, dims, strict=True))


def cut(c: RowCall, rows: Rows, d: int, start: Any, size: Any, step: Any = 1) -> State:
    """``size`` entries of a dimension."""
    dim, size = fused(rows.dims[d]), expanded(size)
    if (size == size_of(dim) and step == 1) or not moving(dim):
        return rows.replaced(d, dim if moving(dim) else columns(size))
    if len(dim) > 1:
        # One of several repetitions.
        repetition = dim[0][1] == 0 and step == 1 and size == size_of(dim[1:]) and quotient(as_expr(start), size)
        return c.lost() if repetition is None or repetition is False else rows.replaced(d, dim[1:])
    ((_, stride),) = dim
    offset = expanded(rows.offset + as_expr(start) * stride)
    return Rows(rows.order, offset, rows.replaced(d, fused([(size, expanded(stride * step))])).dims)


def sliced(c: RowCall, rows: Rows) -> Result:
    d = c.axis(len(rows.dims))
    start, size = as_expr(c.get("start", default=0)), size_of(rows.dims[d])
    if isinstance(start, int) and start < 0:
        # As the op does: where the dimension is shorter than that, it begins at 0.
        if isinstance(size, int):
            start = max(0, size + start)
        else:
            start = size - c.shape[d] if c.get("end", default=2**63 - 1) == 2**63 - 1 else size + start
    return cut(c, rows, d, start, c.shape[d], c.get("step", default=1))


def divided(c: RowCall, rows: Rows) -> Result:
    """One part behind the other; those without the dimension are entries of it."""
    d, start = c.axis(len(rows.dims)), as_expr(c.get("index", default=0))
    found: list[State] = []
    for result in c.results:
        entry = result.dim() < len(rows.dims)
        at = size_of(rows.dims[d]) + start if isinstance(start, int) and start < 0 else start
        part = cut(c, rows, d, at, 1 if entry else result.shape[d])
        found.append(part.replaced(d) if entry and isinstance(part, Rows) else part)
        start = expanded(start + (1 if entry else as_expr(result.shape[d])))
    return found


def turned(c: RowCall, rows: Rows) -> Result:
    offset, dims = rows.offset, list(rows.dims)
    for d in c.arguments["dims"]:
        offset = expanded(offset + sum((size - 1) * stride for size, stride in dims[d]))
        dims[d] = tuple((size, expanded(-stride)) for size, stride in dims[d])
    return Rows(rows.order, offset, tuple(dims)) if c.op == "aten::flip" else c.lost()


def joined(c: RowCall) -> Result:
    rank, stacks = len(c.shape), c.op == "aten::stack"
    d = c.axis(rank)
    states = [c.state(t) for t in c.tensors if stacks or t.dim() == rank]
    known = [s for s in states if isinstance(s, Rows)]
    if len(known) < len(states) and d < rank - 1:
        # Beside rows there would be others that are of no token.
        return c.lost() if any(s is not None for s in states) else None
    if stacks or not any(moving(s.dims[d]) for s in known):
        own = [s.like((*s.dims[:d], (), *s.dims[d + (not stacks) :])) for s in known]
        return meet([*own, *(s for s in states if isinstance(s, Lost))], c.shape)
    if len(known) < len(states) or any(moving(*s.replaced(d).dims) for s in known):
        return c.lost()
    order = Order(c.shape[d], tuple(s.like((s.dims[d],)) for s in known), place=c.place)
    return known[0] if len(known) == 1 else listed(known[0], d, order, [c.shape[d]])


def over_dims(c: RowCall, rows: Rows) -> Result:
    """Entries along some dimensions become one, or get an order of their own; the others stay."""
    rank = len(rows.dims)
    given = c.get("dim", default=-1 if c.op in ("aten::topk", "aten::sort", "aten::kthvalue", "aten::mode") else [])
    chosen = {d % max(1, rank) for d in (given if isinstance(given, (list, tuple)) else [given])} or set(range(rank))
    if moving(*(dim for d, dim in enumerate(rows.dims) if d in chosen)):
        return None
    if c.results[0].dim() == rank:
        return rows.like(columns(c.shape[d]) if d in chosen else dim for d, dim in enumerate(rows.dims))
    return rows.like(dim for d, dim in enumerate(rows.dims) if d not in chosen)


def product(c: RowCall) -> Result:
    """Rows of the first factor, else columns of the second; what is summed over is neither."""
    bias = c.get("self") if "mat1" in c.arguments or "batch1" in c.arguments else c.get("bias")
    factors = [t for t in c.tensors if t is not bias]
    if len(factors) != 2 or ("weight" in c.arguments and c.state(factors[1]) is not None):
        return c.lost()
    a, b, vector = c.state(factors[0]), c.state(factors[1]), factors[1].dim() == 1
    result: State = a if isinstance(a, Lost) else None
    if isinstance(a, Rows) and not moving(a.dims[-1]):
        rows = aligned(a.like(a.dims[:-1]), c.shape if vector else c.shape[:-1])
        result = rows if vector else a.like((*rows.dims, columns(c.shape[-1])))
    elif a is None and b is not None:
        if isinstance(b, Lost) or vector:
            return c.lost()
        result = None if moving(b.dims[-2]) else aligned(b.like((*b.dims[:-2], (), b.dims[-1])), c.shape)
    return meet([result, c.state(bias) if isinstance(bias, torch.Tensor) else None], c.shape)


def looked_up(c: RowCall) -> Result:
    source = c.get("weight", "self")
    d = c.axis(source.dim()) if c.op == "aten::index_select" else 0
    indices = c.get("indices", "index")
    return taken(c, source, [*[None] * d, indices] if isinstance(indices, torch.Tensor) else list(indices))


def taken(c: RowCall, source: torch.Tensor, indices: list[Any]) -> State:
    state, used = c.state(source), [i for i, index in enumerate(indices) if index is not None]
    given, first, last = [indices[i] for i in used], used[0], used[-1]
    if isinstance(state, Lost):
        return state
    if any(index.dtype in (torch.bool, torch.uint8) for index in given) or (len(given) > 1 and state is not None):
        return c.lost() if state is not None or any(c.state(index) is not None for index in given) else None
    if isinstance(state, Rows) and moving(state.dims[first]):
        return picked(c, state, first, given[0], [as_expr(size) for size in given[0].shape])
    # The rows are those of the index, and what is left of the source's.
    rank, rest = max(index.dim() for index in given), source.dim() - 1 - last
    first = first if last - first == len(used) - 1 else 0
    own = [s.like((*aligned(s, [1] * rank).dims, *[()] * rest)) if isinstance(s, Rows) else s
           for s in map(c.state, given)]  # fmt: skip
    return meet([*own, state.replaced(first, *[()] * rank) if isinstance(state, Rows) else None], c.shape)


def picked(
    c: RowCall, rows: Rows, d: int, index: torch.Tensor, sizes: list[Any], along: int | None = None
) -> State:  # fmt: skip
    """Rows picked along a dimension by an index, of which one dimension counts or all."""
    key, dim = c.indices.key(index), rows.dims[d]
    if moving(*rows.replaced(d).dims):
        return Lost("it picks tokens of each sequence")
    if (quotient := c.indices.quotient(key)) is not None and along is None:
        # x[i // k] is x.repeat_interleave(k)[i]: the tokens of a dispatch to k experts each.
        key, index, count = quotient
        dim = (*dim, (count, 0))
    if rows.order.index is not None and (inverse := c.indices.permutations.get(key)) is not None:
        found = unpicked(rows, d) if rows.order.key == inverse else None
        if found is not None and [size_of(found.dims[d])] == sizes:
            return found
    order = Order(size_of((size, 0) for size in sizes), (rows.like((dim,)),), key, index, along, c.place)
    return listed(rows, d, order, sizes)


def gathered(c: RowCall) -> Result:
    source, index = c.get("self"), c.get("index")
    state, own, d = c.state(source), c.state(index), c.axis(source.dim())
    if not isinstance(state, Rows) or not source.dim():
        return state or own
    others = [i for i in range(source.dim()) if i != d]
    if any(moving(state.dims[i]) and size_of(state.dims[i]) != c.shape[i] for i in others):
        return c.lost()
    rows = state.like(dim if i == d or moving(dim) else columns(c.shape[i]) for i, dim in enumerate(state.dims))
    if not moving(state.dims[d]):
        return meet([own, rows.replaced(d, ())], c.shape)
    if not all(as_expr(index.shape[i]) == 1 or as_expr(index.stride(i)) == 0 for i in others):
        return Lost("it gathers other rows for each column")
    return picked(c, rows, d, index, [c.shape[d]], d)


def put(c: RowCall) -> Result:
    """Rows that come back to where they were picked from are of those tokens again."""
    target, values, indices = c.get("self"), c.get("values", "source", "src"), c.get("indices", "index")
    indices = [*[None] * c.axis(target.dim()), indices] if isinstance(indices, torch.Tensor) else list(indices)
    used = [i for i, index in enumerate(indices) if index is not None]
    d, index, shape = used[0], indices[used[0]], [as_expr(size) for size in target.shape]
    state, given = c.state(target), c.state(values) if isinstance(values, torch.Tensor) else None
    if "scatter" in c.op:
        along = [state, given, c.state(index)]
        alone = any(isinstance(s, Lost) or (s is not None and moving(s.dims[d])) for s in along)
        return c.lost() if alone else meet((s.replaced(d, ()) for s in along if isinstance(s, Rows)), shape)
    if given is None or (isinstance(given, Rows) and not moving(*given.dims)):
        return state
    if isinstance(given, Rows) and len(used) == 1 and index.dim() == 1 and len(given.dims) == len(shape):
        key, count = c.indices.key(index), 1
        if key != given.order.key and (quotient := c.indices.quotient(key)) is not None:
            key, _, count = quotient
        picks = given.order.index is not None and given.order.along is None and given.order.key == key
        found = unpicked(given, d) if picks else None
        if found is not None and count != 1:
            # Those that were repeated are added up again.
            repeats = found.dims[d][-1:] == ((count, 0),)
            found = found.replaced(d, found.dims[d][:-1]) if repeats else None
        if found is not None and size_of(found.dims[d]) == shape[d]:
            return meet([state, found], shape)
    return c.lost()


def copied(c: RowCall) -> Result:
    return meet([c.state(t) for name in ("src", "other") if isinstance(t := c.get(name), torch.Tensor)], c.shape)


def padded(c: RowCall, rows: Rows) -> Result:
    """More columns; more rows would be of no token."""
    dims, pads = list(rows.dims), c.arguments["pad"]
    for i in range(len(pads) // 2):
        d = len(dims) - 1 - i
        if any(as_expr(pad) != 0 for pad in pads[2 * i : 2 * i + 2]):
            if moving(dims[d]):
                return c.lost()
            dims[d] = columns(c.shape[d])
    return rows.like(dims)


def collected(c: RowCall, rows: Rows) -> Result:
    """Every rank's part, one behind the other: of columns, where each rank has all tokens; else of who knows which."""
    strides = [entry for dim in rows.dims for entry in dim if entry[1] != 0]
    if rows.offset != 0 or size_of(strides) != rows.order.size:
        return Lost("ranks may have other tokens each")
    return rows.replaced(0, (*columns(c.get("group_size")), *rows.dims[0]))


def scattered(c: RowCall, rows: Rows) -> Result:
    """This rank's part of the first dimension."""
    return c.lost() if moving(rows.dims[0]) else rows.replaced(0, columns(c.shape[0]))


#: By the rule of the padding analysis.
_RULES: dict[Any, Rule] = {
    rules.pointwise: together,
    rules.same: together,
    shapes.view: with_rows(viewed),
    shapes.squeeze: with_rows(viewed),
    shapes.permute: with_rows(permuted),
    shapes.transpose: with_rows(permuted),
    shapes.expand: with_rows(lambda c, rows: aligned(rows, c.shape)),
    shapes.view_as_real: with_rows(lambda c, rows: rows.like((*rows.dims, columns(2)))),
    shapes.view_as_complex: with_rows(lambda c, rows: rows.like(rows.dims[:-1])),
    shapes.repeat: with_rows(repeated),
    shapes.select: with_rows(divided),
    shapes.slice_: with_rows(sliced),
    shapes.split: with_rows(divided),
    shapes.cat: joined,
    sums.matmul: product,
    # ``max`` and ``min`` may be of two tensors.
    sums.reduction: lambda c: (together if len(c.tensors) > 1 else with_rows(over_dims))(c),
    sums.along_static: with_rows(over_dims),
    sums.topk: with_rows(over_dims),
    sums.flip: with_rows(turned),
    indexing.embedding: looked_up,
    indexing.index: looked_up,
    indexing.index_select: looked_up,
    indexing.gather: gathered,
    indexing.scatter: put,
    indexing.index_put: put,
    indexing.copy_into: copied,
}
for _rule in (
    rules.random, shapes.triangle, sums.softmax, sums.scan, sums.renorm,
    sums.layer_norm, sums.group_norm, sums.batch_norm, sums.attention,
):  # fmt: skip
    _RULES[_rule] = of_first
for _rule in (shapes._created, shapes.scalar_tensor, shapes.like, shapes.arange):
    _RULES[_rule] = lambda c: None
_NAMED: dict[str, Rule] = {
    **dict.fromkeys(("aten::nonzero", "aten::bincount", "aten::histc", "aten::repeat_interleave"), lambda c: None),
    **{f"_c10d_functional::{name}": of_first for name in ("all_reduce", "all_reduce_", "broadcast", "wait_tensor")},
    "aten::constant_pad_nd": with_rows(padded),
    "_c10d_functional::all_gather_into_tensor": with_rows(collected),
    "_c10d_functional::reduce_scatter_tensor": with_rows(scattered),
    **dict.fromkeys(("aten::_grouped_mm", "transformers::grouped_mm_fallback"), of_first),
}


def rows_after(op: Any, c: RowCall) -> Result:
    """What is known of the results."""
    known = rules.rule_for(op) or rules.rule_for(c.op)
    rule = _NAMED.get(c.op) or _RULES.get(known)
    if rule is not None:
        return rule(c)
    related = [t for t in c.tensors if isinstance(s := c.state(t), Lost) or (s is not None and moving(*s.dims))]
    if related and known is not None and not c.op.startswith("aten::"):
        # Its owner says that rows stay rows.
        return queried(c, related[0])
    return c.lost() if related else None
