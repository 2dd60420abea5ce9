"""Dimensions as the padding analysis sees them: lists of factors, some of them dynamic.

A tensor at a bucket is *valid* where its entries at real indices are what they would be at the real sizes. A dimension
is a tuple of factors, outermost first, its index being their mixed-radix number; an index is real where each dynamic
factor's part is below that factor's real size. ``[b, s, h] -> view -> [b * s, h]`` thus keeps track of both: the merged
dimension has the factors ``(b, s)``, and viewing it apart again loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

Dim = tuple[Any, ...]
Dims = tuple[Dim, ...]


class Mixing(Exception):
    """A node whose real results may depend on padding, with the reason."""


@dataclass(frozen=True)
class Causal:
    """A factor of ``size`` entries; only the first ``valid`` can be trusted (a causal convolution's tail)."""

    size: Any
    valid: Any


def as_expr(size: Any) -> Any:
    """A size as an int or a sympy expression."""
    if isinstance(size, torch.SymInt):
        size = size.node.expr
    if isinstance(size, sympy.Basic):
        return int(size) if size.is_Integer else size
    return size


def expanded(size: Any) -> Any:
    """A size in one form, so equal ones compare equal."""
    size = as_expr(size)
    return as_expr(sympy.expand(size)) if isinstance(size, sympy.Basic) else size


def quotient(whole: Any, part: Any) -> Any:
    """``whole / part`` where that is a whole number at all sizes, else None."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    ratio = sympy.cancel(sympy.sympify(whole) / sympy.sympify(part))
    return expanded(ratio) if ratio.as_numer_denom()[1] == 1 else None


def is_dynamic(factor: Any) -> bool:
    """Whether a factor changes with the bucket."""
    return isinstance(factor, Causal) or (isinstance(factor, sympy.Basic) and bool(factor.free_symbols))


def has_tokens(dim: Dim) -> bool:
    """Whether a dimension has padding entries."""
    return any(is_dynamic(factor) for factor in dim)


def is_prefix(dim: Dim) -> bool:
    """Whether the real entries come first: at most the outermost factor (of more than one entry) is dynamic."""
    factors = [factor for factor in dim if factor != 1]
    return not any(is_dynamic(factor) for factor in factors[1:]) and not any(isinstance(f, Causal) for f in factors)


def grows(size: Any) -> bool:
    """Whether a size is known never to shrink as the sizes in it grow: ``64 - s`` and ``s % 4`` are not."""
    if not isinstance(size, sympy.Basic) or isinstance(size, sympy.Symbol) or not size.free_symbols:
        return True
    # Torch has Max and Min of its own, by the same names.
    kind = type(size).__name__
    if kind in ("FloorDiv", "CleanDiv"):
        return grows(size.args[0]) and bool(size.args[1].is_Integer)
    if isinstance(size, sympy.Mul):
        return all(bool(part.is_nonnegative) if part.is_Number else grows(part) for part in size.args)
    if isinstance(size, sympy.Add) or kind in ("Max", "Min"):
        return all(map(grows, size.args))
    return isinstance(size, sympy.Pow) and bool(size.exp.is_positive) and grows(size.base)


def dim_of(size: Any) -> Dim:
    """The dimension of an input's size: ``4 * s`` holds 4 entries for each of s, the real ones first."""
    expr = as_expr(size)
    if isinstance(expr, sympy.Mul):
        number, rest = expr.as_coeff_Mul()
        if number.is_Integer and isinstance(rest, sympy.Symbol):
            return (rest, int(number))
    return (expr,)


def dims_of(shape: Sequence[Any]) -> Dims:
    """The dimensions of an input's shape."""
    return tuple(dim_of(size) for size in shape)


def size_of(dim: Dim) -> Any:
    """The number of entries."""
    total: Any = 1
    for factor in dim:
        total = total * (factor.size if isinstance(factor, Causal) else factor)
    return expanded(total)


def broadcast(shapes: Sequence[Dims]) -> Dims:
    """The dimensions of a pointwise result.

    Raises:
        Mixing: dimensions of one size whose real entries lie differently.
    """
    rank = max((len(dims) for dims in shapes), default=0)
    result: list[Dim] = []
    for i in range(rank):
        found: Dim = (1,)
        for dims in shapes:
            k = i - rank + len(dims)
            if k < 0 or size_of(dims[k]) == 1:
                continue
            if size_of(found) == 1:
                found = dims[k]
            elif not _alike(found, dims[k]):
                raise Mixing("it combines dimensions whose real entries lie differently")
        result.append(found)
    return tuple(result)


def counts_alike(one: Dim, other: Dim) -> bool:
    """Whether two dimensions always have the same size."""
    return _merged(one) == _merged(other)


def _alike(one: Dim, other: Dim) -> bool:
    if (not has_tokens(one) and not has_tokens(other)) or counts_alike(one, other):
        return True
    first, second = _merged(one), _merged(other)
    # Sizes that are written otherwise and must be equal for the op to run, both with their real entries first.
    factors = (*first, *second)
    return len(first) == len(second) == 1 and all(is_dynamic(f) and not isinstance(f, Causal) for f in factors)


def _merged(dim: Dim) -> Dim:
    """Neighbouring static factors as one, so equal dimensions compare equal."""
    result: list[Any] = []
    for factor in dim:
        if factor == 1:
            continue
        if result and not is_dynamic(factor) and not is_dynamic(result[-1]):
            result[-1] = result[-1] * factor
        else:
            result.append(factor)
    return tuple(result)


def regroup(dims: Dims, shape: Sequence[Any]) -> Dims:
    """The dimensions of a view.

    Raises:
        Mixing: the view cuts through a dynamic factor.
    """
    factors = [factor for dim in dims for factor in _merged(dim)]
    result: list[Dim] = []
    for size in shape:
        wanted = as_expr(size)
        taken: list[Any] = []
        while size_of(tuple(taken)) != wanted:
            missing = quotient(wanted, size_of(tuple(taken)))
            if missing == 1:
                break  # The same size, written otherwise.
            if not factors:
                raise Mixing("its shape cannot be followed")
            head = factors.pop(0)
            if missing is None or (isinstance(missing, int) and is_dynamic(head)):
                raise Mixing("its view cuts through a dynamic size")
            if isinstance(missing, int) and isinstance(head, int) and head != missing:
                if head % missing == 0:
                    factors.insert(0, head // missing)
                    head = missing
                elif missing % head != 0:
                    raise Mixing("its view cuts across dimensions")
            elif isinstance(head, int) and not isinstance(missing, int) and quotient(missing, head) is None:
                common = _common(missing, head)
                if common in (0, 1):
                    raise Mixing("its view cuts through a dynamic size")
                factors.insert(0, head // common)
                head = common
            taken.append(head)
        result.append(tuple(taken) or (1,))
    if any(factor != 1 for factor in factors):
        raise Mixing("its shape cannot be followed")
    return tuple(result)


def _common(expr: Any, number: int) -> int:
    coefficient = sympy.sympify(expr).as_coeff_Mul()[0]
    return int(sympy.gcd(coefficient, number)) if coefficient.is_Integer else 1
