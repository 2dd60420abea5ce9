"""Rules of ops that read several entries for one: sums, products, sorts, scans, norms, convolutions, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .dims import Causal, Dim, Dims, Mixing, as_expr, broadcast, dims_of, has_tokens, is_prefix, size_of
from .masks import WILD
from .rules import Call, Tracked, axis_of, need_static, numbers_are_static, random, register_row_rule, rule, same

_NEUTRAL: dict[str, float] = {
    "sum": 0, "nansum": 0, "any": 0, "count_nonzero": 0, "prod": 1, "all": 1, "amax": -math.inf, "max": -math.inf,
    "argmax": -math.inf, "logsumexp": -math.inf, "amin": math.inf, "min": math.inf, "argmin": math.inf,
}  # fmt: skip


@rule("mm", "_int_mm", "bmm", "addmm", "baddbmm", "matmul", "mv", "dot", "linear", "addmv")
def matmul(call: Call) -> Dims:
    numbers_are_static(call)
    a, b = (call.arguments.get(k) for k in (("mat1", "mat2") if "mat1" in call.arguments else ("self", "mat2")))
    if "batch1" in call.arguments:
        a, b = call.arguments["batch1"], call.arguments["batch2"]
    if "tensor" in call.arguments:
        b = call.arguments["tensor"]
    if "vec" in call.arguments:
        b = call.arguments["vec"]
    if "weight" in call.arguments:
        a, b = call.arguments["input"], call.arguments["weight"]
        need_static(b.dims[-1], "sums over")
        need_static(a.dims[-1], "sums over")
        return (*a.dims[:-1], b.dims[0]) if len(b.dims) > 1 else a.dims[:-1]
    if not isinstance(a, Tracked) or not isinstance(b, Tracked):
        raise Mixing("its operands are not known")
    _contracted(call, a, b)
    batch = broadcast([a.dims[:-2], b.dims[:-2]])
    result = (*batch, *(a.dims[-2:-1]), *(b.dims[-1:] if len(b.dims) > 1 else ()))
    bias = call.arguments.get("self") if "mat1" in call.arguments or "batch1" in call.arguments else None
    return broadcast([result, bias.dims]) if isinstance(bias, Tracked) else result


def _contracted(call: Call, a: Tracked, b: Tracked) -> None:
    """Sums over the last dimension of ``a`` and the last but one of ``b``: zeros in one mask the other's padding."""
    inner = -2 if len(b.dims) > 1 else 0
    for one, axis, other in ((a, -1, b), (b, inner, a)):
        if has_tokens(one.dims[axis]) and one.known and other.finiteness < WILD:
            call.reads_over(one, axis, "sums over", 0)
            return
    need_static(a.dims[-1], "sums over")
    need_static(b.dims[inner], "sums over")


def _neutral(call: Call) -> float | None:
    """The value that makes no difference to a reduction."""
    name = str(call.op).split(".")[1]
    if name in ("norm", "linalg_vector_norm"):
        order = call.arguments.get("ord", call.arguments.get("p", 2))
        return 0 if isinstance(order, (int, float)) and order >= 0 else None
    return _NEUTRAL.get(name)


def _reduced(call: Call) -> Dims:
    source = call.tensors()[0]
    numbers_are_static(call)
    axes = call.arguments.get("dim", call.arguments.get("dims"))
    keep = bool(call.arguments.get("keepdim", False))
    rank = len(source.dims)
    chosen = range(rank) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    chosen = {axis_of(source.dims, i) for i in chosen}
    for i in chosen:
        call.reads_over(source, i, "reduces", _neutral(call))
    return tuple((1,) if i in chosen else d for i, d in enumerate(source.dims) if keep or i not in chosen)


@rule("sum", "mean", "amax", "amin", "prod", "any", "all", "argmax", "argmin", "logsumexp", "linalg_vector_norm",
       "norm", "std", "var", "max", "min", "var_mean", "std_mean", "median", "nanmedian", "nansum", "count_nonzero",
       "aminmax", "mode", "kthvalue")  # fmt: skip
def reduction(call: Call) -> Any:
    dims = _reduced(call)
    return [dims] * len(call.shapes)


def _along(call: Call, what: str, neutral: float | None = None) -> Any:
    source = call.tensors()[0]
    numbers_are_static(call)
    axis = call.arguments.get("dim", -1)
    if source.dims:
        call.reads_over(source, axis_of(source.dims, axis), what, neutral)
    return source


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def softmax(call: Call) -> Any:
    source = _along(call, "works along", -math.inf)
    return [source.dims] * len(call.shapes)


@rule("sort", "argsort")
def along_static(call: Call) -> Any:
    source = _along(call, "works along")
    return [source.dims] * len(call.shapes)


@rule("renorm")
def renorm(call: Call) -> Dims:
    """Each entry along ``dim`` is scaled by the norm over all other dimensions."""
    source = call.tensor("self")
    numbers_are_static(call)
    axis = axis_of(source.dims, call.arguments["dim"])
    for i, dim in enumerate(source.dims):
        if i != axis:
            need_static(dim, "takes the norm over")
    return source.dims


@rule("topk")
def topk(call: Call) -> Any:
    source = _along(call, "selects from")
    axis = axis_of(source.dims, call.arguments.get("dim", -1))
    dims = tuple((as_expr(call.arguments["k"]),) if i == axis else d for i, d in enumerate(source.dims))
    return [dims, dims]


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
def scan(call: Call) -> Any:
    source = call.tensors()[0]
    numbers_are_static(call)
    axis = axis_of(source.dims, call.arguments.get("dim", 0))
    if source.dims and has_tokens(source.dims[axis]):
        if not is_prefix(source.dims[axis]):
            raise Mixing("it scans a dimension with padding between the real entries")
        call.kind = "prefix"
    return [source.dims] * len(call.shapes)


@rule("flip", "roll", "rot90")
def flip(call: Call) -> Dims:
    dims = call.tensor("self").dims
    axes = call.arguments.get("dims") or range(len(dims))
    for axis in axes:
        need_static(dims[axis_of(dims, axis)], "moves the entries of")
    return dims


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(call: Call) -> Any:
    source = call.tensors()[0]
    count = len(call.arguments["normalized_shape"])
    for dim in source.dims[-count:]:
        need_static(dim, "normalizes over")
    outer = (*source.dims[:-count], *((1,),) * count)
    return [source.dims] + [outer] * (len(call.shapes) - 1)


@rule("native_group_norm")
def group_norm(call: Call) -> Any:
    source = call.tensors()[0]
    for dim in source.dims[1:]:
        need_static(dim, "normalizes over")
    return [source.dims] + [(source.dims[0], (as_expr(call.arguments["group"]),))] * 2


@rule("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
def batch_norm(call: Call) -> Any:
    source = call.tensors()[0]
    need_static(source.dims[1], "looks up by")
    return [source.dims] + [dims_of(shape) for shape in call.shapes[1:]]


@rule("convolution", "_convolution", "cudnn_convolution")
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


@rule("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
       "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
       "_scaled_dot_product_attention_math")  # fmt: skip
def attention(call: Call) -> Any:
    if call.arguments.get("dropout_p"):
        return random(call)
    q, k, v = (call.tensor(n) for n in ("query", "key", "value"))
    for tensor in (q, k, v):
        for dim in tensor.dims[-2:]:
            need_static(dim, "attends over")
    return [(*q.dims[:-1], v.dims[-1])] + [dims_of(shape) for shape in call.shapes[1:]]


def _per_image(count: int) -> Any:
    """Pooling and resampling: the last ``count`` dimensions of the input are one image, those before count images."""

    def images(call: Call) -> Any:
        source = call.tensors()[0]
        numbers_are_static(call)
        kept = len(source.dims) - count
        for dim in source.dims[kept:]:
            need_static(dim, "mixes the entries of")
        return [(*source.dims[:kept], *dims_of(shape)[kept:]) for shape in call.shapes]

    return images


rule("avg_pool1d", "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_linear1d", "reflection_pad1d",
     "replication_pad1d")(_per_image(1))  # fmt: skip
rule("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d",
     "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
     "_upsample_bicubic2d_aa", "reflection_pad2d", "replication_pad2d", "col2im")(_per_image(2))  # fmt: skip
rule("max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "adaptive_max_pool3d", "upsample_nearest3d",
     "_upsample_nearest_exact3d", "upsample_trilinear3d", "reflection_pad3d", "replication_pad3d",
     # Their channels become places or places channels.
     "pixel_shuffle", "pixel_unshuffle", "im2col")(_per_image(3))  # fmt: skip


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(call: Call) -> Dims:
    source, grid = call.tensor("input"), call.tensor("grid")
    for dim in (*source.dims[1:], *grid.dims[1:]):
        need_static(dim, "mixes the entries of")
    return (*broadcast([source.dims[:1], grid.dims[:1]]), *dims_of(call.shapes[0])[1:])


@rule("unfold")
def windows(call: Call) -> Dims:
    source = call.tensor("self")
    numbers_are_static(call)
    axis = axis_of(source.dims, call.arguments["dimension"])
    need_static(source.dims[axis], "takes windows of")
    sizes = dims_of(call.shapes[0])
    return (*source.dims[:axis], sizes[axis], *source.dims[axis + 1 :], sizes[-1])


def _full_size(call: Call) -> Any:
    for tensor in call.tensors():
        for dim in tensor.dims:
            need_static(dim, "mixes the entries of")
    if not str(call.op).startswith("aten.eye."):
        numbers_are_static(call)
    return [dims_of(shape) for shape in call.shapes]


rule("nonzero", "nonzero_static", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "block_diag",
      "_embedding_bag", "_embedding_bag_forward_only", "segment_reduce", "histc", "as_strided",
      "as_strided_scatter", "diagonal", "tril_indices", "triu_indices", "masked_select",
      "masked_scatter", "index_reduce", "_local_scalar_dense", "item", "dist", "cdist", "_cdist_forward", "trace",
      "linspace", "logspace", "eye", "one_hot", "equal", "repeat_interleave", "addbmm",
      # These raise where a value is out of range, that of padding too.
      "binary_cross_entropy", "nll_loss_forward", "nll_loss2d_forward", "multi_margin_loss",
      "multilabel_margin_loss_forward")(_full_size)  # fmt: skip


def _check_only(call: Call) -> Sequence[Dims]:
    return []


for _name in (
    "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "_assert_scalar", "sym_constrain_range_for_size",
    "sym_constrain_range", "_assert_tensor_metadata",
):  # fmt: skip
    register_row_rule(f"aten::{_name}", _check_only)


# A sum over ranks leaves every row where it is; what gathers over ranks puts the ranks' rows one after the other.
for _name in ("all_reduce", "wait_tensor", "all_reduce_coalesced", "broadcast"):
    for _namespace in ("_c10d_functional", "_c10d_functional_autograd"):
        register_row_rule(f"{_namespace}::{_name}", same)


def _gathered_over_ranks(call: Call) -> Dims:
    dims = call.tensors()[0].dims
    return ((as_expr(call.arguments["group_size"]), *dims[0]), *dims[1:])


register_row_rule("_c10d_functional::all_gather_into_tensor", _gathered_over_ranks)
