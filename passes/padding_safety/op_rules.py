"""The rules of the padding analysis for torch's ops."""

from __future__ import annotations

from typing import Any

import sympy

from ..dimension_maps import MAPPED, map_of
from .dims import (
    Causal,
    Dim,
    Dims,
    Mixing,
    as_expr,
    broadcast,
    dims_of,
    expanded,
    has_tokens,
    is_prefix,
    regroup,
    size_of,
)  # fmt: skip
from .rules import (
    WILD,
    Call,
    Tracked,
    axis_of,
    need_static,
    numbers_are_static,
    packet_of,
    pointwise,
    random,
    register_row_rule,
    rule,
    same,
    static_number,
)  # fmt: skip

# -- dimensions that stay, move, or are read along ----------------------------------------------------------------


@rule(" ".join(MAPPED))
def mapped(call: Call) -> list[Dims]:
    """Ops on one tensor, see :mod:`..dimension_maps`."""
    if "other" in call.arguments:
        # max and min of two tensors.
        dims = pointwise(call)
        return dims if isinstance(dims, list) else [dims]
    source = call.tensors()[0]
    sizes, shapes = [size_of(d) for d in source.dims], [[expanded(n) for n in shape] for shape in call.shapes]
    found = map_of(packet_of(call.op), call.arguments, sizes, shapes)
    if found.reads:
        # Of windows.
        static_number(call.arguments.get("size"), "size")
    for axis in sorted(found.reads):
        call.reads_over(source, axis, found.verb, found.neutral)
    fresh = [dims_of(shape) for shape in call.shapes]
    return [tuple(new[i] if axis is None else source.dims[axis] for i, axis in enumerate(dims))
            for dims, new in zip(found.results, fresh, strict=True)]  # fmt: skip


@rule("view _unsafe_view reshape _reshape_alias flatten unflatten unsqueeze squeeze")
def view(call: Call) -> Tracked:
    source = call.tensors()[0]
    return Tracked(regroup(source.dims, call.shapes[0]), source.scratch)


@rule("repeat")
def repeat(call: Call) -> Dims:
    dims, repeats = call.tensor("self").dims, call.arguments["repeats"]
    result: list[Dim] = []
    for dim, times in zip(((1,),) * (len(repeats) - len(dims)) + dims, map(as_expr, repeats), strict=True):
        if times == 1:
            result.append(dim)
        elif size_of(dim) == 1:
            result.append(dims_of([times])[0])
        else:
            need_static(dim, "repeats")
            static_number(times, "repeats")
            result.append((size_of(dim) * times,))
    return tuple(result)


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
    axis = axis_of(dims, call.arguments.get("dim", 0))
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
        # Counted from the front: entries at the result's real size are eager's.
        static_number(call.arguments.get("step", 1), "step")
        dims[axis] = dims_of([new])[0]
    elif start == 0 and len(dims[axis]) == 1 and isinstance(dims[axis][0], Causal) and new == dims[axis][0].valid:
        dims[axis] = (new,)
    else:
        raise Mixing("it cuts a dimension that holds padding" + (f" to {end}" if start == 0 else ""))
    return tuple(dims)


@rule("cat stack")
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


@rule("tril triu")
def triangle(call: Call) -> Dims:
    numbers_are_static(call)
    dims = call.tensor("self").dims
    if call.arguments.get("diagonal", 0) and not all(map(is_prefix, dims[-2:])):
        raise Mixing("its diagonal lies elsewhere where there is padding between the real entries")
    return dims


# -- new tensors --------------------------------------------------------------------------------------------------


@rule("full zeros ones empty empty_strided new_full new_zeros new_ones new_empty new_empty_strided scalar_tensor "
      "full_like zeros_like ones_like empty_like")  # fmt: skip
def created(call: Call) -> Dims:
    for name in ("fill_value", "value", "low", "high", "s"):
        if not isinstance(call.arguments.get(name), Tracked):
            static_number(call.arguments.get(name), "value" if name == "s" else name)
    return call.tensor("self").dims if packet_of(call.op).endswith("_like") else dims_of(call.shapes[0])


@rule("arange")
def arange(call: Call) -> Dims:
    for name in ("start", "step"):
        static_number(call.arguments.get(name), name)
    dims = dims_of(call.shapes[0])
    if has_tokens(dims[0]) and len([f for f in dims[0] if f != 1]) > 1:
        dims = ((size_of(dims[0]),),)
    return dims


# -- products, scans, convolutions, attention ---------------------------------------------------------------------

#: Names of the factors; a third tensor is added.
_FACTORS = (("mat1", "mat2"), ("batch1", "batch2"), ("mat", "vec"), ("input", "weight"), ("self", "mat2"),
            ("self", "vec"), ("self", "tensor"))  # fmt: skip


@rule("mm _int_mm bmm addmm baddbmm addmv mv dot linear")
def matmul(call: Call) -> Dims:
    numbers_are_static(call)
    names = next(pair for pair in _FACTORS if call.arguments.keys() >= set(pair))
    a, b = map(call.tensor, names)
    if "weight" in names:
        need_static(b.dims[-1], "sums over")
        need_static(a.dims[-1], "sums over")
        return (*a.dims[:-1], b.dims[0]) if len(b.dims) > 1 else a.dims[:-1]
    inner = -2 if len(b.dims) > 1 else 0
    for one, axis, other in ((a, -1, b), (b, inner, a)):
        if has_tokens(one.dims[axis]) and one.known and other.finiteness < WILD:
            # Zeros in one factor mask the other's padding.
            call.reads_over(one, axis, "sums over", 0)
            break
    else:
        need_static(a.dims[-1], "sums over")
        need_static(b.dims[inner], "sums over")
    result = (*broadcast([a.dims[:-2], b.dims[:-2]]), *a.dims[-2:-1], *(b.dims[-1:] if len(b.dims) > 1 else ()))
    added = call.arguments.get("self") if "self" not in names else None
    return broadcast([result, added.dims]) if isinstance(added, Tracked) else result


@rule("cumsum cumprod cummax cummin logcumsumexp")
def scan(call: Call) -> list[Dims]:
    source = call.tensors()[0]
    numbers_are_static(call)
    axis = axis_of(source.dims, call.arguments.get("dim", 0))
    if source.dims and has_tokens(source.dims[axis]):
        if not is_prefix(source.dims[axis]):
            raise Mixing("it scans a dimension with padding between the real entries")
        call.kind = "prefix"
    return [source.dims] * len(call.shapes)


@rule("convolution _convolution cudnn_convolution")
def convolution(call: Call) -> Dims:
    source, weight = call.tensor("input"), call.tensor("weight")
    need_static(source.dims[1], "sums over")
    for dim in weight.dims if call.arguments.get("transposed") else weight.dims[1:]:
        need_static(dim, "sums over")
    result = list(dims_of(call.shapes[0]))
    result[0] = source.dims[0]
    for axis in range(2, len(source.dims)):
        if has_tokens(source.dims[axis]):
            result[axis] = _causal(call, source.dims[axis], size_of(weight.dims[axis]), axis)
    return tuple(result)


def _causal(call: Call, dim: Dim, kernel: Any, axis: int) -> Dim:
    """Left padding of a whole kernel and stride 1: entry i depends on entries up to i, the last ones are to be cut."""
    stride, padding, dilation = (
        call.arguments[k][axis - 2 if len(call.arguments[k]) > 1 else 0] for k in ("stride", "padding", "dilation")
    )
    if call.arguments.get("transposed") or stride != 1 or len(dim) != 1:
        raise Mixing("it convolves over a dimension that holds padding")
    if kernel == 1 and padding == 0:
        return dim
    if padding != dilation * (kernel - 1):
        raise Mixing("it convolves over a dimension that holds padding, and not causally")
    call.kind = "prefix"
    return (Causal(as_expr(call.shapes[0][axis]), dim[0]),)


@rule("_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
      "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
      "_scaled_dot_product_attention_math")  # fmt: skip
def attention(call: Call) -> list[Dims]:
    if call.arguments.get("dropout_p"):
        return random(call)
    q, k, v = (call.tensor(n) for n in ("query", "key", "value"))
    for dim in (dim for tensor in (q, k, v) for dim in tensor.dims[-2:]):
        need_static(dim, "attends over")
    return [(*q.dims[:-1], v.dims[-1])] + [dims_of(shape) for shape in call.shapes[1:]]


@rule("grid_sampler_2d grid_sampler_3d")
def grid_sampler(call: Call) -> Dims:
    source, grid = call.tensor("input"), call.tensor("grid")
    for dim in (*source.dims[1:], *grid.dims[1:]):
        need_static(dim, "mixes the entries of")
    return (*broadcast([source.dims[:1], grid.dims[:1]]), *dims_of(call.shapes[0])[1:])


# -- ops that need their real size, checks, collectives -----------------------------------------------------------


@rule("nonzero nonzero_static _unique _unique2 unique_dim unique_consecutive bincount block_diag _embedding_bag "
      "_embedding_bag_forward_only segment_reduce histc as_strided as_strided_scatter diagonal tril_indices "
      "triu_indices masked_select masked_scatter index_reduce _local_scalar_dense item dist cdist _cdist_forward trace "
      "linspace logspace eye one_hot equal repeat_interleave addbmm "
      # These raise where a value is out of range, that of padding too.
      "binary_cross_entropy nll_loss_forward nll_loss2d_forward multi_margin_loss "
      "multilabel_margin_loss_forward")  # fmt: skip
def full_size(call: Call) -> list[Dims]:
    for dim in (dim for tensor in call.tensors() for dim in tensor.dims):
        need_static(dim, "mixes the entries of")
    if packet_of(call.op) != "eye":
        numbers_are_static(call)
    return [dims_of(shape) for shape in call.shapes]


@rule("sym_size sym_stride sym_numel sym_storage_offset _assert_scalar sym_constrain_range_for_size "
      "sym_constrain_range _assert_tensor_metadata")  # fmt: skip
def check_only(call: Call) -> list[Dims]:
    return []


def gathered_over_ranks(call: Call) -> Dims:
    """The ranks' rows, one after the other."""
    dims = call.tensors()[0].dims
    return ((as_expr(call.arguments["group_size"]), *dims[0]), *dims[1:])


# A sum over ranks leaves every row where it is.
for _name in ("all_reduce", "wait_tensor", "all_reduce_coalesced", "broadcast"):
    for _namespace in ("_c10d_functional", "_c10d_functional_autograd"):
        register_row_rule(f"{_namespace}::{_name}", same)
register_row_rule("_c10d_functional::all_gather_into_tensor", gathered_over_ranks)
