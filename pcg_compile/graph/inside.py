"""Pieces that compile one inside the other's wait for kernels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["one_inside_another"]

T = TypeVar("T")
#: Pieces inside each other: each is some 25 frames of Python.
_MOST_INSIDE = 8


def one_inside_another(makers: Sequence[Callable[[Callable[[], None] | None], T]]) -> list[T]:
    """Calls each maker with what it may call in a wait, once, to have the next one called there.

    All state that compiling a graph changes and puts back afterwards is so put back in order.

    Returns:
        What the makers returned, in order. An error of one is raised when those before it are done.
    """
    results: dict[int, T] = {}
    waiting = deque(enumerate(makers))

    def take(inside: int) -> None:
        at, make = waiting.popleft()
        results[at] = make((lambda: take(inside + 1) if waiting else None) if inside < _MOST_INSIDE else None)

    while waiting:
        take(1)
    return [results[at] for at in range(len(makers))]
