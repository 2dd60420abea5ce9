"""The probe for pieces that analysis cannot see through: do their real rows change with the padding?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ..graph.scalars import strides_at
from .views import looks_like, real_rows, tails

__all__ = ["Argument", "probe"]

Sizes = Mapping[sympy.Symbol, int]

#: A size-dependent result differs by far more; a kernel chosen for another row count by less.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Argument:
    """One tensor that a piece reads: at the bucket's size, as the trace saw it, and whether the piece writes it."""

    static: torch.Tensor
    fake: torch.Tensor
    written: bool
    #: Padding that must stay as it is: indices to memory that nobody owns.
    fixed: bool


def probe(
    run: Callable[[Sequence[Any], Sizes], Sequence[torch.Tensor]],
    arguments: Sequence[Argument],
    results: Sequence[torch.Tensor],
    sizes: Sizes,
    bucket: Sizes,
) -> str | None:
    """Runs a piece at the bucket twice, with different rubbish as padding, and once at its exact size.

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
    runs = []
    for seed in (0, 1):
        for argument in arguments:
            if not argument.fixed:
                _litter(argument, sizes, seed)
        written = [a for a in arguments if a.written]
        before = [a.static.clone() for a in written]
        outputs = run([a.static for a in arguments], bucket)
        made = [real_rows(r, f, sizes).clone() for r, f in zip(outputs, results, strict=True)]
        made += [real_rows(a.static, a.fake, sizes).clone() for a in written]
        runs.append(made)
        for argument, old in zip(written, before, strict=True):
            argument.static.copy_(old)
    for i, (one, other) in enumerate(zip(*runs, strict=True)):
        if not torch.equal(_comparable(one), _comparable(other)):
            return f"result {i} changes with the padding"
    exact_inputs = [_exact(a, sizes) for a in arguments]
    exact = [r.clone() for r in run(exact_inputs, sizes)]
    exact += [t for t, a in zip(exact_inputs, arguments, strict=True) if a.written]
    for i, (one, other) in enumerate(zip(runs[0], exact, strict=True)):
        if one.shape != other.shape or not _close(one, other):
            return f"result {i} changes with the size that the piece is run at"
    return None


def _litter(argument: Argument, sizes: Sizes, seed: int) -> None:
    """Fills the padding: floats with NaN, infinities and large values, integers with values from the real rows."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for tail in tails(argument.static, argument.fake, sizes):
        if tail.numel() == 0:
            continue
        if tail.is_floating_point() or tail.is_complex():
            largest = torch.finfo(tail.dtype).max / 4
            pool = [float("nan"), float("inf"), -float("inf"), largest, -largest, 0.0, 1.0]
            chosen = torch.randint(len(pool), tail.shape, generator=generator)
            tail.copy_(torch.tensor(pool, dtype=torch.float64)[chosen].to(tail.dtype))
        else:
            real = real_rows(argument.static, argument.fake, sizes).reshape(-1)
            if real.numel() == 0:
                continue
            chosen = torch.randint(real.numel(), tail.shape, generator=generator).to(real.device)
            tail.copy_(real[chosen])


def _exact(argument: Argument, sizes: Sizes) -> torch.Tensor:
    view = real_rows(argument.static, argument.fake, sizes)
    if looks_like(view, argument.fake, sizes) and not argument.written:
        return view
    copy = torch.empty_strided(
        tuple(view.shape), strides_at(argument.fake, sizes), dtype=view.dtype, device=view.device
    )
    return copy.copy_(view)


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
            argument.static.copy_(old)
