"""Views, parts, joins and paddings: ops that move entries."""

from __future__ import annotations

from typing import Any

import sympy

from .call import Call, rules
from .dims import (
    Dim,
    Dims,
    Free,
    Mixing,
    Partial,
    as_expr,
    broadcast,
    concrete,
    dims_of,
    has_tokens,
    is_dynamic,
    is_free,
    is_prefix,
    need_prefix,
    need_static,
    regroup,
    same_size,
    size_of,
)

__all__: list[str] = []


@rules(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "unsqueeze", "squeeze",
    sizes=("size", "shape", "sizes", "stride"), layout=True,
)  # fmt: skip
def view(call: Call) -> Dims:
    return regroup(call.tensor("self").dims, call.shapes[0])


@rules("permute", layout=True)
def permute(call: Call) -> Dims:
    dims = call.tensor("self").dims
    return tuple(dims[i % len(dims)] for i in call.arguments["dims"])


@rules("transpose", "t", "mT", "adjoint", "swapaxes", "swapdims", layout=True)
def transpose(call: Call) -> Dims:
    dims = list(call.tensor("self").dims)
    if len(dims) < 2:
        return tuple(dims)
    default = (-2, -1) if call.base in ("mT", "adjoint") else (0, 1)
    one = call.arguments.get("dim0", call.arguments.get("axis0", default[0])) % len(dims)
    other = call.arguments.get("dim1", call.arguments.get("axis1", default[1])) % len(dims)
    dims[one], dims[other] = dims[other], dims[one]
    return tuple(dims)


@rules("expand", "broadcast_to", sizes=("size",), layout=True)
def expand(call: Call) -> Dims:
    dims, shape = call.tensor("self").dims, [as_expr(size) for size in call.shapes[0]]
    dims = ((1,),) * (len(shape) - len(dims)) + dims
    return tuple(_repeated(size) if size_of(d) == 1 else d for d, size in zip(dims, shape, strict=True))


def _repeated(size: Any) -> Dim:
    return (Free(size),) if is_dynamic(size) else (size,)


@rules("repeat", sizes=("repeats",))
def repeat(call: Call) -> Dims:
    dims, repeats = call.tensor("self").dims, [as_expr(r) for r in call.arguments["repeats"]]
    dims = ((1,),) * (len(repeats) - len(dims)) + dims
    result: list[Dim] = []
    for dim, times in zip(dims, repeats, strict=True):
        if times == 1:
            result.append(dim)
            continue
        # Entry i of each repetition is entry i.
        result.append(_repeated(times) if size_of(dim) == 1 else (*_repeated(times), *dim))
    return tuple(result)


@rules("select", sizes=("index",), layout=True)
def select(call: Call) -> Dims:
    dims = call.tensor("self").dims
    axis, index = call.arguments["dim"] % len(dims), as_expr(call.arguments["index"])
    dim = dims[axis]
    if not is_free(dim):
        if not isinstance(index, int):
            raise Mixing("it uses a dynamic size as a number (index)")
        if has_tokens(dim) and not (index == 0 and not any(isinstance(f, Partial) for f in dim)):
            raise Mixing(f"it takes entry {index} of a dimension that holds padding")
    return dims[:axis] + dims[axis + 1 :]


@rules("slice", sizes=("start", "end"), layout=True)
def slice_(call: Call) -> Dims:
    dims = list(call.tensor("self").dims)
    axis = call.arguments.get("dim", 0) % len(dims)
    start, step = as_expr(call.arguments.get("start", 0)), as_expr(call.arguments.get("step", 1))
    dims[axis] = _sliced(dims[axis], as_expr(call.shapes[0][axis]), start, step)
    return tuple(dims)


def _sliced(dim: Dim, new: Any, start: Any, step: Any) -> Dim:
    """Entry i is entry ``start + i * step``: if that does not depend on the sizes, it is real for every real i."""
    size = size_of(dim)
    if is_free(dim):
        return _repeated(new)
    if not isinstance(step, int) or not isinstance(start, int):
        raise Mixing("it uses a dynamic size as a number (start)")
    if not has_tokens(dim):
        # From the end: a static dimension has the same end at all sizes.
        return (new,)
    if same_size(new, size) and start == 0 and step == 1:
        return dim
    if start < 0:
        raise Mixing("it cuts off a part that is counted from the end of a dimension that holds padding")
    last = start + (new - 1) * step
    if is_prefix(dim):
        if is_dynamic(new) or last == 0:
            return (new,)
        raise Mixing(f"it cuts a dimension that holds padding to {new}")
    if len(dim) == 1 and isinstance(dim[0], Partial):
        spare = as_expr(sympy.sympify(dim[0].valid) - 1 - last)
        if isinstance(spare, int) and spare >= 0:
            return (new,)
    raise Mixing("it cuts a dimension with padding between its real entries")


@rules("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk",
       layout=True)  # fmt: skip
def split(call: Call) -> list[Dims]:
    dims = call.tensor("self").dims
    axis = call.arguments.get("dim", 0) % len(dims)
    need_static(dims[axis], "splits")
    result = []
    for shape in call.shapes:
        part = () if len(shape) < len(dims) else ((as_expr(shape[axis]),),)
        result.append((*dims[:axis], *part, *dims[axis + 1 :]))
    return result


@rules("stack")
def stack(call: Call) -> Dims:
    tensors = call.tensors()
    merged = broadcast([t.dims for t in tensors])
    axis = call.arguments.get("dim", 0) % (len(merged) + 1)
    return (*merged[:axis], (len(tensors),), *merged[axis:])


@rules("cat")
def cat(call: Call) -> Dims:
    tensors = [t for t in call.tensors() if t.dims != ((0,),)]
    if not tensors:
        return dims_of(call.shapes[0])
    axis = call.arguments.get("dim", 0) % len(tensors[0].dims)
    for tensor in tensors[:-1]:
        need_static(tensor.dims[axis], "joins along")
    last = concrete(tensors[-1].dims[axis])
    if has_tokens(last) and len(tensors) > 1 and not is_prefix(last):
        raise Mixing("it joins along a dimension with padding between the real entries")
    merged = broadcast([(*t.dims[:axis], (1,), *t.dims[axis + 1 :]) for t in tensors])
    # Static parts first: the real entries stay in front of the padding.
    joined = last if len(tensors) == 1 else (as_expr(call.shapes[0][axis]),)
    return (*merged[:axis], joined, *merged[axis + 1 :])


@rules(
    "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", sizes=("pad", "padding"),
)  # fmt: skip
def pad(call: Call) -> Dims:
    dims = list(call.tensor("self").dims)
    widths = call.arguments.get("pad", call.arguments.get("padding"))
    for k in range(len(widths) // 2):
        axis, (before, after) = len(dims) - 1 - k, map(as_expr, widths[2 * k : 2 * k + 2])
        if before == 0 and after == 0:
            continue
        new, dim = as_expr(call.shapes[0][axis]), concrete(dims[axis])
        if not isinstance(before, int):
            raise Mixing("it uses a dynamic size as a number (pad)")
        if not has_tokens(dim) and isinstance(after, int):
            dims[axis] = (new,)
            continue
        need_prefix(dim, "pads")
        if before < 0 or call.base != "constant_pad_nd":
            raise Mixing("it pads a dimension that holds padding")
        # Behind the real entries would come zeros.
        cut = isinstance(after, int) and after <= 0
        dims[axis] = (new,) if cut else (Partial(new, as_expr(new - after)),)
    return tuple(dims)


@rules("flip", "roll")
def flip(call: Call) -> Dims:
    dims = call.tensor("self").dims
    for axis in call.arguments.get("dims") or range(len(dims)):
        if not is_free(dims[axis % len(dims)]):
            need_static(dims[axis % len(dims)], "moves the entries of")
    return dims


@rules("diagonal")
def diagonal(call: Call) -> Dims:
    dims = call.tensor("self").dims
    chosen = [call.arguments.get(name, d) % len(dims) for name, d in (("dim1", 0), ("dim2", 1))]
    for axis in chosen:
        need_static(dims[axis], "takes the diagonal of")
    return (*(d for i, d in enumerate(dims) if i not in chosen), dims_of(call.shapes[0])[-1])


@rules("unfold")
def unfold(call: Call) -> Dims:
    dims = list(call.tensor("self").dims)
    axis = call.arguments["dimension"] % len(dims)
    windows, width = dims_of(call.shapes[0])[axis], dims_of(call.shapes[0])[-1]
    need_prefix(dims[axis], "slides over")
    # Window i reads entries i * step and on, all real where window i exists at the real size.
    dims[axis] = windows
    return (*dims, width)


@rules("slice_scatter", sizes=("start", "end"))
def slice_scatter(call: Call) -> Dims:
    source, part = call.tensor("self").dims, call.tensor("src").dims
    axis = call.arguments.get("dim", 0) % len(source)
    start, step = as_expr(call.arguments.get("start", 0)), as_expr(call.arguments.get("step", 1))
    mine, other = source[axis], part[axis]
    others = broadcast([_without(source, axis), _without(part, axis)])
    if same_size(size_of(mine), size_of(other)) and start == 0 and step == 1:
        joined = broadcast([(mine,), (other,)])[0]
    elif not has_tokens(mine):
        need_static(other, "writes")
        if not isinstance(start, int) or not isinstance(step, int):
            raise Mixing("it uses a dynamic size as a number (start)")
        joined = mine
    else:
        # All from ``start`` on is written, entry i being i - start of what is written; or the first entry alone.
        tail = isinstance(start, int) and start >= 0 and same_size(size_of(other), as_expr(size_of(mine) - start))
        first = start == 0 and size_of(other) == 1
        if step != 1 or not (tail or first):
            raise Mixing("it writes a part of a dimension that holds padding")
        for dim in (mine, other):
            need_prefix(dim, "writes into")
        joined = concrete(mine)
    return (*others[:axis], joined, *others[axis + 1 :])


@rules("select_scatter", sizes=("index",))
def select_scatter(call: Call) -> Dims:
    source, part = call.tensor("self").dims, call.tensor("src").dims
    axis, index = call.arguments["dim"] % len(source), as_expr(call.arguments["index"])
    others = broadcast([_without(source, axis), (*part[:axis], (1,), *part[axis:])])
    if not isinstance(index, int):
        raise Mixing("it uses a dynamic size as a number (index)")
    if has_tokens(source[axis]) and index != 0:
        raise Mixing(f"it writes entry {index} of a dimension that holds padding")
    return (*others[:axis], concrete(source[axis]), *others[axis + 1 :])


def _without(dims: Dims, axis: int) -> Dims:
    return (*dims[:axis], (1,), *dims[axis + 1 :])
