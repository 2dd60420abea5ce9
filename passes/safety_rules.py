"""What each aten op does with dynamic dimensions: a rule takes the abstract arguments and gives the result's.

A rule is ``rule(call) -> Dims | list[Dims]`` and raises :class:`Mixing` where real results may depend on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from .safety_dims import Causal, Dim, Dims, Mixing, as_expr, broadcast, dims_of, has_tokens, is_prefix, regroup, size_of

__all__ = ["Call", "Tracked", "register_row_rule", "rule_for"]


@dataclass(frozen=True)
class Tracked:
    """A tensor's dimensions; ``scratch``: an index whose padding points to memory that nobody reads."""

    dims: Dims
    scratch: bool = False
    #: The placeholder whose values these are, unchanged, or None.
    source: Any = None
    #: A dynamic size that the values count up to (an arange): they pick real rows of a dimension of that size.
    below: Any = None
    #: Whether it is boolean: as an index it selects.
    is_mask: bool = False


@dataclass
class Call:
    """One call: its arguments by name (tensors as :class:`Tracked`), the shapes of its results, its kind so far."""

    op: Any
    arguments: dict[str, Any]
    shapes: list[tuple[Any, ...]]
    #: "prefix" where rows depend on earlier rows.
    kind: str = "row-wise"
    #: (placeholder, symbol): row indices that count from the real size.
    row_indices: list[tuple[Any, Any]] = field(default_factory=list)
    #: (size, size): the first must not exceed the second at a bucket either, or an index would leave its tensor.
    orders: list[tuple[Any, Any]] = field(default_factory=list)

    def tensor(self, name: str) -> Tracked:
        value = self.arguments[name]
        if not isinstance(value, Tracked):
            raise Mixing(f"its argument {name} is no tensor")
        return value

    def tensors(self) -> list[Tracked]:
        found: list[Tracked] = []
        for value in self.arguments.values():
            found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tracked)]
        return found


Rule = Callable[[Call], Any]

#: Registry of rules by op name ("aten::sum", overload or packet).
_RULES: dict[str, Rule] = {}


def register_row_rule(op_name: str, rule: Rule) -> None:
    """Tells the padding analysis what an op does with dynamic dimensions; ``op_name`` as "mylib::op"."""
    _RULES[op_name] = rule


def rule_for(op: Any) -> Rule | None:
    """The rule of an op: its own, or the one of all pointwise ops."""
    name = op.name() if isinstance(op, torch._ops.OpOverload) else str(op)
    packet = name.split(".")[0]
    # Functional form has a copying twin of every view.
    rule = _RULES.get(name) or _RULES.get(packet) or _RULES.get(packet.removesuffix("_copy"))
    if rule is None and torch.Tag.pointwise in getattr(op, "tags", ()):
        return pointwise
    return rule


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def enter(rule: Rule) -> Rule:
        for name in names:
            register_row_rule(f"aten::{name}", rule)
        return rule

    return enter


def _static_number(value: Any, what: str) -> None:
    for leaf in value if isinstance(value, (list, tuple)) else [value]:
        expr = as_expr(leaf)
        if isinstance(leaf, (torch.SymFloat, torch.SymBool)) or (isinstance(expr, sympy.Basic) and expr.free_symbols):
            raise Mixing(f"it uses a dynamic size as a number ({what})")


def _numbers_are_static(call: Call, *shapes: str) -> None:
    for name, value in call.arguments.items():
        if name not in shapes and not isinstance(value, Tracked):
            leaves = value if isinstance(value, (list, tuple)) else [value]
            _static_number([v for v in leaves if not isinstance(v, Tracked)], name)


def _axis(dims: Dims, index: int) -> int:
    return index % len(dims) if dims else 0


def _need_static(dim: Dim, what: str) -> None:
    if has_tokens(dim):
        raise Mixing(f"it {what} a dimension that holds padding")


# Plain copies and elementwise functions keep every index where it is.
def pointwise(call: Call) -> Dims | Tracked:
    _numbers_are_static(call)
    tensors = call.tensors()
    if len(tensors) == 1 and tensors[0].below is not None and _adds_nothing(call):
        return tensors[0]
    dims = broadcast([t.dims for t in tensors])
    return dims if len(call.shapes) <= 1 else [dims] * len(call.shapes)  # type: ignore[return-value]


def _adds_nothing(call: Call) -> bool:
    return str(call.op).split(".")[1:2] in (["add"], ["sub"]) and as_expr(call.arguments.get("other")) == 0


_rule("where", "masked_fill", "clone", "copy", "contiguous", "_to_copy", "alias", "detach", "lift_fresh_copy",
      "lift_fresh", "dropout", "bernoulli_like", "nan_to_num", "_conj", "fill",
      "_safe_softmax_mask", "logical_not", "isin_pointwise", "bucketize", "searchsorted_pointwise", "hardtanh",
      "fake_quantize_per_tensor_affine", "prelu")(pointwise)  # fmt: skip


@_rule("detach", "alias", "_to_copy", "clone", "lift_fresh_copy")
def same(call: Call) -> Tracked:
    _numbers_are_static(call)
    source = call.tensors()[0]
    return Tracked(source.dims, source.scratch, source.source, source.below)


@_rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def view(call: Call) -> Tracked:
    source = call.tensors()[0]
    return Tracked(regroup(source.dims, call.shapes[0]), source.scratch, below=source.below)


@_rule("unsqueeze", "squeeze")
def squeeze(call: Call) -> Tracked:
    source = call.tensors()[0]
    return Tracked(regroup(source.dims, call.shapes[0]), source.scratch, below=source.below)


@_rule("permute")
def permute(call: Call) -> Dims:
    dims = call.tensor("self").dims
    return tuple(dims[_axis(dims, i)] for i in call.arguments["dims"])


@_rule("transpose", "t", "mT", "adjoint")
def transpose(call: Call) -> Dims:
    dims = list(call.tensor("self").dims)
    if len(dims) < 2:
        return tuple(dims)
    one, other = (_axis(tuple(dims), call.arguments.get(k, d)) for k, d in (("dim0", 0), ("dim1", 1)))
    dims[one], dims[other] = dims[other], dims[one]
    return tuple(dims)


@_rule("expand", "broadcast_to")
def expand(call: Call) -> Tracked:
    dims, shape = call.tensor("self").dims, call.shapes[0]
    new = dims_of(shape)
    offset = len(new) - len(dims)
    expanded = [new[i] if i < offset or size_of(dims[i - offset]) == 1 else dims[i - offset] for i in range(len(new))]
    return Tracked(tuple(expanded), below=call.tensor("self").below)


@_rule("repeat")
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
            _need_static(dim, "repeats")
            _static_number(times, "repeats")
            result.append((size_of(dim) * times,))
    return tuple(result)


def _created(call: Call) -> Dims:
    for name in ("fill_value", "value", "low", "high"):
        if name in call.arguments and not isinstance(call.arguments[name], Tracked):
            _static_number(call.arguments[name], name)
    return dims_of(call.shapes[0])


_rule("full", "zeros", "ones", "empty", "empty_strided", "new_full", "new_zeros", "new_ones", "new_empty",
      "new_empty_strided", "scalar_tensor")(_created)  # fmt: skip


@_rule("scalar_tensor")
def scalar_tensor(call: Call) -> Dims:
    _static_number(call.arguments["s"], "value")
    return ()


@_rule("full_like", "zeros_like", "ones_like", "empty_like")
def like(call: Call) -> Dims:
    if "fill_value" in call.arguments:
        _static_number(call.arguments["fill_value"], "fill_value")
    return call.tensor("self").dims


@_rule("arange")
def arange(call: Call) -> Dims | Tracked:
    for name in ("start", "step"):
        if name in call.arguments:
            _static_number(call.arguments[name], name)
    dims = dims_of(call.shapes[0])
    if has_tokens(dims[0]) and len([f for f in dims[0] if f != 1]) > 1:
        dims = ((size_of(dims[0]),),)
    counts = as_expr(call.arguments.get("start") or 0) == 0 and as_expr(call.arguments.get("step", 1)) == 1
    return Tracked(dims, below=size_of(dims[0])) if counts and has_tokens(dims[0]) else dims


@_rule("mm", "bmm", "addmm", "baddbmm", "matmul", "mv", "dot", "linear", "addmv")
def matmul(call: Call) -> Dims:
    _numbers_are_static(call)
    a, b = (call.arguments.get(k) for k in (("mat1", "mat2") if "mat1" in call.arguments else ("self", "mat2")))
    if "batch1" in call.arguments:
        a, b = call.arguments["batch1"], call.arguments["batch2"]
    if "tensor" in call.arguments:
        b = call.arguments["tensor"]
    if "vec" in call.arguments:
        b = call.arguments["vec"]
    if "weight" in call.arguments:
        a, b = call.arguments["input"], call.arguments["weight"]
        _need_static(b.dims[-1], "sums over")
        _need_static(a.dims[-1], "sums over")
        return (*a.dims[:-1], b.dims[0]) if len(b.dims) > 1 else a.dims[:-1]
    if not isinstance(a, Tracked) or not isinstance(b, Tracked):
        raise Mixing("its operands are not known")
    _need_static(a.dims[-1], "sums over")
    _need_static(b.dims[-2] if len(b.dims) > 1 else b.dims[0], "sums over")
    batch = broadcast([a.dims[:-2], b.dims[:-2]])
    result = (*batch, *(a.dims[-2:-1]), *(b.dims[-1:] if len(b.dims) > 1 else ()))
    bias = call.arguments.get("self") if "mat1" in call.arguments or "batch1" in call.arguments else None
    return broadcast([result, bias.dims]) if isinstance(bias, Tracked) else result


def _reduced(call: Call) -> Dims:
    source = call.tensors()[0]
    _numbers_are_static(call)
    axes = call.arguments.get("dim", call.arguments.get("dims"))
    keep = bool(call.arguments.get("keepdim", False))
    rank = len(source.dims)
    chosen = range(rank) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    chosen = {_axis(source.dims, i) for i in chosen}
    for i in chosen:
        _need_static(source.dims[i], "reduces")
    return tuple((1,) if i in chosen else d for i, d in enumerate(source.dims) if keep or i not in chosen)


@_rule("sum", "mean", "amax", "amin", "prod", "any", "all", "argmax", "argmin", "logsumexp", "linalg_vector_norm",
       "norm", "std", "var", "max", "min", "var_mean", "std_mean", "median", "nanmedian", "nansum", "count_nonzero",
       "aminmax", "mode", "kthvalue", "logcumsumexp_all")  # fmt: skip
def reduction(call: Call) -> Any:
    dims = _reduced(call)
    return [dims] * len(call.shapes)


def _along(call: Call, what: str) -> Any:
    source = call.tensors()[0]
    _numbers_are_static(call)
    axis = call.arguments.get("dim", -1)
    if source.dims:
        _need_static(source.dims[_axis(source.dims, axis)], what)
    return source


@_rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "sort", "argsort")
def along_static(call: Call) -> Any:
    source = _along(call, "works along")
    return [source.dims] * len(call.shapes)


@_rule("renorm")
def renorm(call: Call) -> Dims:
    """Each entry along ``dim`` is scaled by the norm over all other dimensions."""
    source = call.tensor("self")
    _numbers_are_static(call)
    axis = _axis(source.dims, call.arguments["dim"])
    for i, dim in enumerate(source.dims):
        if i != axis:
            _need_static(dim, "takes the norm over")
    return source.dims


@_rule("topk")
def topk(call: Call) -> Any:
    source = _along(call, "selects from")
    axis = _axis(source.dims, call.arguments.get("dim", -1))
    dims = tuple((as_expr(call.arguments["k"]),) if i == axis else d for i, d in enumerate(source.dims))
    return [dims, dims]


@_rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
def scan(call: Call) -> Any:
    source = call.tensors()[0]
    _numbers_are_static(call)
    axis = _axis(source.dims, call.arguments.get("dim", 0))
    if source.dims and has_tokens(source.dims[axis]):
        if not is_prefix(source.dims[axis]):
            raise Mixing("it scans a dimension with padding between the real entries")
        call.kind = "prefix"
    return [source.dims] * len(call.shapes)


@_rule("flip", "roll", "rot90")
def flip(call: Call) -> Dims:
    dims = call.tensor("self").dims
    axes = call.arguments.get("dims") or range(len(dims))
    for axis in axes:
        _need_static(dims[_axis(dims, axis)], "moves the entries of")
    return dims


@_rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(call: Call) -> Any:
    source = call.tensors()[0]
    count = len(call.arguments["normalized_shape"])
    for dim in source.dims[-count:]:
        _need_static(dim, "normalizes over")
    outer = (*source.dims[:-count], *((1,),) * count)
    return [source.dims] + [outer] * (len(call.shapes) - 1)


@_rule("native_group_norm")
def group_norm(call: Call) -> Any:
    source = call.tensors()[0]
    for dim in source.dims[1:]:
        _need_static(dim, "normalizes over")
    return [source.dims] + [(source.dims[0], (as_expr(call.arguments["group"]),))] * 2


@_rule("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
def batch_norm(call: Call) -> Any:
    source = call.tensors()[0]
    _need_static(source.dims[1], "looks up by")
    return [source.dims] + [dims_of(shape) for shape in call.shapes[1:]]


@_rule("embedding")
def embedding(call: Call) -> Dims:
    weight, indices = call.tensor("weight"), call.tensor("indices")
    _need_static(weight.dims[0], "looks up rows of")
    return (*indices.dims, *weight.dims[1:])


@_rule("select")
def select(call: Call) -> Dims:
    dims = call.tensor("self").dims
    axis = _axis(dims, call.arguments["dim"])
    if has_tokens(dims[axis]):
        index = as_expr(call.arguments["index"])
        outermost = [f for f in dims[axis] if f != 1]
        if index != 0 or isinstance(outermost[0], Causal):
            raise Mixing(f"it takes entry {index} of a dimension that holds padding")
    else:
        _static_number(call.arguments["index"], "index")
    return dims[:axis] + dims[axis + 1 :]


@_rule("slice")
def slice_(call: Call) -> Dims | Tracked:
    dims = list(call.tensor("self").dims)
    axis = _axis(tuple(dims), call.arguments.get("dim", 0))
    if dims_of([call.shapes[0][axis]])[0] == dims[axis]:
        return call.tensor("self")
    start, end = as_expr(call.arguments.get("start") or 0), as_expr(call.arguments.get("end"))
    if as_expr(call.arguments.get("step", 1)) != 1 and has_tokens(dims[axis]):
        raise Mixing("it takes every other entry of a dimension that holds padding")
    size, new = size_of(dims[axis]), as_expr(call.shapes[0][axis])
    if not has_tokens(dims[axis]):
        _static_number([start], "slice")
        if isinstance(new, sympy.Basic) and start != 0:
            raise Mixing("it cuts a dimension to a dynamic size")
        # The first entries of what holds no padding: a guard says that there are as many.
        dims[axis] = dims_of([new])[0]
    elif new == size and start == 0:
        pass
    elif len(dims[axis]) == 1 and isinstance(dims[axis][0], sympy.Basic) and _cuts_few(size, new, start):
        # Entry j is entry j + start of the source: real where the result's own size says so.
        dims[axis] = (new,)
    elif isinstance(new, int) and isinstance(start, int) and start >= 0 and is_prefix(dims[axis]) and _one(dims[axis]):
        # A fixed number of entries, counted from the first: there are as many, or the result would be shorter.
        dims[axis] = (new,)
    elif start != 0:
        raise Mixing("it cuts a dimension that holds padding")
    elif len(dims[axis]) == 1 and isinstance(dims[axis][0], Causal) and new == dims[axis][0].valid:
        dims[axis] = (new,)
    else:
        raise Mixing(f"it cuts a dimension that holds padding to {end}")
    return tuple(dims)


def _one(dim: Dim) -> bool:
    """Whether a dimension is one dynamic size and nothing else."""
    return len([factor for factor in dim if factor != 1]) == 1


def _cuts_few(size: Any, new: Any, start: Any) -> bool:
    """Whether a slice leaves out a fixed number of entries, ``start`` of them in front."""
    left_out = sympy.expand(size - new)
    return left_out.is_Integer and isinstance(start, int) and 0 <= start <= int(left_out)


@_rule("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk", "tensor_split")  # fmt: skip
def split(call: Call) -> Any:
    dims = call.tensor("self").dims
    axis = _axis(dims, call.arguments.get("dim", 0))
    _need_static(dims[axis], "splits")
    result = []
    for shape in call.shapes:
        rest = dims[:axis] + dims[axis + 1 :]
        result.append(rest if len(shape) < len(dims) else (*dims[:axis], (as_expr(shape[axis]),), *dims[axis + 1 :]))
    return result


@_rule("cat", "stack")
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
        _need_static(tensor.dims[axis], "joins along")
    if has_tokens(tensors[-1].dims[axis]) and not (_one(tensors[-1].dims[axis]) and is_prefix(tensors[-1].dims[axis])):
        raise Mixing("it joins along a dimension that holds padding")
    # Behind a fixed number of entries the last part's real ones still come first.
    merged = broadcast([(*t.dims[:axis], (1,), *t.dims[axis + 1 :]) for t in tensors])
    return (*merged[:axis], (as_expr(call.shapes[0][axis]),), *merged[axis + 1 :])


@_rule("constant_pad_nd")
def pad(call: Call) -> Dims:
    _numbers_are_static(call)
    dims, widths = list(call.tensor("self").dims), call.arguments["pad"]
    for k in range(len(widths) // 2):
        axis = len(dims) - 1 - k
        if widths[2 * k] or widths[2 * k + 1]:
            _need_static(dims[axis], "pads")
            dims[axis] = (as_expr(call.shapes[0][axis]),)
    return tuple(dims)


@_rule("gather")
def gather(call: Call) -> Dims:
    source, index = call.tensor("self"), call.tensor("index")
    axis = _axis(source.dims, call.arguments["dim"])
    _need_static(source.dims[axis], "gathers from")
    for i, (one, other) in enumerate(zip(source.dims, index.dims, strict=True)):
        if i != axis:
            broadcast([(one,), (other,)])
    return index.dims


@_rule("scatter", "scatter_add", "scatter_reduce")
def scatter(call: Call) -> Dims:
    source, index = call.tensor("self"), call.tensor("index")
    axis = _axis(source.dims, call.arguments["dim"])
    _need_static(source.dims[axis], "scatters into")
    _need_static(index.dims[axis], "scatters from")
    _numbers_are_static(call)
    for i, (one, other) in enumerate(zip(source.dims, index.dims, strict=True)):
        if i != axis:
            broadcast([(one,), (other,)])
    return source.dims


def _gathered(call: Call, source: Tracked, index: Tracked, axis: int) -> None:
    """Rows picked by index: right where the index tensor's values are the caller's own, counted from the real size."""
    if not has_tokens(source.dims[axis]):
        return
    if index.below is not None and is_prefix(source.dims[axis]):
        # 0, 1, 2, ...: in eager these lie within the real entries, or it raises.
        if index.below != size_of(source.dims[axis]):
            call.orders.append((index.below, size_of(source.dims[axis])))
        return
    factors = [f for f in source.dims[axis] if f != 1]
    if len(factors) != 1 or not isinstance(factors[0], sympy.Symbol) or index.source is None:
        raise Mixing("it picks rows by an index that may count from the end")
    call.row_indices.append((index.source, factors[0]))


@_rule("index", "_unsafe_index")
def index(call: Call) -> Dims:
    source, indices = call.tensor("self"), call.arguments["indices"]
    used = [(i, t) for i, t in enumerate(indices) if isinstance(t, Tracked)]
    for i, tensor in used:
        _gathered(call, source, tensor, i)
    merged = broadcast([tensor.dims for _, tensor in used])
    places = [i for i, _ in used]
    rest = [d for i, d in enumerate(source.dims) if i not in places]
    adjacent = places == list(range(places[0], places[-1] + 1))
    at = places[0] if adjacent else 0
    return (*rest[:at], *merged, *rest[at:])


@_rule("index_select")
def index_select(call: Call) -> Dims:
    source, chosen = call.tensor("self"), call.tensor("index")
    axis = _axis(source.dims, call.arguments["dim"])
    _gathered(call, source, chosen, axis)
    return (*source.dims[:axis], *(chosen.dims or ((1,),)), *source.dims[axis + 1 :])


@_rule("index_put", "index_copy", "index_add", "index_fill", "_unsafe_index_put")
def index_put(call: Call) -> Dims:
    source = call.tensor("self")
    indices = call.arguments.get("indices")
    indices = [call.tensor("index")] if indices is None else [t for t in indices if isinstance(t, Tracked)]
    values = call.arguments.get("values")
    if len(indices) == 1 and indices[0].is_mask and isinstance(values, Tracked) and not values.dims:
        # One value for what a mask selects fills it, entry by entry.
        mask = indices[0].dims
        return (*broadcast([source.dims[: len(mask)], mask]), *source.dims[len(mask) :])
    for tensor in indices:
        if any(has_tokens(d) for d in tensor.dims) and not tensor.scratch:
            raise Mixing("padding rows would be written where their index points")
    if any(has_tokens(d) for d in source.dims):
        raise Mixing("it writes by index into a tensor that holds padding")
    return source.dims


@_rule("slice_scatter", "select_scatter")
def slice_scatter(call: Call) -> Dims:
    source, part = call.tensor("self"), call.tensor("src")
    axis = _axis(source.dims, call.arguments.get("dim", 0))
    _numbers_are_static(call)
    if len(part.dims) < len(source.dims):
        part = Tracked((*part.dims[:axis], (1,), *part.dims[axis:]))
    if has_tokens(source.dims[axis]):
        if size_of(part.dims[axis]) != size_of(source.dims[axis]):
            raise Mixing("it writes a part of a dimension that holds padding")
        return broadcast([source.dims, part.dims])
    broadcast([tuple((1,) if i == axis else d for i, d in enumerate(t.dims)) for t in (source, part)])
    return source.dims


@_rule("copy_")
def copy_into(call: Call) -> Dims:
    target, source = call.tensor("self"), call.tensor("src")
    broadcast([target.dims, source.dims])
    if any(has_tokens(d) for d in source.dims) and not any(has_tokens(d) for d in target.dims):
        raise Mixing("it writes padding into a tensor without any")
    return target.dims


@_rule("convolution", "_convolution", "cudnn_convolution")
def convolution(call: Call) -> Dims:
    source, weight = call.tensor("input"), call.tensor("weight")
    _need_static(source.dims[1], "sums over")
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


@_rule("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
       "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
       "_scaled_dot_product_attention_math")  # fmt: skip
def attention(call: Call) -> Any:
    q, k, v = (call.tensor(n) for n in ("query", "key", "value"))
    for tensor in (q, k, v):
        for dim in tensor.dims[-2:]:
            _need_static(dim, "attends over")
    return [(*q.dims[:-1], v.dims[-1])] + [dims_of(shape) for shape in call.shapes[1:]]


def _random(call: Call) -> Any:
    if any(has_tokens(d) for shape in call.shapes for d in dims_of(shape)):
        raise Mixing("it draws random numbers for padding too, so that the real rows get others")
    return [dims_of(shape) for shape in call.shapes]


_rule("rand", "randn", "rand_like", "randn_like", "bernoulli", "native_dropout", "normal_functional", "randint",
      "uniform", "multinomial", "randperm", "poisson", "randint_like")(_random)  # fmt: skip


def _whole_size(call: Call) -> Any:
    for tensor in call.tensors():
        for dim in tensor.dims:
            _need_static(dim, "mixes the entries of")
    return [dims_of(shape) for shape in call.shapes]


_rule("nonzero", "unique", "_unique2", "unique_consecutive", "bincount", "histc", "as_strided",
      "as_strided_scatter", "diagonal", "tril_indices", "triu_indices", "masked_select",
      "masked_scatter", "index_reduce", "choose_qparams", "_local_scalar_dense", "item", "max_pool2d_with_indices",
      "avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d", "mean_all", "dist", "cdist", "_cdist_forward", "trace",
      "unfold", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "pixel_shuffle", "im2col",
      "linspace", "logspace", "eye", "one_hot", "equal", "repeat_interleave", "addbmm",
      # These raise where a value is out of range, that of padding too.
      "binary_cross_entropy", "nll_loss_forward", "nll_loss2d_forward", "multi_margin_loss",
      "multilabel_margin_loss_forward")(_whole_size)  # fmt: skip


@_rule("tril", "triu")
def triangle(call: Call) -> Dims:
    _numbers_are_static(call)
    return call.tensor("self").dims


def _row_wise_first(call: Call) -> Any:
    """Results look like the first tensor, row by row."""
    return [call.tensors()[0].dims] * len(call.shapes)


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
