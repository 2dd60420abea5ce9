"""Ops that leave every entry where it is, and ops that make tensors from nothing."""

from __future__ import annotations

from .call import Call, Tracked, rules
from .dims import Dims, Mixing, broadcast, concrete, dims_of, free_of, has_tokens, need_prefix, need_static, same_size, size_of

__all__: list[str] = []


@rules(
    "add", "where", "masked_fill", "fill", "copy", "nan_to_num", "hardswish", "floor_divide", "true_divide", "conj",
    "_conj", "_neg_view", "resolve_conj", "resolve_neg", "_prelu_kernel", "polar", "complex", "log_sigmoid",
    "fake_quantize_per_tensor_affine", "fake_quantize_per_tensor_affine_cachemask", "_conj_physical", "bitwise_not",
)  # fmt: skip
def pointwise(call: Call) -> list[Dims]:
    """Every op with the pointwise tag comes here."""
    dims = broadcast([t.dims for t in call.tensors()])
    return [dims] * len(call.shapes)


@rules("clone", "_to_copy", "alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous", layout=True)
def same(call: Call) -> Dims:
    return call.tensors()[0].dims


@rules("log_sigmoid_forward")
def log_sigmoid(call: Call) -> list[Dims]:
    dims = call.tensor("self").dims
    return [dims, dims if len(call.shapes[1]) == len(dims) else dims_of(call.shapes[1])]


@rules("view_as_complex")
def view_as_complex(call: Call) -> Dims:
    dims = call.tensor("self").dims
    need_static(dims[-1], "pairs the entries of")
    return dims[:-1]


@rules("view_as_real")
def view_as_real(call: Call) -> Dims:
    return (*call.tensor("self").dims, (2,))


@rules("isin")
def isin(call: Call) -> Dims:
    elements = call.arguments.get("elements")
    tests = call.arguments.get("test_elements")
    if isinstance(tests, Tracked):
        for dim in tests.dims:
            need_static(dim, "searches")
    return elements.dims if isinstance(elements, Tracked) else ()


@rules("bucketize")
def bucketize(call: Call) -> Dims:
    need_static(call.tensor("boundaries").dims[0], "searches")
    source = call.arguments["self"]
    return source.dims if isinstance(source, Tracked) else ()


@rules("searchsorted")
def searchsorted(call: Call) -> Dims:
    edges, source = call.tensor("sorted_sequence"), call.arguments["self"]
    need_static(edges.dims[-1], "searches")
    if not isinstance(source, Tracked):
        return edges.dims[:-1]
    if len(edges.dims) == 1:
        return source.dims
    need_static(source.dims[-1], "looks up")
    return (*broadcast([edges.dims[:-1], source.dims[:-1]]), source.dims[-1])


@rules(
    "full", "zeros", "ones", "empty", "empty_strided", "new_full", "new_zeros", "new_ones", "new_empty",
    "new_empty_strided", "scalar_tensor", sizes=("size", "stride"),
)  # fmt: skip
def created(call: Call) -> Dims:
    return free_of(call.shapes[0])


@rules("full_like", "zeros_like", "ones_like", "empty_like")
def created_like(call: Call) -> Dims:
    return free_of(call.shapes[0])


@rules("arange", sizes=("end",))
def arange(call: Call) -> Dims:
    return dims_of(call.shapes[0])


@rules("eye", sizes=("n", "m"))
def eye(call: Call) -> Dims:
    return dims_of(call.shapes[0])


@rules("tril", "triu")
def triangle(call: Call) -> Dims:
    *outer, rows, columns = call.tensor("self").dims
    for dim in (rows, columns):
        need_prefix(dim, "counts along")
    return (*outer, concrete(rows), concrete(columns))


@rules("rand")
def random(call: Call) -> list[Dims]:
    """Every op with the tag of random ops comes here."""
    if any(t.dynamic for t in call.tensors()) or any(has_tokens(d) for s in call.shapes for d in dims_of(s)):
        raise Mixing("it draws random numbers for the padding too, so that the real rows get others")
    return [dims_of(shape) for shape in call.shapes]


@rules("native_dropout")
def native_dropout(call: Call) -> list[Dims]:
    if call.arguments.get("train") is False:
        return [call.tensor("input").dims] * 2
    return random(call)


@rules("copy_")
def copy_into(call: Call) -> Dims:
    """What a functional form ends with, for each input that the piece mutates."""
    target, source = call.tensor("self"), call.tensor("src")
    dims = broadcast([target.dims, source.dims])
    for mine, merged in zip(target.dims, dims, strict=True):
        if not same_size(size_of(mine), size_of(merged)):
            raise Mixing("it writes padding into a tensor that has none")
    return dims


@rules("glu")
def glu(call: Call) -> Dims:
    dims = list(call.tensor("self").dims)
    axis = call.arguments["dim"] % len(dims)
    need_static(dims[axis], "halves")
    dims[axis] = dims_of(call.shapes[0])[axis]
    return tuple(dims)


@rules("equal", "_local_scalar_dense", "item", "is_nonzero", "_assert_async", "_functional_assert_async")
def read_by_host(call: Call) -> list[Dims]:
    for tensor in call.tensors():
        for dim in tensor.dims:
            need_static(dim, "reads")
    return [dims_of(shape) for shape in call.shapes]


@rules(
    "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "_assert_scalar", "_functional_assert_scalar",
    "sym_constrain_range", "sym_constrain_range_for_size", "_assert_tensor_metadata",
    sizes=("self", "dim", "size", "min", "max", "stride", "a"),
)  # fmt: skip
def says_sizes(call: Call) -> list[Dims]:
    return []

