"""Matrix products, convolutions, attention, norms and pooling: ops that sum over some dimensions."""

from __future__ import annotations

from typing import Any

import sympy

from .call import Call, Tracked, rules
from .dims import Dim, Dims, Mixing, Partial, as_expr, broadcast, concrete, dims_of, has_tokens, need_prefix, need_static

__all__: list[str] = []


@rules("mm", "bmm", "_int_mm", "matmul", "mv", "dot", "vdot")
def matmul(call: Call) -> Dims:
    a, b = call.tensors()[:2]
    return _product(a.dims, b.dims)


@rules("addmm", "baddbmm", "addmv", "_addmm_activation")
def plus_product(call: Call) -> Dims:
    bias, a, b = call.tensors()[:3]
    return broadcast([_product(a.dims, b.dims), bias.dims])


@rules("linear")
def linear(call: Call) -> Dims:
    weight = call.tensor("weight").dims
    product = _product(call.tensor("input").dims, (*weight[1:], *weight[:1]))
    return broadcast([product, call.tensor("bias").dims]) if "bias" in call.arguments else product


@rules("_scaled_mm")
def scaled_mm(call: Call) -> Dims:
    """A scale is one number, or one for each row or column."""
    product = _product(call.tensor("self").dims, call.tensor("mat2").dims)
    for name in ("scale_a", "scale_b", "bias"):
        if name in call.arguments:
            product = broadcast([product, call.tensor(name).dims])
    if "scale_result" in call.arguments:
        need_all_static(call.tensor("scale_result"))
    return product


def _product(a: Dims, b: Dims) -> Dims:
    inner = b[-2] if len(b) > 1 else b[0]
    for dim in (a[-1], inner):
        need_static(dim, "sums over")
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    return (*broadcast([a[:-2], b[:-2]]), *rows, *columns)


def need_all_static(tensor: Tracked) -> None:
    """A tensor read as a whole."""
    for dim in tensor.dims:
        need_static(dim, "reads across")


@rules("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(call: Call) -> list[Dims]:
    source = call.tensor("input").dims
    count = len(call.arguments["normalized_shape"])
    for dim in source[-count:]:
        need_static(dim, "normalizes over")
    outer = (*source[:-count], *((1,),) * count)
    return [source] + [outer if len(shape) == len(outer) else dims_of(shape) for shape in call.shapes[1:]]


@rules("native_group_norm", sizes=("N", "C", "HxW"))
def group_norm(call: Call) -> list[Dims]:
    source = call.tensor("input").dims
    for dim in source[1:]:
        need_static(dim, "normalizes over")
    return [source] + [(source[0], (as_expr(call.arguments["group"]),))] * 2


@rules("_native_batch_norm_legit_no_training", "_batch_norm_no_update", "cudnn_batch_norm", "native_batch_norm",
       "_batch_norm_with_update")  # fmt: skip
def batch_norm(call: Call) -> list[Dims]:
    source = call.tensor("input").dims
    if call.arguments.get("training") or call.base == "_batch_norm_with_update":
        need_all_static(call.tensor("input"))
    need_static(source[1], "looks up by")
    return [source] + [dims_of(shape) for shape in call.shapes[1:]]


@rules("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable")
def convolution(call: Call) -> Dims:
    source = call.tensor("input" if "input" in call.arguments else "self").dims
    weight = call.tensor("weight")
    need_all_static(weight)
    if "bias" in call.arguments:
        need_all_static(call.tensor("bias"))
    need_static(source[1], "sums over")
    result = list(dims_of(call.shapes[0]))
    result[0] = source[0]
    for axis in range(2, len(source)):
        if has_tokens(source[axis]):
            result[axis] = _window(call, concrete(source[axis]), weight.dims[axis][0], result[axis][0], axis - 2)
    return tuple(result)


def _window(call: Call, dim: Dim, kernel: int, size: Any, axis: int) -> Dim:
    """Entry i reads from ``i * stride - padding`` on: beyond the real entries only in the last results."""
    stride, padding, dilation = (
        call.arguments[k][axis if len(call.arguments[k]) > 1 else 0] for k in ("stride", "padding", "dilation")
    )
    if call.arguments.get("transposed"):
        raise Mixing("it convolves over a dimension that holds padding")
    need_prefix(dim, "convolves over")
    if kernel > 1:
        call.kind = "prefix"
    if padding == 0:
        return (size,)
    if stride != 1:
        raise Mixing("it convolves over a dimension that holds padding, and reads beyond its end")
    return (Partial(size, as_expr(sympy.sympify(size) - padding)),)


@rules(
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math", "scaled_dot_product_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(call: Call) -> list[Dims]:
    q, k, v = (call.tensor(name).dims for name in ("query", "key", "value"))
    for dims in (q, k, v):
        for dim in dims[-2:]:
            need_static(dim, "attends over")
    if call.arguments.get("dropout_p"):
        raise Mixing("it draws random numbers for the padding too")
    outer = [q[:-2], k[:-2], v[:-2]] if len({len(q), len(k), len(v)}) == 1 else [q[:-3], k[:-3], v[:-3]]
    for name in ("attn_mask", "attn_bias"):
        if name in call.arguments:
            mask = call.tensor(name).dims
            outer.append(mask[:-2])
    if call.arguments.get("enable_gqa") or any(len(dims) < 4 for dims in (q, k, v)):
        batch = broadcast([d[:-1] for d in outer])
        heads = q[-3:-2]
    else:
        batch, heads = broadcast(outer), ()
    main = (*batch, *heads, q[-2], v[-1])
    rest = [main[:-1] if len(shape) == len(main) - 1 else dims_of(shape) for shape in call.shapes[1:]]
    return [main, *rest]


@rules(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "_upsample_nearest_exact2d", "pixel_shuffle", "pixel_unshuffle", "im2col", "max_pool2d",
)  # fmt: skip
def over_pixels(call: Call) -> list[Dims]:
    """Each image of a batch by itself."""
    source = call.tensors()[0].dims
    for dim in source[1:]:
        need_static(dim, "reads across")
    if len(source) < 4 and has_tokens(source[0]):
        raise Mixing("it reads across a dimension that holds padding")
    return [(source[0], *dims_of(shape)[1:]) for shape in call.shapes]
