"""What a compiled graph did, as snapshots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from io import StringIO
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from .report.suggest import fit_buckets

__all__ = [
    "COUNTS", "BucketStats", "Fallback", "Stats", "bucket_table", "expect_increase", "percent",
    "print_table", "sum_of_use",
]  # fmt: skip


@dataclass(frozen=True)
class Fallback:
    """Something that ran otherwise than captured: why, where in the user's code, and how many times."""

    reason: str
    where: str
    count: int


@dataclass
class BucketStats:
    """Use of one bucket: steps, real and padding tokens, seconds and bytes that capturing it took.

    Bytes are what the device's reserved memory grew by. Buckets share memory, so one which is captured behind a
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
    def padding(self) -> float | None:
        """The share of the computed rows that are padding, from 0 to below 1; None before the first step."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else None


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
        workspaces: bytes that attention keeps with the model's caches for partial results and plans.
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
    workspaces: int = 0

    @property
    def padding(self) -> float | None:
        """The same share, of all buckets together."""
        used = self.buckets.values()
        return BucketStats(0, sum(u.tokens for u in used), sum(u.padded_tokens for u in used)).padding

    def __str__(self) -> str:
        """Short tables: counts, buckets, and what was not replayed."""
        parts = [print_table((*COUNTS, "padding"), [[*(str(getattr(self, n)) for n in COUNTS), percent(self.padding)]])]
        if self.buckets:
            parts.append(print_table(*bucket_table(self)))
        if self.workspaces:
            parts.append(f"attention's workspaces: {self.workspaces / 2**20:.1f} MiB")
        if self.fallbacks:
            rows = [(str(fall.count), fall.reason, fall.where) for fall in self.fallbacks]
            parts.append(print_table(("times", "not replayed because", "where"), rows))
        return "\n\n".join(parts)

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


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int = 120) -> str:
    """Text in columns, at most ``width`` characters wide: what does not fit goes on in the next line."""
    out = StringIO()
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(file=out, width=width, highlight=False, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def percent(share: float | None) -> str:
    """A share as text, "" for None."""
    return f"{share:.0%}" if share is not None else ""


def bucket_table(stats: Stats) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the table of buckets."""
    columns = ("bucket", "steps", "padding", "MiB", "seconds to capture", "chosen by warmup")
    rows = [
        (str(size) if size != () else "fixed size", str(use.hits), percent(use.padding), f"{use.bytes / 2**20:.1f}",
         f"{use.seconds:.3f}", use.attention)
        for size, use in stats.buckets.items()
    ]  # fmt: skip
    shown = len(columns) if any(row[-1] for row in rows) else len(columns) - 1
    return columns[:shown], [row[:shown] for row in rows]


def _order(size: Any) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,)


def sum_of_use(one: BucketStats, other: BucketStats) -> BucketStats:
    """The sum of a bucket's figures."""
    counts = {f.name: getattr(one, f.name) + getattr(other, f.name) for f in fields(one) if f.name != "attention"}
    return BucketStats(**counts, attention=one.attention or other.attention)


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
