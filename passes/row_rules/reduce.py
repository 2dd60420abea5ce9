"""Reductions, sorts, softmaxes and scans."""

from __future__ import annotations

from .call import Call, rules
from .dims import Dims, Mixing, as_expr, concrete, dims_of, has_tokens, need_prefix, need_static

__all__: list[str] = []


@rules(
    "sum", "mean", "amax", "amin", "prod", "any", "all", "argmax", "argmin", "logsumexp", "linalg_vector_norm", "norm",
    "std", "var", "var_mean", "std_mean", "max", "min", "median", "nanmedian", "nansum", "nanmean", "aminmax", "mode",
    "kthvalue", "count_nonzero",
)  # fmt: skip
def reduction(call: Call) -> list[Dims]:
    dims = call.tensors()[0].dims
    axes = call.arguments.get("dim")
    chosen = range(len(dims)) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    places = {axis % len(dims) for axis in chosen} if dims else set()
    for i in places:
        need_static(dims[i], "reduces")
    keep = bool(call.arguments.get("keepdim", False))
    result = tuple((1,) if i in places else dim for i, dim in enumerate(dims) if keep or i not in places)
    return [result] * len(call.shapes)


def _along(call: Call, what: str) -> Dims:
    dims = call.tensors()[0].dims
    if dims:
        need_static(dims[call.arguments.get("dim", -1) % len(dims)], what)
    return dims


@rules("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def softmax(call: Call) -> list[Dims]:
    return [_along(call, "normalizes over")] * len(call.shapes)


@rules("sort", "argsort", "msort")
def sort(call: Call) -> list[Dims]:
    if call.base == "msort":
        need_static(call.tensors()[0].dims[0], "sorts")
    return [_along(call, "sorts")] * len(call.shapes)


@rules("topk")
def topk(call: Call) -> list[Dims]:
    dims = _along(call, "selects from")
    axis = call.arguments.get("dim", -1) % len(dims) if dims else 0
    kept = tuple((as_expr(call.arguments["k"]),) if i == axis else dim for i, dim in enumerate(dims))
    return [kept] * len(call.shapes)


@rules("renorm")
def renorm(call: Call) -> Dims:
    dims = call.tensor("self").dims
    for i, dim in enumerate(dims):
        if i != call.arguments["dim"] % len(dims):
            need_static(dim, "normalizes over")
    return dims


@rules("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
def scan(call: Call) -> list[Dims]:
    dims = list(call.tensor("self").dims)
    if dims:
        axis = call.arguments["dim"] % len(dims)
        if has_tokens(dims[axis]):
            need_prefix(dims[axis], "scans")
            call.kind = "prefix"
            dims[axis] = concrete(dims[axis])
    return [tuple(dims)] * len(call.shapes)


@rules("_fft_r2c", "_fft_c2r", "_fft_c2c", sizes=("last_dim_size",))
def fft(call: Call) -> Dims:
    dims = list(call.tensor("self").dims)
    new = dims_of(call.shapes[0])
    for axis in call.arguments["dim"]:
        need_static(dims[axis % len(dims)], "transforms")
        dims[axis % len(dims)] = new[axis % len(dims)]
    return tuple(dims)


@rules(
    "nonzero", "nonzero_static", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc",
    "masked_select", "masked_scatter", "as_strided", "as_strided_scatter", "dist", "cdist", "_cdist_forward", "trace",
    "tril_indices", "triu_indices", "linspace", "logspace", "randperm", "kaiser_window", "hann_window", "repeat_interleave",
    "det", "linalg_inv_ex", "linalg_solve_ex", "_linalg_det", "index_reduce", "put", "ctc_loss", "nll_loss_forward",
    "mse_loss", "addbmm", "addr", "rot90", "block_diag", "kron", "_embedding_bag", "_embedding_bag_forward_only",
    "_grouped_mm", "segment_reduce", "_segment_reduce",
)  # fmt: skip
def whole(call: Call) -> list[Dims]:
    """Read or made as a whole: fine without padding only."""
    results = [dims_of(shape) for shape in call.shapes]
    for dim in (d for dims in (*(t.dims for t in call.tensors()), *results) for d in dims):
        if has_tokens(dim):
            raise Mixing("it mixes the entries of a dimension that holds padding")
    return results
