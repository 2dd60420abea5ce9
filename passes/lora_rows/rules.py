"""What an op does with the tokens of rows: a rule takes those of its arguments and gives those of its results.

What kind of op it is comes from the padding analysis: ops that share a rule there share one here, and ops on one
tensor follow from :mod:`..dimension_maps`. Without a rule, the rows are lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..dimension_maps import map_of
from ..padding_safety import index_rules, op_rules, rules
from ..padding_safety.dims import as_expr, expanded, quotient
from .layouts import (
    Lost,
    Order,
    Rows,
    State,
    aligned,
    columns,
    fused,
    listed,
    meet,
    moving,
    regroup,
    size_of,
    unpicked,
)  # fmt: skip
from .row_calls import Result, RowCall, Rule


def together(c: RowCall) -> Result:
    """Each entry is made of the entries there of all arguments; a number in a tensor is of no row."""
    states = [c.state(t) for t in c.tensors if any(as_expr(size) != 1 for size in t.shape)]
    found = meet(states, c.shape)
    if isinstance(found, Lost) and c.results[0].dtype is torch.bool and found not in states:
        # A comparison of rows is of no row.
        return None
    return found


def of_first(c: RowCall) -> Result:
    """Every entry stays in its place, even if it depends on others."""
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


def mapped(c: RowCall, rows: Rows) -> Result:
    """Dimensions that stay or move; along those that are read, entries are of no token, or of another one."""
    source = c.tensors[0]
    shapes = [[expanded(size) for size in result.shape] for result in c.results]
    found = map_of(rules.packet_of(c.op), c.arguments, [expanded(size) for size in source.shape], shapes)
    if found.after != "kept" and moving(*(rows.dims[d] for d in found.reads)):
        return None if found.after == "gone" else c.lost()
    made: list[State] = []
    for dims, shape in zip(found.results, shapes, strict=True):
        whole = all(d in dims for d, dim in enumerate(rows.dims) if moving(dim))
        own = rows.like(rows.dims[d] if d is not None else columns(shape[i]) for i, d in enumerate(dims))
        made.append(own if whole else None)
    return made if made[0] is not None else c.lost()


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
    return Rows(rows.order, offset, tuple(dims))


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
    """Rows picked along a dimension by an index: by one of its dimensions or by all."""
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
    # ``max`` and ``min`` may be of two tensors.
    op_rules.mapped: lambda c: (together if "other" in c.arguments else with_rows(mapped))(c),
    op_rules.view: with_rows(viewed),
    op_rules.repeat: with_rows(repeated),
    op_rules.select: with_rows(divided),
    op_rules.slice_: with_rows(sliced),
    op_rules.cat: joined,
    op_rules.matmul: product,
    op_rules.created: lambda c: None,
    op_rules.arange: lambda c: None,
    index_rules.embedding: looked_up,
    index_rules.index: looked_up,
    index_rules.index_select: looked_up,
    index_rules.gather: gathered,
    index_rules.scatter: put,
    index_rules.index_put: put,
    index_rules.copy_into: copied,
    **dict.fromkeys((rules.random, op_rules.triangle, op_rules.scan, op_rules.attention), of_first),
}
_NAMED: dict[str, Rule] = {
    **dict.fromkeys(("aten::nonzero", "aten::bincount", "aten::histc", "aten::repeat_interleave"), lambda c: None),
    **dict.fromkeys(("aten::_grouped_mm", "transformers::grouped_mm_fallback"), of_first),
    **dict.fromkeys((f"aten::{name}" for name in ("split", "split_with_sizes", "chunk", "unbind", "unsafe_split",
                                                  "unsafe_chunk", "tensor_split")), with_rows(divided)),
    "aten::flip": with_rows(turned),
    **{f"_c10d_functional::{name}": of_first for name in ("all_reduce", "all_reduce_", "broadcast", "wait_tensor")},
    "_c10d_functional::all_gather_into_tensor": with_rows(collected),
    "_c10d_functional::reduce_scatter_tensor": with_rows(scattered),
}  # fmt: skip


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
