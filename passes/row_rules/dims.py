"""Dimensions as the padding analysis sees them: lists of factors, some of them dynamic.

A tensor at a bucket is *valid* if its entries at real indices are what they would be at the real sizes. A dimension is a
tuple of factors, outermost first, its index being their mixed-radix number; an index is real where each dynamic factor's
part is below that factor's real size. ``[b, s, h] -> view -> [b * s, h]`` thus keeps track of both: the merged dimension
has the factors ``(b, s)``, and viewing it apart again loses nothing.

A factor is an int, or a size that changes with the bucket: a sympy expression, :class:`Free` or :class:`Partial`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

__all__ = [
    "Dim",
    "Dims",
    "Free",
    "Mixing",
    "Partial",
    "as_expr",
    "broadcast",
    "concrete",
    "dims_of",
    "free_of",
    "grows",
    "has_tokens",
    "is_dynamic",
    "is_free",
    "is_prefix",
    "need_prefix",
    "need_static",
    "regroup",
    "same_size",
    "size_of",
]

Dim = tuple[Any, ...]
Dims = tuple[Dim, ...]


class Mixing(Exception):
    """A node whose real results may depend on padding, with the reason."""


@dataclass(frozen=True)
class Free:
    """A factor along which all entries are alike (a constant, an expanded row): right wherever the real ones lie."""

    size: Any


@dataclass(frozen=True)
class Partial:
    """A factor of ``size`` entries of which only the first ``valid`` are right (the tail of a padded convolution)."""

    size: Any
    valid: Any


def as_expr(size: Any) -> Any:
    """A size as an int or a sympy expression; other values as they are."""
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        size = size.node.expr
    if isinstance(size, sympy.Integer):
        return int(size)
    if isinstance(size, sympy.Expr) and not size.is_Symbol:
        size = sympy.expand(size)
        return int(size) if size.is_Integer else size
    return size


def is_dynamic(factor: Any) -> bool:
    """Whether a factor changes with the bucket."""
    return isinstance(factor, (Free, Partial)) or (isinstance(factor, sympy.Basic) and bool(factor.free_symbols))


def has_tokens(dim: Dim) -> bool:
    """Whether a dimension's size changes with the bucket."""
    return any(is_dynamic(factor) for factor in dim)


def is_free(dim: Dim) -> bool:
    """Whether all entries along a dimension are alike."""
    return len(dim) == 1 and isinstance(dim[0], Free)


def is_prefix(dim: Dim) -> bool:
    """Whether the real entries come first: only the outermost factor of more than one entry may be dynamic."""
    factors = [factor for factor in dim if factor != 1]
    return not any(is_dynamic(factor) for factor in factors[1:]) and not any(isinstance(f, Partial) for f in factors)


def dims_of(shape: Sequence[Any]) -> Dims:
    """The dimensions of a tensor whose real entries come first along each: any input's."""
    return tuple((as_expr(size),) for size in shape)


def free_of(shape: Sequence[Any]) -> Dims:
    """The dimensions of a tensor whose entries are all alike."""
    exprs = [as_expr(size) for size in shape]
    return tuple((Free(e),) if is_dynamic(e) else (e,) for e in exprs)


def concrete(dim: Dim) -> Dim:
    """The dimension for a result that depends on the position: a free one's real entries then come first."""
    return (dim[0].size,) if is_free(dim) else dim


def need_static(dim: Dim, what: str) -> None:
    """Raises :class:`Mixing` if a dimension holds padding; ``what`` the op does, as "sums over"."""
    if has_tokens(dim):
        raise Mixing(f"it {what} a dimension that holds padding")


def need_prefix(dim: Dim, what: str) -> None:
    """Raises :class:`Mixing` if there is padding between a dimension's real entries, or if their tail is wrong."""
    if has_tokens(dim) and not is_prefix(concrete(dim)):
        raise Mixing(f"it {what} a dimension with padding between its real entries")


def grows(size: Any) -> bool:
    """Whether a size is known to be no smaller at a larger bucket."""
    if not is_dynamic(size) or isinstance(size, sympy.Symbol):
        return True
    if isinstance(size, (sympy.Add, sympy.Max, sympy.Min)):
        return all(grows(term) for term in size.args)
    if isinstance(size, sympy.Mul):
        return all(term.is_positive if term.is_number else term.is_nonnegative and grows(term) for term in size.args)
    if isinstance(size, sympy.Pow):
        return bool(size.exp.is_number and size.exp.is_positive and size.base.is_nonnegative and grows(size.base))
    if type(size).__name__ in ("FloorDiv", "CleanDiv", "CeilToInt", "FloorToInt", "IntTrueDiv"):
        return grows(size.args[0]) and all(term.is_number and term.is_positive for term in size.args[1:])
    return False


def _entries(factor: Any) -> Any:
    return factor.size if isinstance(factor, (Free, Partial)) else factor


def size_of(dim: Dim) -> Any:
    """The number of entries."""
    total: Any = 1
    for factor in dim:
        total = total * _entries(factor)
    return as_expr(total)


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are equal whatever the symbols are."""
    if one is other or one == other:
        return True
    if isinstance(one, sympy.Basic) or isinstance(other, sympy.Basic):
        return bool(as_expr(sympy.sympify(one) - sympy.sympify(other)) == 0)
    return False


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
            if k >= 0:
                found = _combine(found, dims[k])
        result.append(found)
    return tuple(result)


def _combine(one: Dim, other: Dim) -> Dim:
    sizes = size_of(one), size_of(other)
    if sizes[0] == 1 or sizes[1] == 1:
        return other if sizes[0] == 1 else one
    if same_size(*sizes):
        if is_free(one) or is_free(other):
            return other if is_free(one) else one
        if not has_tokens(one) and not has_tokens(other):
            return one
        if _merged(one) == _merged(other) or (is_prefix(one) and is_prefix(other)):
            return one if len(one) >= len(other) else other
    raise Mixing("it combines dimensions whose real entries lie differently")


def _merged(factors: Sequence[Any]) -> tuple[Any, ...]:
    """Neighbouring static factors as one."""
    result: list[Any] = []
    for factor in factors:
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
    if not any(has_tokens(dim) for dim in dims):
        return dims_of(shape)
    factors = list(_merged([factor for dim in dims for factor in dim]))
    result: list[Dim] = []
    for size in shape:
        missing = as_expr(size)
        taken: list[Any] = []
        while missing != 1:
            if not factors:
                raise Mixing("its shape cannot be followed")
            mine, rest = _split(factors.pop(0), missing)
            if rest is not None:
                factors.insert(0, rest)
            taken.append(mine)
            missing = _quotient(missing, _entries(mine))
        result.append(tuple(taken) or (1,))
    if factors:
        raise Mixing("its shape cannot be followed")
    return tuple(result)


def _split(head: Any, missing: Any) -> tuple[Any, Any]:
    """Of a factor, the outer part that a dimension still misses, and the inner part that is left (or None)."""
    if _quotient(missing, _entries(head)) is not None:
        return head, None
    inner = _quotient(_entries(head), missing)
    if isinstance(head, Free) and inner is not None:
        return (Free(missing) if is_dynamic(missing) else missing), (Free(inner) if is_dynamic(inner) else inner)
    if isinstance(head, int) and isinstance(missing, int) and inner is not None:
        return missing, inner
    if isinstance(head, int) and not isinstance(missing, int):
        common = _common(missing, head)
        if common > 1:
            return common, head // common
    # The first k * m entries are the first m groups of k.
    if isinstance(head, sympy.Basic) and isinstance(inner, int) and is_dynamic(missing):
        return missing, inner
    raise Mixing("its view cuts through a dynamic size")


def _common(expr: Any, number: int) -> int:
    coefficient = sympy.factor_terms(sympy.sympify(expr)).as_coeff_Mul()[0]
    return int(sympy.gcd(coefficient, number)) if coefficient.is_Integer else 1


def _quotient(whole: Any, part: Any) -> Any:
    """``whole / part`` where that is a whole number whatever the symbols are, else None."""
    if part == 1 or whole == part:
        return whole if part == 1 else 1
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    if isinstance(whole, int) or part == 0:
        return None
    ratio = sympy.cancel(whole / part)
    if ratio.is_Integer:
        return int(ratio)
    return as_expr(ratio) if ratio.as_numer_denom()[1] == 1 else None
