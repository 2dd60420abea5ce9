"""Buckets that fit the sizes that were seen."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["fit_buckets"]


def fit_buckets(sizes: Mapping[int, int], k: int) -> tuple[int, ...]:
    """The ``k`` buckets (or fewer) that minimize padded tokens over ``sizes`` (size -> steps), exactly.

    A best bucket is one of the sizes seen, the largest among them; dynamic programming over the sorted sizes.

    Raises:
        ValueError: ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"suggest_buckets({k}): it is at least 1")
    seen = sorted(size for size, steps in sizes.items() if steps > 0)
    if not seen:
        return ()
    steps = [0]
    for size in seen:
        steps.append(steps[-1] + sizes[size])
    # best[j]: least padded tokens for the j smallest sizes, and the buckets that give it.
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())] + [
        (seen[j] * steps[j + 1], (seen[j],)) for j in range(len(seen))
    ]
    for _ in range(min(k, len(seen)) - 1):
        best = [best[0]] + [
            min((best[i][0] + seen[j] * (steps[j + 1] - steps[i]), (*best[i][1], seen[j])) for i in range(j + 1))
            for j in range(len(seen))
        ]
    return best[-1][1]
