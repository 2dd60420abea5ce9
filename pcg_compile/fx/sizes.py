"""Sizes and ints of a graph: symbolic expressions, and their values at given sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..torch_compat.expressions import evaluate_expression

SymType = (torch.SymInt, torch.SymFloat, torch.SymBool)
_PLAIN = (
    int,
    float,
    bool,
    str,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    slice,
)


def plain(value: Any) -> Any:
    """A nested value with every ``torch.Size`` turned into a tuple, which pytrees descend into."""
    return tree_map(lambda leaf: tuple(leaf) if isinstance(leaf, torch.Size) else leaf, value)


def leaves_of(value: Any) -> Iterator[Any]:
    """The leaves of a nested value, those of a ``torch.Size`` too."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Size):
            yield from leaf
        else:
            yield leaf


def expr_of(value: Any) -> Any:
    """The sympy expression of a symbolic number; other values as they are."""
    return value.node.expr if isinstance(value, SymType) else value


def sizes_of(value: Any) -> frozenset[sympy.Symbol]:
    """The free symbols of all tensors' shapes in a nested value: what can be padded."""
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return frozenset().union(*(_free(size) for tensor in tensors for size in tensor.shape))


def symbols_of(value: Any) -> frozenset[sympy.Symbol]:
    """The free symbols of all numbers in a nested value, and of its tensors' shapes, strides and storage offsets."""
    found: set[sympy.Symbol] = set()
    for leaf in leaves_of(value):
        if isinstance(leaf, torch.Tensor):
            for size in (*leaf.shape, *(leaf.stride() if leaf.layout == torch.strided else ())):
                found |= _free(size)
            if leaf.layout == torch.strided:
                found |= _free(leaf.storage_offset())
        else:
            found |= _free(leaf)
    return frozenset(found)


def symbol_values(inputs: Sequence[Any]) -> dict[sympy.Symbol, Any]:
    """The SymInt of each symbol that a graph's inputs have: numbers first, then sizes of tensors."""
    sizes = [size for value in inputs if isinstance(value, torch.Tensor) for size in value.shape]
    values: dict[sympy.Symbol, Any] = {}
    for value in (*inputs, *sizes):
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            values.setdefault(value.node.expr, value)
    return values


def _free(value: Any) -> set[sympy.Symbol]:
    expr = expr_of(value)
    symbols: Any = expr.free_symbols if isinstance(expr, sympy.Basic) else set()
    result: set[sympy.Symbol] = symbols
    return result


def is_scalar(value: Any) -> bool:
    """Whether a nested value holds no tensor and nothing but numbers: it follows from the sizes."""
    return all(isinstance(leaf, (*SymType, *_PLAIN)) for leaf in leaves_of(value))


def evaluate(value: Any, sizes: Mapping[sympy.Symbol, int]) -> Any:
    """A nested value with every symbolic number replaced by its value at ``sizes``."""
    if isinstance(value, SymType):
        return _evaluate_one(value, sizes)
    return tree_map(lambda leaf: _evaluate_one(leaf, sizes), plain(value))


def _evaluate_one(leaf: Any, sizes: Mapping[sympy.Symbol, int]) -> Any:
    if isinstance(leaf, torch.SymInt):
        return _number(leaf.node.expr, sizes, int)
    if isinstance(leaf, torch.SymFloat):
        return _number(leaf.node.expr, sizes, float)
    if isinstance(leaf, torch.SymBool):
        return _number(leaf.node.expr, sizes, bool)
    return leaf


def _number(expr: Any, sizes: Mapping[sympy.Symbol, int], kind: Callable[[Any], Any]) -> Any:
    if isinstance(expr, sympy.Symbol):
        return kind(sizes[expr])
    if isinstance(expr, sympy.Basic):
        values = {s: sizes[s] for s in _free(expr)}
        if all(isinstance(value, int) for value in values.values()):
            return kind(expr.xreplace({s: sympy.Integer(value) for s, value in values.items()}))
        # Python's arithmetic on floats, not sympy's.
        return kind(evaluate_expression(expr, values))
    return kind(expr)


def size_at(expr: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    """The value of :func:`expr_of` a size."""
    return int(_number(expr, sizes, int))


def learned_from(number: Any) -> Callable[[Any], tuple[sympy.Symbol, Any]] | None:
    """What the value of a symbolic number tells: ``fn(value)`` gives a symbol and its value. None: nothing.

    The bool of a tensor's ``.item()`` is ``Eq(u0, 1)``.
    """
    expr = expr_of(number)
    if isinstance(expr, sympy.Symbol):
        return lambda value: (expr, value)
    if isinstance(expr, sympy.Eq):
        for symbol, truth in (expr.args, expr.args[::-1]):
            if isinstance(symbol, sympy.Symbol) and truth in (0, 1):
                return lambda value: (symbol, int(value) if truth == 1 else int(not value))
    return None


def shape_at(tensor: torch.Tensor, sizes: Mapping[sympy.Symbol, int]) -> tuple[int, ...]:
    """The shape of a fake tensor at ``sizes``."""
    return tuple([size if type(size) is int else _evaluate_one(size, sizes) for size in tensor.shape])


def strides_at(tensor: torch.Tensor, sizes: Mapping[sympy.Symbol, int]) -> tuple[int, ...]:
    """The strides of a fake tensor at ``sizes``, in elements."""
    return tuple([stride if type(stride) is int else _evaluate_one(stride, sizes) for stride in tensor.stride()])
