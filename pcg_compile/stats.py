"""What a compiled graph did, as frozen snapshots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from io import StringIO
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from .report.suggest import fit_buckets

__all__ = ["COUNTS", "BucketStats", "Fallback", "Stats", "expect_increase", "sum_of_use"]


@dataclass(frozen=True)
class Fallback:
    """Something that ran otherwise than captured: why, where in the user's code, and how many times."""

    reason: str
    where: str
    count: int


@dataclass(frozen=True)
class BucketStats:
    """Use of one bucket: steps, real and padding tokens, seconds and bytes that capturing it took.

    Bytes are what the device's reserved memory grew by. Buckets share memory, so that one which is captured behind a
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
        capturable: pieces that may be captured.
        compiled: distinct pieces, whatever the compiler.
        captured: captured graphs made, one a piece and bucket.
        replays: replays of captured graphs.
        buckets: by size, or by the tuple of sizes where a graph has several.
        fallbacks: everything that ran otherwise than captured.
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

    def __str__(self) -> str:
        """A short table: counts, buckets, and what was not replayed."""
        out = StringIO()
        console = Console(file=out, width=120, highlight=False, markup=False, emoji=False)
        console.print(", ".join(f"{getattr(self, name)} {name}" for name in COUNTS), soft_wrap=True)
        if self.buckets:
            table = _table("bucket", "steps", "mean padding", "MiB", "seconds to capture", "attention")
            for size, use in self.buckets.items():
                padding = f"{use.mean_padding:.0%}" if use.mean_padding is not None else ""
                table.add_row(
                    str(size), str(use.hits), padding, f"{use.bytes / 2**20:.1f}", f"{use.seconds:.3f}", use.attention
                )
            console.print(table)
        if self.fallbacks:
            table = _table("times", "not replayed because", "where")
            for fallback in self.fallbacks:
                table.add_row(str(fallback.count), fallback.reason, fallback.where)
            console.print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def suggest_buckets(self, k: int) -> tuple[int, ...]:
        """The ``k`` buckets (or fewer) that would have padded the steps seen so far the least; () before any step.

        Raises:
            ValueError: ``k`` is below 1.
        """
        return fit_buckets(self.sizes, k)

    @staticmethod
    def total(parts: list[Stats]) -> Stats:
        """The sum of several snapshots."""
        counts = {name: sum(getattr(part, name) for part in parts) for name in COUNTS}
        buckets: dict[Any, BucketStats] = {}
        fallbacks: Counter[tuple[str, str]] = Counter()
        sizes: Counter[int] = Counter()
        for part in parts:
            sizes.update(part.sizes)
            for size, use in part.buckets.items():
                buckets[size] = sum_of_use(buckets.get(size, BucketStats()), use)
            for fallback in part.fallbacks:
                fallbacks[fallback.reason, fallback.where] += fallback.count
        return Stats(
            **counts,
            buckets=MappingProxyType(dict(sorted(buckets.items(), key=lambda item: _order(item[0])))),
            fallbacks=tuple(Fallback(reason, where, count) for (reason, where), count in fallbacks.items()),
            sizes=MappingProxyType(dict(sizes)),
        )


#: The figures that are numbers.
COUNTS = ("steps", "graphs", "pieces", "capturable", "compiled", "captured", "replays")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _order(size: Any) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,)


def sum_of_use(one: Any, other: Any) -> Any:
    """The sum of two dataclasses of a bucket's figures."""
    counts = {f.name: getattr(one, f.name) + getattr(other, f.name) for f in fields(one) if f.name != "attention"}
    return type(one)(**counts, attention=one.attention or other.attention)


@contextmanager
def expect_increase(read: Any, **wanted: int) -> Any:
    """Checks that counters rise by exactly ``wanted`` inside the block; ``read()`` gives a :class:`Stats`.

    Raises:
        AssertionError: with both figures.
        TypeError: a name that is no counter.
    """
    unknown = wanted.keys() - set(COUNTS)
    if unknown:
        raise TypeError(f"expect() counts {', '.join(COUNTS)}; not {', '.join(sorted(unknown))}")
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
