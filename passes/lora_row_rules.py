"""What an op does with the order of rows: a rule takes the rows of its arguments and gives those of its results.

Without a rule, results of rows are lost: an op that nobody knows may have put them in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .lora_orders import Dim, Lost, Orders, Rows, State, axes_of, plain_dims
from .safety_dims import as_expr

__all__ = ["RowCall", "row_rule_for"]

#: One dimension without entries of any token.
_ONE: Dim = ((1, None),)


@dataclass
class RowCall:
    """One op, its arguments by name, its results, and what is known of the tokens of one input."""

    op: Any
    arguments: dict[str, Any]
    results: list[torch.Tensor]
    orders: Orders
    state: Callable[[torch.Tensor], State]
    key: Callable[[torch.Tensor], Hashable]

    def get(self, *names: str, default: Any = None) -> Any:
        """The first argument of these names that was given."""
        return next((self.arguments[name] for name in names if self.arguments.get(name) is not None), default)

    def rows(self, *names: str) -> State:
        """What is known of a tensor argument."""
        value = self.get(*names)
        return self.state(value) if isinstance(value, torch.Tensor) else None

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of the first result."""
        return tuple(as_expr(size) for size in self.results[0].shape)

    def tensors(self) -> list[torch.Tensor]:
        """All tensor arguments."""
        found: list[torch.Tensor] = []
        for value in self.arguments.values():
            values = value if isinstance(value, (list, tuple)) else [value]
            found += [one for one in values if isinstance(one, torch.Tensor)]
        return found

    def lost(self) -> Lost:
        """Rows that cannot be followed through this op."""
        return Lost(f"{_name(self.op)} may change the order of rows")

    def meet(self, tensors: Sequence[torch.Tensor], shape: Sequence[Any] | None = None) -> State:
        """See :meth:`Orders.meet`; a number in a tensor is of no row."""
        states = [(self.state(t), t.dim()) for t in tensors if not all(as_expr(size) == 1 for size in t.shape)]
        return self.orders.meet(states, self.shape if shape is None else shape)


Result = State | list[State]
Rule = Callable[[RowCall], Result]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def enter(function: Rule) -> Rule:
        for name in names:
            _RULES[f"aten::{name}"] = function
        return function

    return enter


def row_rule_for(op: Any) -> Rule | None:
    """The rule of an op; of one that writes in place, that of the op that it does so for."""
    name = _name(op)
    found = _RULES.get(name) or _RULES.get(name.removesuffix("_copy"))
    if found is None and name.endswith("_"):
        found = _RULES.get(name[:-1])
    if found is None and torch.Tag.pointwise in getattr(op, "tags", ()):
        return pointwise
    return found


def _name(op: Any) -> str:
    return str(op.name() if isinstance(op, torch._ops.OpOverload) else op).split(".")[0]


def _axis(rank: int, index: int) -> int:
    return index % rank if rank else 0


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def with_dims(c: RowCall, rows: Rows, dims: Sequence[Dim]) -> Rows:
    return c.orders.rows(rows.order, dims)


@rule("where", "masked_fill", "fill_", "nan_to_num", "logical_not", "hardtanh", "floor_divide", "rsub", "lerp",
      "polar", "complex", "prelu", "bernoulli", "dropout", "_to_copy", "clone", "contiguous", "detach", "alias",
      "lift_fresh", "_conj", "positive", "fake_quantize_per_tensor_affine", "addcmul", "addcdiv",
      "hardswish")  # fmt: skip
def pointwise(c: RowCall) -> Result:
    met = c.meet(c.tensors())
    return [met] * len(c.results)


@rule("native_dropout", "native_layer_norm", "_fused_rms_norm", "native_group_norm", "_softmax", "_log_softmax",
      "softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "tril", "triu", "renorm",
      "_safe_softmax", "native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit",
      "cudnn_batch_norm", "batch_norm")  # fmt: skip
def in_place_of_first(c: RowCall) -> Result:
    """Every entry stays where it is, whatever others have a part in it."""
    first = c.tensors()[0]
    state = c.state(first)
    if not isinstance(state, Rows):
        return [state] * len(c.results)
    found: list[State] = []
    for result in c.results:
        same = len(result.shape) == first.dim()
        fits = same and all(as_expr(one) == as_expr(two) for one, two in zip(result.shape, first.shape, strict=True))
        found.append(state if fits else None)
    return found


@rule("copy_")
def copied(c: RowCall) -> Result:
    return c.meet([t for name in ("src", "other") if isinstance(t := c.get(name), torch.Tensor)])


@rule("empty", "zeros", "ones", "full", "arange", "scalar_tensor", "rand", "randn", "randint", "randperm", "eye",
      "linspace", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
      "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "empty_strided", "zero_", "zero",
      "fill", "hann_window", "tril_indices", "triu_indices", "_assert_async", "_assert_scalar")  # fmt: skip
def of_no_token(c: RowCall) -> Result:
    return [None] * len(c.results)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "flatten", "unflatten",
      "expand_as_view")  # fmt: skip
def viewed(c: RowCall) -> Result:
    state = c.rows("self")
    if not isinstance(state, Rows):
        return state
    if isinstance(c.get("dtype"), torch.dtype):
        return with_dims(c, state, (*state.dims[:-1], *plain_dims(c.shape[-1:])))
    return c.orders.regroup(state, c.shape) or c.lost()


@rule("view_as_real")
def viewed_as_real(c: RowCall) -> Result:
    state = c.rows("self")
    return with_dims(c, state, (*state.dims, ((2, None),))) if isinstance(state, Rows) else state


@rule("view_as_complex")
def viewed_as_complex(c: RowCall) -> Result:
    state = c.rows("self")
    return with_dims(c, state, state.dims[:-1]) if isinstance(state, Rows) else state


@rule("permute", "transpose", "t", "numpy_T")
def permuted(c: RowCall) -> Result:
    state = c.rows("self")
    if not isinstance(state, Rows):
        return state
    dims = list(state.dims)
    if "dims" in c.arguments:
        return with_dims(c, state, [dims[_axis(len(dims), d)] for d in c.arguments["dims"]])
    if len(dims) > 1:
        one, two = _axis(len(dims), c.get("dim0", default=0)), _axis(len(dims), c.get("dim1", default=1))
        dims[one], dims[two] = dims[two], dims[one]
    return with_dims(c, state, dims)


@rule("expand")
def expanded(c: RowCall) -> Result:
    state = c.rows("self")
    if not isinstance(state, Rows):
        return state
    shape = c.shape
    dims = [*([_ONE] * (len(shape) - len(state.dims))), *state.dims]
    return with_dims(c, state, [
        dim if axes_of([dim]) or size == c.orders.size(dim) else ((size, None),)
        for dim, size in zip(dims, shape, strict=True)
    ])  # fmt: skip


@rule("repeat")
def repeated(c: RowCall) -> Result:
    state = c.rows("self")
    if not isinstance(state, Rows):
        return state
    counts = [as_expr(count) for count in c.arguments["repeats"]]
    dims = [*([_ONE] * (len(counts) - len(state.dims))), *state.dims]
    return with_dims(c, state, [
        dim if count == 1 else ((count, None), *dim) for dim, count in zip(dims, counts, strict=True)
    ])  # fmt: skip


def _cut(c: RowCall, state: Rows, d: int, start: Any, stop: Any, step: int, size: Any) -> State:
    dims = list(state.dims)
    size = as_expr(size)
    if not axes_of([dims[d]]):
        dims[d] = ((size, None),)
        return with_dims(c, state, dims)
    if size == c.orders.size(dims[d]) and step == 1:
        return state
    order, dims[d] = c.orders.piece(state.order, dims[d], start, stop, step, size)
    return c.orders.rows(order, dims)


@rule("slice")
def sliced(c: RowCall) -> Result:
    state = c.rows("self")
    if not isinstance(state, Rows):
        return state
    d = _axis(len(state.dims), c.get("dim", default=0))
    start = as_expr(c.get("start", default=0))
    size = c.orders.size(state.dims[d])
    if isinstance(start, int) and start < 0:
        # As the op does: where the dimension is shorter than that, it begins at 0.
        if not isinstance(size, int) and axes_of([state.dims[d]]):
            result = c.shape[d]
            start = as_expr(size - result) if c.get("end") in (None, 2**63 - 1) else start
        elif isinstance(size, int):
            start = max(0, size + start)
    return _cut(c, state, d, start, c.get("end"), c.get("step", default=1), c.shape[d])


@rule("select")
def selected(c: RowCall) -> Result:
    state = c.rows("self")
    if not isinstance(state, Rows):
        return state
    d = _axis(len(state.dims), c.arguments["dim"])
    rest = (*state.dims[:d], *state.dims[d + 1 :])
    if not axes_of([state.dims[d]]):
        return with_dims(c, state, rest)
    return c.orders.rows(c.orders.fix(state.order, state.dims[d], c.arguments["index"]), rest)


@rule("unbind")
def unbound(c: RowCall) -> Result:
    state = c.rows("self")
    if not isinstance(state, Rows):
        return [state] * len(c.results)
    d = _axis(len(state.dims), c.get("dim", default=0))
    rest = (*state.dims[:d], *state.dims[d + 1 :])
    if not axes_of([state.dims[d]]):
        return [with_dims(c, state, rest)] * len(c.results)
    return [
        c.orders.rows(c.orders.fix(state.order, state.dims[d], index), rest) for index in range(len(c.results))
    ]  # fmt: skip


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
def cut_up(c: RowCall) -> Result:
    state = c.rows("self")
    if not isinstance(state, Rows):
        return [state] * len(c.results)
    d = _axis(len(state.dims), c.get("dim", default=0))
    found: list[State] = []
    start: Any = 0
    for result in c.results:
        size = as_expr(result.shape[d])
        found.append(_cut(c, state, d, start, as_expr(start + size), 1, size))
        start = as_expr(start + size)
    return found


@rule("flip")
def flipped(c: RowCall) -> Result:
    return _moved(c, "flip", [(d, None) for d in _listed(c.arguments["dims"])])


@rule("roll")
def rolled(c: RowCall) -> Result:
    state = c.rows("self")
    dims, shifts = _listed(c.get("dims", default=[])), _listed(c.arguments["shifts"])
    if not dims:
        return c.lost() if isinstance(state, Rows) and axes_of(state.dims) else state
    return _moved(c, "roll", list(zip(dims, shifts, strict=True)))


def _moved(c: RowCall, kind: str, moves: list[tuple[int, Any]]) -> State:
    state = c.rows("self")
    if not isinstance(state, Rows):
        return state
    order, dims = state.order, list(state.dims)
    for d, by in moves:
        d = _axis(len(dims), d)
        if axes_of([dims[d]]):
            order, dims[d] = c.orders.moved(kind, order, dims[d], by)
    return c.orders.rows(order, dims)


@rule("cat")
def joined(c: RowCall) -> Result:
    parts = [t for t in c.arguments["tensors"] if len(t.shape) == len(c.shape)]
    d = _axis(len(c.shape), c.get("dim", default=0))
    states = [c.state(t) for t in parts]
    lost = next((s for s in states if isinstance(s, Lost)), None)
    if lost is not None:
        return lost
    whole = [s for s in states if isinstance(s, Rows) and set(axes_of(s.dims)) == set(s.order.axes)]
    along = any(isinstance(s, Rows) and axes_of([s.dims[d]]) for s in states)
    apart = len(whole) < len(states) or any(s.order is not whole[0].order for s in whole)
    if not whole or not (along or (apart and d < len(c.shape) - 1)):
        return c.orders.meet([(s, len(c.shape)) for s in states], c.shape)
    if len(parts) == 1:
        return states[0]
    first = next((s for s in whole if axes_of([s.dims[d]])), whole[0])
    kept = tuple(axis for axis in first.order.axes if axis not in axes_of([first.dims[d]]))
    pieces: list[tuple[Any, Dim, Any]] = []
    for part, state in zip(parts, states, strict=True):
        size = as_expr(part.shape[d])
        if not isinstance(state, Rows) or state not in whole:
            pieces.append((None, ((size, None),), size))
            continue
        others = [axis for axis in state.order.axes if axis not in axes_of([state.dims[d]])]
        alike = all(state.dims[i] == first.dims[i] for i in range(len(c.shape)) if i != d)
        if set(others) != set(kept) or not alike:
            return Lost("it joins rows in several orders")
        pieces.append((state.order, state.dims[d], size))
    order, dim = c.orders.cat(pieces, kept)
    return c.orders.rows(order, (*first.dims[:d], dim, *first.dims[d + 1 :]))


def _may_be_rows(rows: Rows, d: int) -> bool:
    """Whether entries along a dimension, which are all of one token, may be rows: then others there are of none."""
    return d < len(rows.dims) - 1 and set(axes_of(rows.dims)) == set(rows.order.axes)


@rule("stack")
def stacked(c: RowCall) -> Result:
    d = _axis(len(c.shape), c.get("dim", default=0))
    parts = c.arguments["tensors"]
    met = c.meet(parts, (*c.shape[:d], *c.shape[d + 1 :]))
    if not isinstance(met, Rows):
        return met
    if any(c.state(t) is None for t in parts) and d < len(met.dims) and _may_be_rows(met, d - 1):
        return c.lost()
    return with_dims(c, met, (*met.dims[:d], ((len(parts), None),), *met.dims[d:]))


@rule("constant_pad_nd")
def padded(c: RowCall) -> Result:
    state = c.rows("self")
    if not isinstance(state, Rows):
        return state
    order, dims, pads = state.order, list(state.dims), list(c.arguments["pad"])
    for i in range(len(pads) // 2):
        d, before, after = len(dims) - 1 - i, as_expr(pads[2 * i]), as_expr(pads[2 * i + 1])
        if not axes_of([dims[d]]):
            if (before, after) != (0, 0) and _may_be_rows(state, d):
                return c.lost()
            dims[d] = ((c.shape[d], None),)
            continue
        if not isinstance(before, int) or not isinstance(after, int):
            return c.lost()
        size = c.orders.size(dims[d])
        if before < 0 or after < 0:
            start = max(0, -before)
            size = as_expr(size - start - max(0, -after))
            order, dims[d] = c.orders.piece(order, dims[d], start, as_expr(start + size), 1, size)
        if before > 0 or after > 0:
            kept = [axis for axis in order.axes if axis not in axes_of([dims[d]])]
            hole = [(None, ((count, None),), count) for count in (max(0, before), max(0, after))]
            parts = [*(hole[:1] if before > 0 else []), (order, dims[d], size), *(hole[1:] if after > 0 else [])]
            order, dims[d] = c.orders.cat(parts, kept)
    return c.orders.rows(order, dims)


@rule("sum", "mean", "amax", "amin", "argmax", "argmin", "max", "min", "prod", "any", "all", "logsumexp", "var", "std",
      "var_mean", "std_mean", "norm", "linalg_vector_norm", "median", "nanmean", "nansum", "topk", "sort", "kthvalue",
      "mode", "count_nonzero", "aminmax")  # fmt: skip
def over_dims(c: RowCall) -> Result:
    """Entries along some dimensions become one, or are put in an order of their own; the others stay."""
    if isinstance(c.get("other"), torch.Tensor):
        return pointwise(c)  # max and min of two tensors
    state = c.rows("self", "x")
    if not isinstance(state, Rows):
        return [state] * len(c.results)
    rank = len(state.dims)
    sorts = _name(c.op).removeprefix("aten::").rstrip("_") in ("topk", "sort")
    given = c.get("dim")
    if given is None or given == []:
        chosen = set(range(rank)) if not sorts else {rank - 1}
    else:
        chosen = {_axis(rank, d) for d in _listed(given)}
    found: list[State] = []
    for result in c.results:
        sizes = [as_expr(size) for size in result.shape]
        if len(sizes) == rank:
            dims = [((sizes[i], None),) if i in chosen else dim for i, dim in enumerate(state.dims)]
        else:
            dims = [dim for i, dim in enumerate(state.dims) if i not in chosen]
        found.append(with_dims(c, state, dims) if len(dims) == len(sizes) else c.lost())
    return found


@rule("mm", "bmm", "matmul", "mv", "addmm", "baddbmm", "linear", "_scaled_mm", "_int_mm")
def product(c: RowCall) -> Result:
    """Rows of the first factor, columns of the second; what is summed over is neither."""
    one, two = c.get("self" if "mat1" not in c.arguments and "batch1" not in c.arguments else "mat1", "mat1", "batch1",
                     "input"), c.get("mat2", "batch2", "tensor2", "vec", "weight", "other", "tensor")  # fmt: skip
    if not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor) or one.dim() < 2:
        return c.lost()
    name = _name(c.op)
    a, b = c.state(one), c.state(two)
    if isinstance(a, Lost):
        return a
    shape, rank = c.shape, len(c.shape)
    outer: list[tuple[State, int]] = []
    if isinstance(a, Rows):
        outer.append((with_dims(c, a, (*a.dims[:-1], *([] if two.dim() == 1 else [((shape[-1], None),)]))), rank))
    rows_of_a = isinstance(a, Rows) and bool(axes_of(a.dims[:-1]))
    if two.dim() >= 2 and not rows_of_a:
        if isinstance(b, Lost):
            return b
        if isinstance(b, Rows):
            columns = b.dims[0] if name == "aten::linear" else b.dims[-1]
            outer = [(with_dims(c, b, (*b.dims[:-2], ((shape[-2], None),), columns)), rank)]
    added = c.get("self") if name in ("aten::addmm", "aten::baddbmm") else c.get("bias")
    if isinstance(added, torch.Tensor) and added is not one:
        outer.append((c.state(added), added.dim()))
    return c.orders.meet(outer, shape)


@rule("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable",
      "scaled_dot_product_attention")  # fmt: skip
def attended(c: RowCall) -> Result:
    """A row for each query."""
    return queried(c, c.get("query"))


@rule("_grouped_mm", "_scaled_grouped_mm")
def grouped_product(c: RowCall) -> Result:
    """Each row of the first factor times one of several matrices: an expert's."""
    first, second = c.tensors()[:2]
    return queried(c, first) if (first.dim(), second.dim()) == (2, 3) else c.lost()


#: What transformers computes the same by, where torch's own op cannot.
_RULES["transformers::grouped_mm_fallback"] = grouped_product


def queried(c: RowCall, query: torch.Tensor) -> list[State]:
    """Results whose rows are the queries'."""
    state = c.state(query)
    if not isinstance(state, Rows):
        return [state] * len(c.results)
    found: list[State] = []
    for result in c.results:
        sizes = [as_expr(size) for size in result.shape]
        places = [i for i, dim in enumerate(state.dims) if axes_of([dim])]
        # Heads and their width may be one dimension: what matters is where tokens lie.
        fits = all(i < len(sizes) and sizes[i] == c.orders.size(state.dims[i]) for i in places)
        dims = [state.dims[i] if i in places else ((size, None),) for i, size in enumerate(sizes)]
        found.append(with_dims(c, state, dims) if fits else None)
    if found and found[0] is None and axes_of(state.dims):
        found[0] = c.lost()
    return found


@rule("convolution", "_convolution", "conv1d", "conv2d")
def convolved(c: RowCall) -> Result:
    """Along a dimension of tokens, each entry is its token's where as many come out as went in, centred or causal."""
    source, weight = c.get("input"), c.get("weight")
    state = c.state(source)
    if not isinstance(state, Rows):
        return state
    if source.dim() != len(c.shape) or axes_of(state.dims[1:2]) or c.get("transposed"):
        return c.lost()
    order, dims = state.order, [state.dims[0], ((c.shape[1], None),)]
    spatial = source.dim() - 2
    given = {
        name: (_listed(c.arguments.get(name, default)) * spatial)[:spatial]
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    }
    for i in range(spatial):
        dim = state.dims[2 + i]
        if not axes_of([dim]):
            dims.append(((c.shape[2 + i], None),))
            continue
        reach = (as_expr(weight.shape[2 + i]) - 1) * given["dilation"][i]
        pad = given["padding"][i]
        if given["stride"][i] != 1:
            return c.lost()
        if 2 * pad == reach:
            dims.append(dim)
        elif pad == reach:
            # What a causal convolution ends with is cut off.
            kept = [axis for axis in order.axes if axis not in axes_of([dim])]
            order, new = c.orders.cat([(order, dim, c.orders.size(dim)), (None, ((reach, None),), reach)], kept)
            dims.append(new)
        elif pad == 0 and order.kind == "cat" and axes_of([dim]) == order.axes[-1:] and len(order.parts[0]) == 2:
            (hole, _, length), (behind, of, _) = order.parts[0]
            if hole is not None or length != reach or behind is None:
                return c.lost()
            order = behind
            dims.append(of)
        else:
            return c.lost()
    return c.orders.rows(order, dims)
