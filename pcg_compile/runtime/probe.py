"""The probe for pieces that analysis cannot see through: do their real rows change with the padding?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ..graph.scalars import strides_at, symbols_of
from .views import assign, looks_like, real_rows, tails

__all__ = ["Argument", "probe"]

Sizes = Mapping[sympy.Symbol, int]

#: A size-dependent result differs by far more; a kernel chosen for another row count by less.
_TOLERANCE = 1e-2
_INF, _NAN = float("inf"), float("nan")
#: Rows that all real ones are made like, one after the other.
_PICKS = (0, -1)
#: What padding is filled with, run by run; 2 stands for a value near the largest of the type. NaN alone would not do:
#: no comparison with it is true, so that a largest value over all rows would be compared with nothing.
_RUBBISH = ((_NAN, _INF, -_INF, 2.0, -2.0, 0.0, 1.0), (2.0, -2.0, 1.0), (0.0,))


@dataclass(frozen=True)
class Argument:
    """One tensor that a piece reads: at the bucket's size, as the trace saw it, and whether the piece writes it."""

    static: torch.Tensor
    fake: torch.Tensor
    written: bool
    #: Padding that must stay as it is: indices to memory that nobody owns.
    fixed: bool
    #: Entries at the front that hold what padding writes: the first slot of a cache's page 0.
    scratch: int = 0


def probe(
    run: Callable[[Sequence[Any], Sizes], Sequence[torch.Tensor]],
    arguments: Sequence[Argument],
    results: Sequence[torch.Tensor],
    sizes: Sizes,
    bucket: Sizes,
) -> str | None:
    """Runs a piece at the bucket with different rubbish as padding, and once at its exact size.

    Args:
        run: calls the piece with tensors and the sizes to tell it. arguments: its static inputs, real rows filled in.
        results: fake values of its results. sizes: the real sizes, below the bucket's. bucket: the bucket's sizes.

    Returns:
        None where the real rows of all results, and of all that the piece writes, are the same bit for bit whatever
        the padding holds, and those of the exact run up to rounding; else what differs. The arguments are left as they
        were.
    """
    with torch.inference_mode(False), torch.no_grad(), _restored(arguments):
        try:
            return _compare(run, arguments, results, sizes, bucket)
        except Exception as error:
            return f"it raises {type(error).__name__} with padding"


def _compare(
    run: Callable[[Sequence[Any], Sizes], Sequence[torch.Tensor]],
    arguments: Sequence[Argument],
    results: Sequence[torch.Tensor],
    sizes: Sizes,
    bucket: Sizes,
) -> str | None:
    written = [a for a in arguments if a.written]

    def at_bucket() -> list[torch.Tensor]:
        before = [a.static.clone() for a in written]
        outputs = run([a.static for a in arguments], bucket)
        made = [real_rows(r, f, sizes).clone() for r, f in zip(outputs, results, strict=True)]
        made += [real_rows(a.static, a.fake, sizes)[a.scratch :].clone() for a in written]
        for argument, old in zip(written, before, strict=True):
            assign(argument.static, old)
        return made

    runs = []
    for seed in range(len(_RUBBISH)):
        for argument in arguments:
            if not argument.fixed:
                _litter(argument, sizes, seed)
        runs.append(at_bucket())
    for i, (one, *others) in enumerate(zip(*runs, strict=True)):
        if not all(torch.equal(_comparable(one), _comparable(other)) for other in others):
            return f"result {i} changes with the padding"
    which = _differs(runs[0], _run_exact(run, arguments, sizes))
    leveled = [(a, a.static.clone()) for a in arguments if not a.fixed and symbols_of(a.fake)]
    for pick in _PICKS:
        if which is not None:
            break
        # Many rows alike: what counts rows of a kind up to a limit that follows from the size is full then; and the
        # padding's integers, which are some real row's, are no longer among the real ones: a maximum, a set of them.
        for argument, old in leveled:
            assign(argument.static, old)
            _level(argument, sizes, pick)
        which = _differs(at_bucket(), _run_exact(run, arguments, sizes))
    return None if which is None else f"result {which} changes with the size that the piece is run at"


def _run_exact(
    run: Callable[[Sequence[Any], Sizes], Sequence[torch.Tensor]], arguments: Sequence[Argument], sizes: Sizes
) -> list[torch.Tensor]:
    inputs = [_exact(a, sizes) for a in arguments]
    results = [r.clone() for r in run(inputs, sizes)]
    return results + [t[a.scratch :] for t, a in zip(inputs, arguments, strict=True) if a.written]


def _differs(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> int | None:
    for i, (one, other) in enumerate(zip(ones, others, strict=True)):
        if one.shape != other.shape or not _close(one, other):
            return i
    return None


def _level(argument: Argument, sizes: Sizes, pick: int) -> None:
    """Makes all real entries along a dynamic dimension like the first (0) or the last (-1)."""
    real = real_rows(argument.static, argument.fake, sizes)
    for dim, size in enumerate(argument.fake.shape):
        if symbols_of(size) and real.numel():
            assign(real, real.narrow(dim, pick % real.shape[dim], 1).clone().expand_as(real))


def _litter(argument: Argument, sizes: Sizes, seed: int) -> None:
    """Fills the padding: floats as one of ``_RUBBISH``, integers with values from the real rows."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for tail in tails(argument.static, argument.fake, sizes):
        if tail.numel() == 0:
            continue
        if tail.is_floating_point() or tail.is_complex():
            pool = torch.tensor(_RUBBISH[seed], dtype=torch.float64, device="cpu")
            # Large for the type, and finite.
            pool = torch.where(pool.abs() == 2, pool * (torch.finfo(tail.dtype).max / 8), pool)
            chosen = torch.randint(len(pool), tail.shape, generator=generator, device="cpu")
            assign(tail, pool[chosen].to(tail.dtype))
        else:
            real = real_rows(argument.static, argument.fake, sizes).reshape(-1)
            if real.numel() == 0:
                continue
            chosen = torch.randint(real.numel(), tail.shape, generator=generator, device="cpu").to(real.device)
            assign(tail, real[chosen])


def _exact(argument: Argument, sizes: Sizes) -> torch.Tensor:
    view = real_rows(argument.static, argument.fake, sizes)
    if looks_like(view, argument.fake, sizes) and not argument.written:
        return view
    copy = torch.empty_strided(
        tuple(view.shape), strides_at(argument.fake, sizes), dtype=view.dtype, device=view.device
    )
    return assign(copy, view)


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """NaN equals NaN: what matters is that the padding did not make it."""
    return tensor.nan_to_num(nan=1.25) if tensor.is_floating_point() else tensor


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_floating_point() or one.is_complex():
        return torch.allclose(one, other.to(one.device), rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
    return torch.equal(one, other)


@contextmanager
def _restored(arguments: Sequence[Argument]) -> Iterator[None]:
    before = [a.static.clone() for a in arguments]
    try:
        yield
    finally:
        for argument, old in zip(arguments, before, strict=True):
            assign(argument.static, old)
