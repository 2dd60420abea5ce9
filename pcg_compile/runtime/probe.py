"""The probe for pieces that analysis cannot see through: do their real rows change with the padding, or with the size?

Note [what a probe can see]. A piece runs at its bucket with other padding each time, at the real size, and at a size
far below the bucket. Real rows must be the same bit for bit whatever the padding holds, and at other sizes equal up to
the rounding of the coarsest dtype, since a kernel chosen for another number of rows may round otherwise. Results that
are all zero, or empty, show nothing, nor do integers that are alike in all rows, nor a run that raises: then there is
no verdict, and the piece runs at its exact size until there is one. Each bucket is probed by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from ..fx.sizes import shape_at, strides_at, symbols_of
from ..memory.views import assign, looks_like, real_rows, tails

__all__ = ["Argument", "NoVerdict", "few_rows", "probe"]

Sizes = Mapping[sympy.Symbol, int]
Run = Callable[[Sequence[Any], Sizes], Sequence[torch.Tensor]]

#: Roundings (``eps``) that kernels for other sizes may differ by, of the largest value in a row and in a column.
_FINE_ROUNDINGS = 64
#: The same of types whose steps are larger than this: their sums are kept in a finer one.
_ROUNDINGS, _COARSE = 4, 1e-4
_INF, _NAN = float("inf"), float("nan")
#: Rows that all real ones are made like, one after the other.
_PICKS = (0, -1)
#: Sizes far below the bucket's that a piece is run at.
_MOST_SIZES = 4
#: What floating padding is filled with, run by run; None: copies of real rows, which nothing can refuse. 2 stands for a
#: value near the largest of the type. NaN alone would not do: no comparison with it is true.
_PADDING = (None, (_NAN, _INF, -_INF, 2.0, -2.0, 0.0, 1.0), (2.0, -2.0, 1.0), (0.0,))


class NoVerdict(Exception):
    """The probe could not decide, with the reason."""


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
    #: The size that its values lie below, as row indices do: they must at every size that the piece runs at.
    below: sympy.Symbol | None = None


def few_rows(
    arguments: Sequence[Argument],
    results: Sequence[torch.Tensor],
    sizes: Sizes,
    bucket: Sizes,
    symbols: Sequence[sympy.Symbol],
    allowed: Callable[[Sizes], bool],
) -> list[Sizes]:
    """Sizes of at most half the bucket's that the graph allows and where nothing is empty; the smallest ones first."""
    tensors = [*(a.fake for a in arguments), *results]
    found: list[Sizes] = []
    # Row indices that are all 0 would make all rows alike.
    for count in range(2 if any(a.below is not None for a in arguments) else 1, 1 + max(sizes[s] for s in symbols)):
        few = {s: min(count, n) if s in symbols else n for s, n in sizes.items()}
        if any(2 * few[s] > bucket[s] for s in symbols) or len(found) == _MOST_SIZES:
            break
        if allowed(few) and not any(0 in shape_at(t, few) and 0 not in shape_at(t, sizes) for t in tensors):
            found.append(few)
    return found


def probe(
    run: Run,
    arguments: Sequence[Argument],
    results: Sequence[torch.Tensor],
    sizes: Sizes,
    bucket: Sizes,
    few: Sequence[Sizes],
) -> str | None:
    """Runs a piece at the bucket with different padding, and at several exact sizes.

    Args:
        run: calls the piece with tensors and the sizes to tell it. arguments: its static inputs, real rows filled in.
        results: fake values of its results. sizes: the real sizes, below the bucket's. bucket: the bucket's sizes.
        few: sizes far below the bucket's, at most the real ones, from :func:`few_rows`.

    Returns:
        None where the real rows of all results, and of all that the piece writes, depend on neither; else what differs.
        The arguments are left as they were.

    Raises:
        NoVerdict: nothing could be seen.
    """
    with torch.inference_mode(False), torch.no_grad(), _restored(arguments):
        for argument in arguments:
            if argument.below is not None:
                argument.static.remainder_(min(at[argument.below] for at in few))
        return _Probe(run, arguments, results, sizes, bucket, few).verdict()


@dataclass(frozen=True)
class _Probe:
    run: Run
    arguments: Sequence[Argument]
    results: Sequence[torch.Tensor]
    sizes: Sizes
    bucket: Sizes
    few: Sequence[Sizes]
    #: What runs raised with values or sizes that no step gives them, which says nothing of their rows.
    raised: list[str] = field(default_factory=list)

    def verdict(self) -> str | None:
        if any(_alike(argument, self.sizes) for argument in self.arguments):
            # Padding takes its integers from the real rows: nobody knows which others are valid.
            raise NoVerdict("all rows of an integer input are alike")
        first: list[torch.Tensor] | None = None
        compared = 0
        for seed, values in enumerate(_PADDING):
            self._pad(values, seed)
            try:
                made = self._at_bucket()
            except Exception as error:
                # The op is anyone's, and may raise anything: with copies of real rows that is no verdict.
                if values is None:
                    raise NoVerdict(f"it raises {type(error).__name__} at the bucket's size") from error
                self.raised.append(type(error).__name__)
                continue
            if first is None:
                first = made
                continue
            compared += 1
            for i, (one, other) in enumerate(zip(first, made, strict=True)):
                if not torch.equal(_comparable(one), _comparable(other)):
                    return f"result {i} changes with the padding"
        if first is None or not compared:
            raise NoVerdict(f"it raises whatever its padding holds ({', '.join(self.raised)})")
        floats = [r for r, f in zip(first, self.results, strict=False) if r.is_floating_point() and symbols_of(f)]
        if not all(result.any() for result in floats):
            raise NoVerdict("its rows are all zero")
        if (which := self._changes_with_size(first)) is not None:
            return which
        leveled = [(a, a.static.clone()) for a in self.arguments if not a.fixed and symbols_of(a.fake)]
        for pick in _PICKS:
            # Many rows alike: what counts rows of a kind up to a limit that follows from the size is full then; and
            # the padding's integers, which are some real row's, are no longer among the real ones: a maximum, a set.
            for argument, old in leveled:
                assign(argument.static, old)
                _level(argument, self.sizes, pick)
            try:
                made = self._at_bucket()
            except Exception as error:  # as above
                raise NoVerdict(f"it raises {type(error).__name__} with rows that are alike") from error
            if (which := self._changes_with_size(made)) is not None:
                return which
        return None

    def _changes_with_size(self, padded: Sequence[torch.Tensor]) -> str | None:
        fakes = [*self.results, *(a.fake for a in self.arguments if a.written)]
        coarsest = _coarsest([*padded, *(a.static for a in self.arguments)])
        scratch = [0] * len(self.results) + [a.scratch for a in self.arguments if a.written]
        seen = 0
        for at in (self.sizes, *self.few):
            try:
                exact = self._exact(at)
            except Exception as error:  # as above
                if at is self.sizes:
                    raise NoVerdict(f"it raises {type(error).__name__} at its exact size") from error
                self.raised.append(type(error).__name__)
                continue
            seen += 1
            for i, (one, other, fake, front) in enumerate(zip(padded, exact, fakes, scratch, strict=True)):
                if front and at is not self.sizes:
                    continue  # a cache: fewer rows write fewer slots of it
                # Where padding writes is at the front of what comes from the step, which has no dynamic size.
                cut = one if front or at is self.sizes else real_rows(one, fake, at)
                if cut.shape != other.shape or not _close(cut, other, coarsest):
                    return f"result {i} changes with the size that the piece is run at"
        if seen == 1:
            raise NoVerdict(f"it raises at all sizes that are far from the bucket's ({', '.join(self.raised)})")
        return None

    def _at_bucket(self) -> list[torch.Tensor]:
        """The real rows of what a run at the bucket gives and writes."""
        written = [a for a in self.arguments if a.written]
        before = [a.static.clone() for a in written]
        try:
            outputs = self.run([a.static for a in self.arguments], self.bucket)
            made = [real_rows(r, f, self.sizes).clone() for r, f in zip(outputs, self.results, strict=True)]
            return made + [_behind(real_rows(a.static, a.fake, self.sizes), a.scratch).clone() for a in written]
        finally:
            for argument, old in zip(written, before, strict=True):
                assign(argument.static, old)

    def _exact(self, at: Sizes) -> list[torch.Tensor]:
        inputs = [_exact(a, at) for a in self.arguments]
        results = [r.clone() for r in self.run(inputs, at)]
        return results + [_behind(t, a.scratch) for t, a in zip(inputs, self.arguments, strict=True) if a.written]

    def _pad(self, values: tuple[float, ...] | None, seed: int) -> None:
        """Fills the padding: integers with rows of all inputs alike, which thus stay within what they look up."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        rows = {
            s: torch.randint(max(n, 1), (self.bucket[s],), generator=generator, device="cpu")
            for s, n in self.sizes.items()
        }
        for argument in self.arguments:
            if argument.fixed:
                continue
            floating = argument.static.is_floating_point() or argument.static.is_complex()
            if floating and values is not None:
                _litter(argument, self.sizes, values, generator)
            else:
                self._repeat_rows(argument, rows)

    def _repeat_rows(self, argument: Argument, rows: Mapping[sympy.Symbol, torch.Tensor]) -> None:
        real = shape_at(argument.fake, self.sizes)
        if 0 in real:
            return
        for dim, tail, rest in reversed(tails(argument.static, argument.fake, self.sizes)):
            symbol = min(symbols_of(argument.fake.shape[dim]), key=str)
            chosen = rows[symbol].repeat(-(-rest.shape[dim] // len(rows[symbol])))
            chosen = chosen[: tail.shape[dim]].to(rest.device) % real[dim]
            assign(tail, rest.narrow(dim, 0, real[dim]).index_select(dim, chosen))


def _behind(tensor: torch.Tensor, scratch: int) -> torch.Tensor:
    """The entries behind those that padding writes."""
    return tensor[scratch:] if scratch else tensor


def _alike(argument: Argument, sizes: Sizes) -> bool:
    """Whether an input of integers holds one row again and again."""
    if argument.fixed or argument.static.is_floating_point() or argument.static.is_complex():
        return False
    real = real_rows(argument.static, argument.fake, sizes)
    first = real
    for dim, size in enumerate(argument.fake.shape):
        if symbols_of(size) and real.numel():
            first = first.narrow(dim, 0, 1)
    return bool(symbols_of(argument.fake)) and torch.equal(first.expand_as(real), real)


def _level(argument: Argument, sizes: Sizes, pick: int) -> None:
    """Makes all real entries along a dynamic dimension like the first (0) or the last (-1)."""
    real = real_rows(argument.static, argument.fake, sizes)
    for dim, size in enumerate(argument.fake.shape):
        if symbols_of(size) and real.numel():
            assign(real, real.narrow(dim, pick % real.shape[dim], 1).clone().expand_as(real))


def _litter(argument: Argument, sizes: Sizes, values: Sequence[float], generator: torch.Generator) -> None:
    """Fills floating padding with values at random."""
    for _, tail, _ in tails(argument.static, argument.fake, sizes):
        pool = torch.tensor(values, dtype=torch.float64, device="cpu")
        # Large for the type, and finite.
        pool = torch.where(pool.abs() == 2, pool * (torch.finfo(tail.dtype).max / 8), pool)
        chosen = torch.randint(len(pool), tail.shape, generator=generator, device="cpu")
        assign(tail, pool[chosen].to(tail.dtype))


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


def _coarsest(tensors: Sequence[torch.Tensor]) -> float:
    """What kernels for other sizes may differ by, relative to the values around."""
    steps = [torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point() or t.is_complex()]
    return max((eps * (_ROUNDINGS if eps > _COARSE else _FINE_ROUNDINGS) for eps in steps), default=0.0)


def _close(one: torch.Tensor, other: torch.Tensor, coarsest: float) -> bool:
    """Whether values differ by rounding at most: relative to the largest in the same row, and in the same column."""
    if not (one.is_floating_point() or one.is_complex()) or not one.numel():
        return torch.equal(one, other)
    wide = torch.complex128 if one.is_complex() else torch.float64
    one, other = one.to(wide), other.to(wide)
    same = (one == other) | ((one != one) & (other != other))
    around = one.abs().nan_to_num(nan=0.0, posinf=0.0)
    scale = around.amax()
    if one.dim() > 1:
        scale = torch.minimum(around.amax(-1, keepdim=True), around.amax(tuple(range(one.dim() - 1)), keepdim=True))
    return bool((same | ((one - other).abs() <= coarsest * scale)).all())


@contextmanager
def _restored(arguments: Sequence[Argument]) -> Iterator[None]:
    before = [a.static.clone() for a in arguments]
    try:
        yield
    finally:
        for argument, old in zip(arguments, before, strict=True):
            assign(argument.static, old)
