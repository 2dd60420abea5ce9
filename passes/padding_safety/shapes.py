"""Rules of ops that make tensors, or move and cut their dimensions."""

from __future__ import annotations

from typing import Any

import sympy

from .dims import Causal, Dims, Mixing, as_expr, broadcast, dims_of, has_tokens, is_prefix, regroup, size_of
from .rules import Call, Tracked, axis_of, need_static, numbers_are_static, rule, static_number


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def view(call: Call) -> Tracked:
    source = call.tensors()[0]
    return Tracked(regroup(source.dims, call.shapes[0]), source.scratch)


@rule("unsqueeze", "squeeze")
def squeeze(call: Call) -> Tracked:
    source = call.tensors()[0]
    return Tracked(regroup(source.dims, call.shapes[0]), source.scratch)


@rule("permute")
def permute(call: Call) -> Dims:
    dims = call.tensor("self").dims
    return tuple(dims[axis_of(dims, i)] for i in call.arguments["dims"])


@rule("transpose", "t", "mT", "adjoint")
def transpose(call: Call) -> Dims:
    dims = list(call.tensor("self").dims)
    if len(dims) < 2:
        return tuple(dims)
    one, other = (axis_of(tuple(dims), call.arguments.get(k, d)) for k, d in (("dim0", 0), ("dim1", 1)))
    dims[one], dims[other] = dims[other], dims[one]
    return tuple(dims)


@rule("expand", "broadcast_to")
def expand(call: Call) -> Dims:
    dims, shape = call.tensor("self").dims, call.shapes[0]
    new = dims_of(shape)
    offset = len(new) - len(dims)
    expanded = [new[i] if i < offset or size_of(dims[i - offset]) == 1 else dims[i - offset] for i in range(len(new))]
    return tuple(expanded)


@rule("view_as_real")
def view_as_real(call: Call) -> Dims:
    return (*call.tensor("self").dims, (2,))


@rule("view_as_complex")
def view_as_complex(call: Call) -> Dims:
    return call.tensor("self").dims[:-1]


@rule("repeat")
def repeat(call: Call) -> Dims:
    dims, repeats = call.tensor("self").dims, call.arguments["repeats"]
    dims = ((1,),) * (len(repeats) - len(dims)) + dims
    result = []
    for dim, times in zip(dims, repeats, strict=True):
        times = as_expr(times)
        if times == 1:
            result.append(dim)
        elif size_of(dim) == 1:
            result.append(dims_of([times])[0])
        else:
            need_static(dim, "repeats")
            static_number(times, "repeats")
            result.append((size_of(dim) * times,))
    return tuple(result)


def _created(call: Call) -> Dims:
    for name in ("fill_value", "value", "low", "high"):
        if name in call.arguments and not isinstance(call.arguments[name], Tracked):
            static_number(call.arguments[name], name)
    return dims_of(call.shapes[0])


rule("full", "zeros", "ones", "empty", "empty_strided", "new_full", "new_zeros", "new_ones", "new_empty",
      "new_empty_strided", "scalar_tensor")(_created)  # fmt: skip


@rule("scalar_tensor")
def scalar_tensor(call: Call) -> Dims:
    static_number(call.arguments["s"], "value")
    return ()


@rule("full_like", "zeros_like", "ones_like", "empty_like")
def like(call: Call) -> Dims:
    if "fill_value" in call.arguments:
        static_number(call.arguments["fill_value"], "fill_value")
    return call.tensor("self").dims


@rule("arange")
def arange(call: Call) -> Dims:
    for name in ("start", "step"):
        if name in call.arguments:
            static_number(call.arguments[name], name)
    dims = dims_of(call.shapes[0])
    if has_tokens(dims[0]) and len([f for f in dims[0] if f != 1]) > 1:
        dims = ((size_of(dims[0]),),)
    return dims


@rule("select")
def select(call: Call) -> Dims:
    dims = call.tensor("self").dims
    axis = axis_of(dims, call.arguments["dim"])
    if has_tokens(dims[axis]):
        index = as_expr(call.arguments["index"])
        from_front = isinstance(index, int) and index >= 0 and is_prefix(dims[axis])
        if not from_front and (index != 0 or isinstance(next(f for f in dims[axis] if f != 1), Causal)):
            raise Mixing(f"it takes entry {index} of a dimension that holds padding")
    else:
        static_number(call.arguments["index"], "index")
    return dims[:axis] + dims[axis + 1 :]


@rule("slice")
def slice_(call: Call) -> Dims | Tracked:
    dims = list(call.tensor("self").dims)
    axis = axis_of(tuple(dims), call.arguments.get("dim", 0))
    if dims_of([call.shapes[0][axis]])[0] == dims[axis]:
        return call.tensor("self")
    start, end = as_expr(call.arguments.get("start") or 0), as_expr(call.arguments.get("end"))
    new = as_expr(call.shapes[0][axis])
    if not has_tokens(dims[axis]):
        static_number([start], "slice")
        if isinstance(new, sympy.Basic) and start != 0:
            raise Mixing("it cuts a dimension to a dynamic size")
        # The first entries of what holds no padding: a guard says that there are as many.
        dims[axis] = dims_of([new])[0]
    elif is_prefix(dims[axis]) and isinstance(start, int) and start >= 0:
        # Counted from the first, so that the entries of the result at its real size are those of eager.
        static_number(call.arguments.get("step", 1), "step")
        dims[axis] = dims_of([new])[0]
    elif start == 0 and len(dims[axis]) == 1 and isinstance(dims[axis][0], Causal) and new == dims[axis][0].valid:
        dims[axis] = (new,)
    elif start != 0:
        raise Mixing("it cuts a dimension that holds padding")
    else:
        raise Mixing(f"it cuts a dimension that holds padding to {end}")
    return tuple(dims)


@rule("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk", "tensor_split")  # fmt: skip
def split(call: Call) -> Any:
    dims = call.tensor("self").dims
    axis = axis_of(dims, call.arguments.get("dim", 0))
    need_static(dims[axis], "splits")
    result = []
    for shape in call.shapes:
        rest = dims[:axis] + dims[axis + 1 :]
        result.append(rest if len(shape) < len(dims) else (*dims[:axis], (as_expr(shape[axis]),), *dims[axis + 1 :]))
    return result


@rule("cat", "stack")
def cat(call: Call) -> Dims:
    tensors = [t for t in call.tensors() if t.dims != ((0,),)]
    rank = len(call.shapes[0])
    axis = call.arguments.get("dim", 0) % rank
    if len(tensors[0].dims) < rank:
        merged = broadcast([t.dims for t in tensors])
        return (*merged[:axis], (len(tensors),), *merged[axis:])
    if len(tensors) == 1:
        return tensors[0].dims
    for tensor in tensors[:-1]:
        need_static(tensor.dims[axis], "joins along")
    if not is_prefix(tensors[-1].dims[axis]):
        raise Mixing("it joins along a dimension that holds padding")
    # Behind a fixed number of entries the last part's real ones still come first.
    merged = broadcast([(*t.dims[:axis], (1,), *t.dims[axis + 1 :]) for t in tensors])
    return (*merged[:axis], (as_expr(call.shapes[0][axis]),), *merged[axis + 1 :])


@rule("constant_pad_nd")
def pad(call: Call) -> Dims:
    numbers_are_static(call)
    dims, widths = list(call.tensor("self").dims), call.arguments["pad"]
    for k in range(len(widths) // 2):
        axis = len(dims) - 1 - k
        if widths[2 * k] or widths[2 * k + 1]:
            need_static(dims[axis], "pads")
            dims[axis] = (as_expr(call.shapes[0][axis]),)
    return tuple(dims)


@rule("tril", "triu")
def triangle(call: Call) -> Dims:
    numbers_are_static(call)
    dims = call.tensor("self").dims
    if call.arguments.get("diagonal", 0) and not all(map(is_prefix, dims[-2:])):
        raise Mixing("its diagonal lies elsewhere where there is padding between the real entries")
    return dims
