"""What a compiled graph did: counters while it runs, and a frozen snapshot for people."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from ..errors import PCGError, message
from .suggest import fit_buckets

__all__ = ["BucketStats", "Counters", "Fallback", "Stats"]

_LOG = logging.getLogger("pcg_compile")


@dataclass(frozen=True)
class Fallback:
    """Something that ran otherwise than recorded: why, where in the user's code, and how many times."""

    reason: str
    where: str
    count: int


@dataclass(frozen=True)
class BucketStats:
    """Use of one bucket: steps, real and padding tokens, seconds and bytes that recording it took.

    Bytes are what the device's reserved memory grew by. Buckets share memory, so that one which is recorded behind a
    larger one often adds none; the sum is what all of them hold.
    """

    hits: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0
    bytes: int = 0
    #: Under cudagraph_mode="auto", what warm-up chose for the bucket and both times; else "".
    attention: str = ""

    @property
    def mean_padding(self) -> float | None:
        """Padding tokens over real ones, of all steps; None before the first."""
        return self.padded_tokens / self.tokens - 1 if self.tokens else None


@dataclass(frozen=True)
class Stats:
    """A snapshot.

    Attributes:
        steps: calls of the compiled forward.
        graphs: graphs that Dynamo handed over.
        pieces: runs between split ops, the split ops not counted.
        capturable: pieces that may be recorded.
        compiled: distinct pieces, whatever the compiler.
        captured: recordings made, one a piece and bucket.
        replays: replays of recordings.
        buckets: by size, or by the tuple of sizes where a graph has several.
        fallbacks: everything that ran otherwise than recorded.
    """

    steps: int = 0
    graphs: int = 0
    pieces: int = 0
    capturable: int = 0
    compiled: int = 0
    captured: int = 0
    replays: int = 0
    buckets: Mapping[Any, BucketStats] = field(default_factory=lambda: MappingProxyType({}))
    fallbacks: tuple[Fallback, ...] = ()
    #: Steps by their real size, of graphs with one dynamic size.
    sizes: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))

    def suggest_buckets(self, k: int) -> tuple[int, ...]:
        """The ``k`` buckets (or fewer) that would have padded the steps seen so far the least; () before any step.

        Raises:
            ValueError: ``k`` is below 1.
        """
        return fit_buckets(self.sizes, k)

    @staticmethod
    def total(parts: list[Stats]) -> Stats:
        """The sum of several snapshots."""
        counts = {
            f.name: sum(getattr(part, f.name) for part in parts)
            for f in fields(Stats)
            if f.name not in ("buckets", "fallbacks", "sizes")
        }
        buckets: dict[Any, BucketStats] = {}
        fallbacks: dict[tuple[str, str], int] = {}
        sizes: dict[int, int] = {}
        for part in parts:
            for size, steps in part.sizes.items():
                sizes[size] = sizes.get(size, 0) + steps
            for size, use in part.buckets.items():
                have = buckets.get(size, BucketStats())
                buckets[size] = BucketStats(
                    have.hits + use.hits,
                    have.tokens + use.tokens,
                    have.padded_tokens + use.padded_tokens,
                    have.seconds + use.seconds,
                    have.bytes + use.bytes,
                    have.attention or use.attention,
                )
            for fallback in part.fallbacks:
                key = (fallback.reason, fallback.where)
                fallbacks[key] = fallbacks.get(key, 0) + fallback.count
        return Stats(
            **counts,
            buckets=MappingProxyType(dict(sorted(buckets.items(), key=lambda item: _order(item[0])))),
            fallbacks=tuple(Fallback(reason, where, count) for (reason, where), count in fallbacks.items()),
            sizes=MappingProxyType(sizes),
        )


def _order(size: Any) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,)


@dataclass
class _Use:
    hits: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0
    bytes: int = 0
    attention: str = ""


@dataclass
class Counters:
    """The running counters of one graph."""

    strict: bool = False
    steps: int = 0
    graphs: int = 0
    pieces: int = 0
    capturable: int = 0
    compiled: int = 0
    captured: int = 0
    replays: int = 0
    buckets: dict[Any, _Use] = field(default_factory=dict)
    fallbacks: dict[tuple[str, str], int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)

    def bucket(self, size: Any) -> _Use:
        """The use of one bucket, to be added to."""
        return self.buckets.setdefault(size, _Use())

    def fall_back(self, reason: str, where: str = "", error: type[PCGError] = PCGError) -> None:
        """Counts a fallback and logs it the first time.

        Raises:
            PCGError: under ``strict``, as ``error``.
        """
        key = (reason, where)
        first = key not in self.fallbacks
        self.fallbacks[key] = self.fallbacks.get(key, 0) + 1
        if self.strict:
            why = "strict=True turns every fallback into an error."
            cure = 'Remove "strict" from the options to run it all the same, and see pcg.explain().'
            raise error(message(reason, where or None, why, cure))
        if first:
            _LOG.warning("%s%s", reason, f" (at {where})" if where else "")

    def reset(self) -> None:
        """Zeroes what happened; the graph itself (graphs, pieces, capturable, compiled) stays."""
        self.steps = self.captured = self.replays = 0
        self.buckets.clear()
        self.fallbacks.clear()
        self.sizes.clear()

    def snapshot(self) -> Stats:
        """The figures as they stand."""
        return Stats(
            self.steps,
            self.graphs,
            self.pieces,
            self.capturable,
            self.compiled,
            self.captured,
            self.replays,
            MappingProxyType(
                {
                    size: BucketStats(*(getattr(use, f.name) for f in fields(BucketStats)))
                    for size, use in self.buckets.items()
                }
            ),
            tuple(Fallback(reason, where, count) for (reason, where), count in self.fallbacks.items()),
            MappingProxyType(dict(self.sizes)),
        )


@contextmanager
def expect_increase(read: Any, **wanted: int) -> Any:
    """Checks that counters rise by exactly ``wanted`` inside the block; ``read()`` gives a :class:`Stats`.

    Raises:
        AssertionError: with both figures.
        TypeError: a name that is no counter.
    """
    names = {f.name for f in fields(Stats)} - {"buckets", "fallbacks", "sizes"}
    unknown = wanted.keys() - names
    if unknown:
        raise TypeError(f"expect() counts {', '.join(sorted(names))}; not {', '.join(sorted(unknown))}")
    before = read()
    yield
    after = read()
    wrong = [
        f"{name}: expected +{want}, counted +{getattr(after, name) - getattr(before, name)}"
        for name, want in wanted.items()
        if getattr(after, name) - getattr(before, name) != want
    ]
    if wrong:
        raise AssertionError("; ".join(wrong))
