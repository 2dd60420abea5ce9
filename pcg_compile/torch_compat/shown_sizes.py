"""Larger sizes that a trace or a compiler is shown in place of 0 and 1 (torch 2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch.utils._pytree import tree_leaves, tree_map

from .dynamo_traces import Marks
from .fake_tensors import FakeTensor, FakeTensorMode, python_dispatcher
from .guards import set_replacements

#: What a compiler is shown for sizes of 0 and 1, by symbol: equal ones it would take for the same. The first row that
#: breaks no condition.
_SHOWN = ((16, 24, 40, 48, 56, 80, 88, 96), (8, 12, 14, 10, 6, 4), (2, 3, 5, 7, 9, 11))


@contextmanager
def shown_larger(
    values: Sequence[Any], symbols: Sequence[sympy.Symbol], fake_mode: FakeTensorMode, conditions: list[Any]
) -> Iterator[Sequence[Any]]:
    """The fake inputs of a piece, its sizes of 0 and 1 replaced by larger ones while it compiles (2.11 to 2.13).

    Inductor would lay out code for such a size alone. Where no larger size will do, it is a number while the piece
    compiles, and ``conditions`` say so: Inductor computes what is wrong where a condition tells it that a symbol is 1,
    and the symbol stands in shapes all the same (2.13: a product of one row, under size-oblivious reasoning).
    """
    env = fake_mode.shape_env
    small = [] if env is None else [symbol for symbol in symbols if env.backed_var_to_val.get(symbol) in (0, 1)]
    if env is None or not small:
        yield values
        return
    hints = _larger_hints(env, small)
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    plain = all(
        type(t) in (FakeTensor, torch.nn.Parameter) and t.layout == torch.strided and not (t.is_conj() or t.is_neg())
        for t in tensors
    )
    storages = {t.untyped_storage()._cdata for t in tensors} if plain else set()
    if not hints or len(storages) < len(tensors) or any(isinstance(v, torch.SymFloat) for v in values):
        numbers = {symbol: sympy.Integer(env.backed_var_to_val[symbol]) for symbol in small}
        conditions += [sympy.Eq(symbol, number) for symbol, number in numbers.items()]
        old = dict(env.replacements)
        # What stands for one of them is the number itself: under size-oblivious reasoning torch looks no further.
        set_replacements(env, {**{s: expr.xreplace(numbers) for s, expr in old.items()}, **numbers})
        try:
            yield values
        finally:
            set_replacements(env, {**{s: n for s, n in env.replacements.items() if s not in numbers}, **old})
        return
    before = {symbol: env.backed_var_to_val[symbol] for symbol in hints}
    env.backed_var_to_val.update(hints)
    env._update_version_counter()

    def number(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr
        return env.create_symintnode(expr, hint=int(expr.xreplace(dict(env.backed_var_to_val))))

    def again(value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return number(value)
        shape, strides = [number(n) for n in value.shape], [number(n) for n in value.stride()]
        offset = number(value.storage_offset())
        if not any(isinstance(size, torch.SymInt) for size in (*shape, *strides, offset)):
            return value
        with fake_mode, python_dispatcher(), torch.no_grad():
            if isinstance(offset, int) and offset == 0:
                return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
            reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            base = torch.empty((offset + reach + 1,), dtype=value.dtype, device=value.device)
            return base.as_strided(shape, strides, offset)

    try:
        yield [again(value) for value in values]
    finally:
        env.backed_var_to_val.update(before)
        env._update_version_counter()


def _larger_hints(env: Any, small: Sequence[sympy.Symbol]) -> dict[sympy.Symbol, sympy.Integer]:
    """Larger values for sizes of 0 and 1 that break none of the conditions so far; {} where there are none."""
    known = env.backed_var_to_val
    for shown in _SHOWN:
        free = [n for n in shown if n not in known.values()]
        hints = {symbol: sympy.Integer(n) for symbol, n in zip(small, free, strict=False)}
        if len(hints) < len(small):
            continue
        for symbol, expr in env.replacements.items():
            if symbol in known and expr.free_symbols & hints.keys():
                hints[symbol] = expr.xreplace({**known, **hints})
        values = {**known, **hints}
        if (
            all(hint.is_Integer for hint in hints.values())
            and all(hint in env.bound_sympy(symbol) for symbol, hint in hints.items())
            and all(guard.expr.xreplace(values) == sympy.true for guard in env.guards)
        ):
            return hints
    return {}


def show_more_rows(arguments: dict[str, Any], marks: Marks) -> tuple[Marks, tuple[int, int]] | None:
    """Shows a trace tensors of more rows where marked sizes are 1; None where that cannot be (2.11 to 2.13).

    torch lays a view of one row out for that row alone, and a trace is to serve all sizes. ``arguments`` is what
    Dynamo traces instead of the frame's own variables; the call itself gets what its caller passed. Dynamo does not
    check its guards at a call that it traced for, so whoever shows other sizes checks them: :func:`guards_hold_at`.

    Returns:
        The marks of what is shown, the size that the call has, and the one that is shown instead.
    """
    real = {tensor.shape[d] for tensor, dims, _ in marks for d in dims if tensor.shape[d] == 1}
    leaves = [leaf for value in arguments.values() for leaf in _tensor_leaves(value)]
    # A ragged size of a nested tensor is no number.
    taken = {size for tensor in leaves for size in tensor.shape if isinstance(size, int)}
    # A size of its own: which symbols stand for it is known by the value that they were shown.
    free = [size for size in _SHOWN[0] if size not in taken]
    if len(real) != 1 or not free:
        return None
    larger: dict[int, torch.Tensor] = {}
    shown: Marks = []
    for tensor, dims, surely in marks:
        small = {d for d in dims if tensor.shape[d] == 1}
        if small and id(tensor) not in larger:
            grown = _with_more_rows(tensor, small, free[0])
            if grown is None:
                return None
            larger[id(tensor)] = grown
        shown.append((larger[id(tensor)] if small else tensor, dims, surely))
    for name, value in arguments.items():
        if not isinstance(value, torch.nn.Module):
            arguments[name] = tree_map(lambda leaf: larger.get(id(leaf), leaf), value)
    return shown, (real.pop(), free[0])


def _tensor_leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.nn.Module):
        return []
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _with_more_rows(tensor: torch.Tensor, dims: Set[int], rows: int) -> torch.Tensor | None:
    """A tensor of the same layout with ``rows`` entries in some dimensions; None where its entries would overlap."""
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.requires_grad:
        return None
    shape = [rows if d in dims else size for d, size in enumerate(tensor.shape)]
    strides = list(tensor.stride())
    dense = least = 1
    for d in sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), -d)):
        # Behind what grows, dimensions that lie densely go on doing so.
        if tensor.stride(d) == dense:
            strides[d] = least
        elif shape[d] > 1 and strides[d] < least:
            return None
        dense, least = tensor.stride(d) * max(tensor.shape[d], 1), strides[d] * shape[d]
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
