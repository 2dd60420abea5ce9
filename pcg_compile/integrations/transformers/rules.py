"""Reads the rules that transformers builds attention masks from.

A rule is a function of batch, head, and the positions of a query and of a key, such as ``kv <= q``. Called with
symbolic positions, it says which distances between the two are seen, and whether they must lie in one chunk. A rule
that looks at data (images whose tokens see each other, padding), or at anything else, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import BatchError, message

__all__ = ["read_rule"]

_CURE = 'Use another attn_implementation, such as "sdpa", without pcg.step().'
_FROM_DATA = message(
    "the model's attention mask depends on data",
    why="Images or blocks whose tokens see each other, padding: paged attention has causal masks, windows and chunks.",
    cure=_CURE,
)
_OWN_RULE = message(
    "the model's attention mask is neither causal nor a window",
    why="Paged attention has causal masks, windows and chunks.",
    cure=_CURE,
)


def read_rule(mask_function: Callable[..., Any]) -> tuple[int | None, int | None, int | None]:
    """The smallest and the largest distance ``q - kv`` that a rule lets a query see, and the size of a chunk.

    None for no limit. Causal: ``(0, None, None)``. A window of ``w`` tokens: ``(0, w - 1, None)``.

    Raises:
        BatchError: the rule is no such range.
    """
    try:
        rule = mask_function(0, 0, _Position(True), _Position(False))
    except (IndexError, TypeError) as error:
        # A tensor that is indexed by a position, or computed with one.
        raise BatchError(_FROM_DATA) from error
    if not isinstance(rule, _Range):
        raise BatchError(_OWN_RULE)
    return rule.nearest, rule.farthest, rule.chunk


class _Position:
    """The position of a query or a key: it can be shifted, subtracted and compared, and nothing else."""

    def __init__(self, is_query: bool, shift: int = 0) -> None:
        self.is_query, self.shift = is_query, shift

    def __add__(self, other: Any) -> Any:
        return _Position(self.is_query, self.shift + _number(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if not isinstance(other, _Position):
            return _Position(self.is_query, self.shift - _number(other))
        if self.is_query == other.is_query:
            raise BatchError(_OWN_RULE)
        return _Distance(self.is_query, self.shift - other.shift)

    def __ge__(self, other: Any) -> Any:
        if isinstance(other, _Position):
            return (self - other) >= 0
        # No position is below 0, which rules say of both to get a mask of the right shape.
        return _everything() if _number(other) <= self.shift else _refuse()

    def __le__(self, other: Any) -> Any:
        return (self - other) <= 0 if isinstance(other, _Position) else _refuse()

    def __gt__(self, other: Any) -> Any:
        return (self - other) > 0 if isinstance(other, _Position) else _refuse()

    def __lt__(self, other: Any) -> Any:
        return (self - other) < 0 if isinstance(other, _Position) else _refuse()

    def __floordiv__(self, other: Any) -> Any:
        return _Chunk(_number(other)) if self.shift == 0 else _refuse()

    def __index__(self) -> int:
        raise BatchError(_FROM_DATA)

    def new_ones(self, *args: Any, **kwargs: Any) -> Any:
        """What intersections begin with."""
        return _everything()

    def new_zeros(self, *args: Any, **kwargs: Any) -> Any:
        """What unions begin with."""
        return _Range(0, -1)


class _Chunk:
    """The chunk of ``size`` positions that a position lies in."""

    __hash__ = object.__hash__

    def __init__(self, size: int) -> None:
        self.size = size

    def __eq__(self, other: Any) -> Any:
        same = isinstance(other, _Chunk) and other.size == self.size
        return _Range(None, None, self.size) if same else _refuse()


class _Distance:
    """``q - kv + shift`` with ``of_query``, else ``kv - q + shift``."""

    def __init__(self, of_query: bool, shift: int) -> None:
        self.of_query, self.shift = of_query, shift

    def __ge__(self, other: Any) -> Any:
        bound = _number(other) - self.shift
        return _Range(bound, None) if self.of_query else _Range(None, -bound)

    def __le__(self, other: Any) -> Any:
        bound = _number(other) - self.shift
        return _Range(None, bound) if self.of_query else _Range(-bound, None)

    def __gt__(self, other: Any) -> Any:
        return self >= _number(other) + 1

    def __lt__(self, other: Any) -> Any:
        return self <= _number(other) - 1

    def __abs__(self) -> Any:
        return _Absolute(self)


class _Absolute:
    """The absolute value of a distance."""

    def __init__(self, distance: _Distance) -> None:
        self.distance = distance

    def __le__(self, other: Any) -> Any:
        return (self.distance <= other) & (self.distance >= -_number(other))

    def __lt__(self, other: Any) -> Any:
        return self <= _number(other) - 1


class _Range:
    """Distances ``q - kv`` from ``nearest`` to ``farthest``, within a chunk; None for no limit."""

    device = None

    def __init__(self, nearest: int | None, farthest: int | None, chunk: int | None = None) -> None:
        self.nearest, self.farthest, self.chunk = nearest, farthest, chunk

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself: it is on no device."""
        return self

    def __and__(self, other: Any) -> Any:
        if not isinstance(other, _Range):
            return _refuse()
        nearest, farthest, chunk = self.nearest, self.farthest, self.chunk or other.chunk
        if other.chunk is not None and other.chunk != chunk:
            return _refuse()
        if nearest is None or (other.nearest is not None and other.nearest > nearest):
            nearest = other.nearest
        if farthest is None or (other.farthest is not None and other.farthest < farthest):
            farthest = other.farthest
        return _Range(nearest, farthest, chunk)

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        if not isinstance(other, _Range):
            return _refuse()
        if self.empty or other.empty:
            return other if self.empty else self
        if self.chunk or other.chunk or not (self.reaches(other) and other.reaches(self)):
            # Two ranges with a gap between them are no range, nor is one that goes on beyond its chunk.
            return _refuse()
        nearest = None if self.nearest is None or other.nearest is None else min(self.nearest, other.nearest)
        farthest = None if self.farthest is None or other.farthest is None else max(self.farthest, other.farthest)
        return _Range(nearest, farthest)

    __ror__ = __or__

    @property
    def empty(self) -> bool:
        """Whether no distance is in it."""
        return self.nearest is not None and self.farthest is not None and self.nearest > self.farthest

    def reaches(self, other: Any) -> bool:
        """Whether it ends where ``other`` begins, or later."""
        return self.farthest is None or other.nearest is None or self.farthest + 1 >= other.nearest


def _everything() -> Any:
    return _Range(None, None)


def _number(value: Any) -> Any:
    if isinstance(value, int):
        return value
    # The left padding of a call without a mask, outside of steps.
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta and not value.any():
        return 0
    raise BatchError(_FROM_DATA)


def _refuse() -> Any:
    raise BatchError(_OWN_RULE)
