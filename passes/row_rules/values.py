"""Bounds of entries, so that an index is never out of range in the padding: on a GPU that kills the context."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.utils._pytree import tree_map

from .call import Call, Tracked, Values
from .dims import Mixing, as_expr, size_of

__all__ = ["require_in_range", "values_of"]

_Bounds = tuple[Any, Any]
_UNKNOWN: _Bounds = (None, None)

_LAYOUT = frozenset(
    "clone alias detach lift_fresh lift_fresh_copy view reshape _unsafe_view _reshape_alias expand permute transpose t "
    "squeeze unsqueeze select slice split split_with_sizes unbind repeat flip roll".split()
)
_SELECTS = frozenset("index index_select gather amax amin take".split())
_CHOOSES = frozenset("sort topk cummax cummin max min median kthvalue mode".split())
#: Whole numbers that matter as indices are exact in these.
_WIDE = (torch.int64, torch.int32, torch.float32, torch.float64)
_FLAGS = frozenset(
    "eq ne lt le gt ge logical_and logical_or logical_not logical_xor isnan isinf isfinite any all isin".split()
)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def values_of(call: Call, position: int) -> Values:
    """What is known of the entries of a result, ``position`` among those that are tensors."""
    tensors = call.tensors()
    # Static tensors hold real entries: another run at the bucket's sizes would read the same.
    positional = all(t.values.positional for t in tensors if t.dynamic)
    low, high = _bounds(call, position)
    given = _given(call, tensors)
    zero = _bounds(replace(call, arguments=tree_map(_at_zero, call.arguments)), position) if given is not None else _UNKNOWN
    return Values(low, high, given if None not in zero else None, zero, positional)


def _given(call: Call, tensors: Sequence[Tracked]) -> Any:
    """Of what input's entries those of the result are made, one by one."""
    found = {t.values.given for t in tensors if not t.values.constant}
    if len(found) != 1:
        return None
    (given,) = found
    if given is None or call.base in _POINTWISE or call.base in _FLAGS or call.base == "_to_copy":
        return given
    # Another layout: it lines up with nothing but itself.
    return (given, call.name) if call.base in _LAYOUT else None


def _at_zero(leaf: Any) -> Any:
    if isinstance(leaf, Tracked) and leaf.values.given is not None:
        return replace(leaf, values=replace(leaf.values, low=leaf.values.zero[0], high=leaf.values.zero[1]))
    return leaf


def _bounds(call: Call, position: int) -> _Bounds:
    base, dtype, tensors = call.base, call.dtypes[position], call.tensors()
    if base in _FLAGS or dtype == torch.bool:
        return 0, 1
    if base in _CHOOSES and "other" not in call.arguments:
        return _position(call) if position == 1 else _of(tensors[0])
    if base in ("cat", "stack"):
        return _union([_of(t) for t in tensors])
    if base in _LAYOUT or base in _SELECTS:
        # A view as another type reads other numbers.
        return _of(tensors[0]) if tensors[0].dtype == dtype else _UNKNOWN
    if dtype not in _WIDE:
        return _UNKNOWN
    if base in ("copy", "_to_copy"):
        return _of(tensors[-1])
    compute = _POINTWISE.get(base) or _OTHERS.get(base)
    return compute(call) if compute is not None else _UNKNOWN


def _of(value: Any) -> _Bounds:
    if isinstance(value, Tracked):
        return value.values.low, value.values.high
    value = as_expr(value)
    number = isinstance(value, (int, float, bool)) or (isinstance(value, sympy.Basic) and value.is_number)
    return (value, value) if number and abs(value) < 2**62 else _UNKNOWN


def _known(*bounds: _Bounds) -> bool:
    return all(b is not None for pair in bounds for b in pair)


def _union(bounds: Sequence[_Bounds]) -> _Bounds:
    if not _known(*bounds):
        return _UNKNOWN
    return sympy.Min(*(b[0] for b in bounds)), sympy.Max(*(b[1] for b in bounds))


def _pair(call: Call) -> tuple[_Bounds, _Bounds]:
    other = call.arguments.get("other")
    return _of(call.arguments["self"]), _of(other)


def _add(call: Call) -> _Bounds:
    return _sum(*_pair(call), call.arguments.get("alpha", 1))


def _sum(a: _Bounds, b: _Bounds, alpha: Any) -> _Bounds:
    if not _known(a, b):
        return _UNKNOWN
    ends = (b[0] * alpha, b[1] * alpha)
    return a[0] + (ends[0] if alpha >= 0 else ends[1]), a[1] + (ends[1] if alpha >= 0 else ends[0])


def _product(a: _Bounds, b: _Bounds) -> _Bounds:
    if not _known(a, b):
        return _UNKNOWN
    ends = [x * y for x, y in itertools.product(a, b)]
    return sympy.Min(*ends), sympy.Max(*ends)


def _clamp(call: Call) -> _Bounds:
    low, high = _of(call.arguments["self"])
    if call.dtypes[0] not in _INTEGERS and (low is None or high is None):
        return _UNKNOWN  # NaN stays NaN.
    floor, ceiling = _of(call.arguments.get("min", "")), _of(call.arguments.get("max", ""))
    if floor[0] is not None:
        low = floor[0] if low is None else sympy.Max(low, floor[0])
        high = high if high is None else sympy.Max(high, floor[1])
    if ceiling[1] is not None:
        low = low if low is None else sympy.Min(low, ceiling[0])
        high = ceiling[1] if high is None else sympy.Min(high, ceiling[1])
    return low, high


def _extreme(call: Call) -> _Bounds:
    a, b = _pair(call)
    smaller = call.base in ("minimum", "min")
    combine = sympy.Min if smaller else sympy.Max
    both = [None if one is None or other is None else combine(one, other) for one, other in zip(a, b, strict=True)]
    if call.dtypes[0] in _INTEGERS:
        # One known side is enough.
        side = 1 if smaller else 0
        if both[side] is None:
            both[side] = a[side] if a[side] is not None else b[side]
    return both[0], both[1]


def _remainder(call: Call) -> _Bounds:
    modulus = _of(call.arguments["other"])
    if call.dtypes[0] not in _INTEGERS or not isinstance(modulus[0], int) or modulus[0] != modulus[1] or modulus[0] <= 0:
        return _UNKNOWN
    return 0, modulus[0] - 1


def _divide(call: Call) -> _Bounds:
    a, b = _pair(call)
    rounded = call.base == "floor_divide" or call.arguments.get("rounding_mode") == "floor"
    if not _known(a, b) or not rounded or b[0] != b[1] or not isinstance(b[0], int) or b[0] <= 0:
        return _UNKNOWN
    return sympy.floor(sympy.sympify(a[0]) / b[0]), sympy.floor(sympy.sympify(a[1]) / b[0])


def _mask(call: Call) -> _Bounds:
    for low, high in _pair(call):
        if low is not None and low == high and low >= 0:
            return 0, high
    return _UNKNOWN


def _abs(call: Call) -> _Bounds:
    low, high = _of(call.arguments["self"])
    return (0, sympy.Max(-low, high)) if _known((low, high)) else _UNKNOWN


def _negative(call: Call) -> _Bounds:
    low, high = _of(call.arguments["self"])
    return (-high, -low) if _known((low, high)) else _UNKNOWN


def _times_size(call: Call) -> _Bounds:
    """A sum of some of the entries along the dimensions."""
    source = call.tensors()[0]
    low, high = _of(source)
    if low is None or high is None:
        return _UNKNOWN
    count: Any = 1
    for dim in source.dims:
        count = count * size_of(dim)
    return sympy.Min(low, low * count), sympy.Max(high, high * count)


def _arange(call: Call) -> _Bounds:
    start, step = call.arguments.get("start", 0), call.arguments.get("step", 1)
    if not all(isinstance(v, int) for v in (start, step)):
        return _UNKNOWN
    ends = (start, start + step * (as_expr(call.shapes[0][0]) - 1))
    return sympy.Min(*ends), sympy.Max(*ends)


def _created(call: Call) -> _Bounds:
    fixed = {"zeros": 0, "ones": 1, "new_zeros": 0, "new_ones": 1, "zeros_like": 0, "ones_like": 1}
    for name in ("fill_value", "value", "s"):
        if name in call.arguments:
            return _of(call.arguments[name])
    return _of(fixed[call.base]) if call.base in fixed else _UNKNOWN


def _position(call: Call) -> _Bounds:
    source = call.tensors()[0]
    if not source.dims:
        return 0, 0
    axis = call.arguments.get("dim", -1 if call.base != "argmax" and call.base != "argmin" else None)
    count: Any = 1
    for i, dim in enumerate(source.dims):
        if axis is None or i == axis % len(source.dims):
            count = count * size_of(dim)
    return 0, count - 1


def _boundaries(call: Call) -> _Bounds:
    edges = call.tensor("boundaries" if "boundaries" in call.arguments else "sorted_sequence")
    return 0, size_of(edges.dims[-1])


_POINTWISE: dict[str, Callable[[Call], _Bounds]] = {
    "add": _add,
    "sub": lambda call: _sum(*_pair(call), -1 * call.arguments.get("alpha", 1)),
    "rsub": lambda call: _sum(_pair(call)[1], _pair(call)[0], -1 * call.arguments.get("alpha", 1)),
    "mul": lambda call: _product(*_pair(call)),
    "neg": _negative, "abs": _abs, "remainder": _remainder, "floor_divide": _divide, "div": _divide,
    "clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp, "minimum": _extreme, "maximum": _extreme,
    "min": _extreme, "max": _extreme,
    "bitwise_and": _mask,
    "where": lambda call: _union([_pair(call)[0], _pair(call)[1]]),
    "masked_fill": lambda call: _union([_of(call.arguments["self"]), _of(call.arguments["value"])]),
}  # fmt: skip
_OTHERS: dict[str, Callable[[Call], _Bounds]] = {
    "argmax": _position, "argmin": _position, "argsort": _position,
    "bucketize": _boundaries, "searchsorted": _boundaries, "cumsum": _times_size, "sum": _times_size, "arange": _arange,
    "constant_pad_nd": lambda call: _union([_of(call.arguments["self"]), _of(call.arguments.get("value", 0))]),
} | dict.fromkeys(
    "full zeros ones new_full new_zeros new_ones full_like zeros_like ones_like scalar_tensor fill".split(), _created
)  # fmt: skip


def require_in_range(call: Call, index: Tracked, size: Any, *, negative: bool = False) -> None:
    """An index must not be out of range in the padding; where the bucket's size decides, ``call.limits`` says how.

    Raises:
        Mixing: nothing keeps it in range.
    """
    known = index.values
    if not index.dynamic or index.scratch:
        return
    bounds = known.zero if known.given is not None else (known.low, known.high)
    if None in bounds:
        # An unpadded run of as many rows would fail as well.
        if known.positional:
            return
        raise Mixing("its index is computed, and may be out of range in the padding; index.clamp(0, size - 1) says it is not")
    for limit in (sympy.Le(bounds[1], size - 1), sympy.Ge(bounds[0], -size if negative else 0)):
        if limit == sympy.false:
            raise Mixing("its index is out of range in the padding")
        if limit != sympy.true:
            call.limits.append(limit)
