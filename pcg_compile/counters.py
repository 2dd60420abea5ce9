"""The running counters of compiled graphs, by caller; :mod:`pcg_compile.stats` has the snapshots that people see."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from .cures import cure_of
from .errors import PCGError, message
from .stats import BucketStats, Fallback, Stats, sum_of_use
from .torch_compat.profiling import in_range

__all__ = ["Counters"]

_LOG = logging.getLogger("pcg_compile")


class _Figures:
    """What one caller did with one graph."""

    def __init__(self, caller: object | None) -> None:
        self.caller: Callable[[], object | None] = weakref.ref(caller) if caller is not None else lambda: None
        self.clear()
        #: Whether what compiling the graph counted belongs to these figures; a reset forgets it.
        self.sees_compile = True

    def clear(self) -> None:
        self.steps = self.captured = self.replays = 0
        self.buckets: dict[Any, BucketStats] = {}
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self.sizes: Counter[int] = Counter()
        self.sees_compile = False
        self.called = False


class Counters:
    """The running counters of one graph, by caller.

    Compiled models of one class share Dynamo's graph, so what a call counts belongs to the model that was called, not
    to the one that was compiled first. :meth:`serve` says whose call follows; calls of one graph never overlap.
    Snapshots may be taken from any thread.

    Attributes:
        strict: every fallback is an error.
        graphs, pieces, capturable, compiled: of the graph itself, equal for all callers.
        find_caller: what tells whose call is running; None where nobody's is.
    """

    def __init__(self, strict: bool = False, graphs: int = 0) -> None:
        self.strict, self.graphs = strict, graphs
        self.pieces = self.capturable = self.compiled = 0
        self.find_caller: Callable[[], object | None] = lambda: None
        self.logged: set[tuple[str, str]] = set()
        self._entered = False
        #: Held while figures that belong together change, and while they are read.
        self._lock = threading.RLock()
        #: What compiling counted, ahead of any call; later what callers counted that are gone.
        self._nobodys = _Figures(None)
        self._now = self._nobodys
        self._callers: dict[int, _Figures] = {}
        #: Fallbacks of compiling, which every caller sees.
        self._of_compile: Counter[tuple[str, str]] = Counter()

    def serve(self) -> bool:
        """Counts what follows for the present caller, which is kept weakly; whether that is another than before."""
        caller = self.find_caller()
        if caller is None or self._now.caller() is caller:
            return False
        with self._lock:
            for key, figures in list(self._callers.items()):
                if figures.caller() is None:
                    # Totals keep what was done; the memory of each one's figures is not kept.
                    _add(self._nobodys, self._callers.pop(key))
            if not self._callers:
                # What compiling counted belongs to whoever calls.
                self._nobodys.sees_compile = False
            if id(caller) not in self._callers:
                self._callers[id(caller)] = _Figures(caller)
            self._now = self._callers[id(caller)]
        return True

    @property
    def caller(self) -> object | None:
        """Whose call is running, or was the last."""
        return self._now.caller()

    def first_call(self) -> bool:
        """Whether this is the present caller's first call, or its first after a reset; once."""
        called, self._now.called = self._now.called, True
        return not called

    def called_by_living(self) -> bool:
        """Whether one of the callers is still there."""
        with self._lock:
            return any(figures.caller() is not None for figures in self._callers.values())

    def served(self, caller: object) -> bool:
        """Whether a caller has used the graph."""
        figures = self._callers.get(id(caller))
        return figures is not None and figures.caller() is caller

    @property
    def steps(self) -> int:
        """Steps of the present caller; so are the figures below."""
        return self._now.steps

    @property
    def captured(self) -> int:
        return self._now.captured

    @property
    def replays(self) -> int:
        return self._now.replays

    @replays.setter
    def replays(self, count: int) -> None:
        self._now.replays = count

    @property
    def all_steps(self) -> int:
        """Steps of all callers."""
        with self._lock:
            return sum(figures.steps for figures in self._everyones())

    def hits(self, size: Any) -> int:
        """Steps that a bucket has served."""
        use = self._now.buckets.get(size)
        return use.hits if use is not None else 0

    def bucket(self, size: Any) -> BucketStats:
        """The use of one bucket, to be added to."""
        with self._lock:
            return self._now.buckets.setdefault(size, BucketStats())

    def count_capture(self, size: Any, seconds: float, nbytes: int) -> None:
        """Counts one captured graph of a bucket."""
        self._now.captured += 1
        use = self.bucket(size)
        use.seconds += seconds
        use.bytes += nbytes

    def count_step(self, ends_step: bool, size: int | None, bucket: Any, tokens: int, padded_tokens: int) -> None:
        """Counts one call of the graph, at once for whoever takes a snapshot meanwhile.

        Args:
            ends_step: whether it ends a step of the model.
            size: its dynamic size, where there is one alone.
            bucket: the bucket's name; None where the call ran at its exact size. tokens, padded_tokens: its use.
        """
        now = self._now
        with self._lock:
            now.steps += ends_step
            if size is not None:
                now.sizes[size] += 1
            if bucket is not None:
                use = self.bucket(bucket)
                use.hits += 1
                use.tokens += tokens
                use.padded_tokens += padded_tokens

    def fall_back(self, reason: str, where: str = "", error: type[PCGError] = PCGError) -> None:
        """Counts a fallback and logs it the first time.

        Raises:
            PCGError: under ``strict``, as ``error``.
        """
        key = (reason, where)
        with self._lock:
            into = self._of_compile if self._now is self._nobodys else self._now.fallbacks
            into[key] += 1
        with in_range(f"pcg fallback: {_shown(key)}"):
            pass  # an empty range, which pcg-compile explain-trace counts
        if self.strict:
            why = "strict=True turns every fallback into an error."
            cure = 'Remove "strict" from the options to run it all the same, and see pcg.explain().'
            raise error(message(reason, where or None, why, cure))
        if self._entered:
            self._log(key)

    def enter(self, find_caller: Callable[[], object | None], logged: set[tuple[str, str]]) -> None:
        """Begins to count for callers; logs what compiling has counted.

        Args:
            logged: what was logged of other graphs of the same model: each fallback of a model is logged once.
        """
        self.find_caller, self.logged, self._entered = find_caller, logged, True
        self.serve()
        for key in list(self._of_compile):
            self._log(key)

    def _log(self, key: tuple[str, str]) -> None:
        if key not in self.logged:
            self.logged.add(key)
            cure = cure_of(_shown(key))
            _LOG.warning("%s%s", _shown(key), f"; to do: {cure}" if cure else "")

    def reset(self, callers: Sequence[object] | None = None) -> None:
        """Zeroes what happened, of some callers or all; the graph itself (graphs, pieces, ...) stays."""
        with self._lock:
            if callers is None:
                self._of_compile.clear()
            self.logged.clear()
            for figures in self._of(callers):
                figures.clear()

    def snapshot(self, callers: Sequence[object] | None = None) -> Stats:
        """The figures as they stand, of some callers or all."""
        with self._lock:
            total = _Figures(None)
            total.clear()
            for figures in self._of(callers):
                _add(total, figures)
            fallbacks = Counter(self._of_compile if total.sees_compile else {})
            fallbacks.update(total.fallbacks)
            return Stats(
                total.steps,
                self.graphs,
                self.pieces,
                self.capturable,
                self.compiled,
                total.captured,
                total.replays,
                MappingProxyType({size: replace(use) for size, use in total.buckets.items()}),
                tuple(Fallback(reason, where, count) for (reason, where), count in fallbacks.items()),
                MappingProxyType(dict(total.sizes)),
            )

    def _everyones(self) -> list[_Figures]:
        return [self._nobodys, *self._callers.values()]

    def _of(self, callers: Sequence[object] | None) -> list[_Figures]:
        if callers is None:
            return self._everyones()
        return [figures for figures in self._callers.values() if any(figures.caller() is one for one in callers)]


def _shown(fallback: tuple[str, str]) -> str:
    reason, where = fallback
    return f"{reason} (at {where})" if where else reason


def _add(total: _Figures, part: _Figures) -> None:
    total.steps += part.steps
    total.captured += part.captured
    total.replays += part.replays
    total.sees_compile |= part.sees_compile
    total.fallbacks.update(part.fallbacks)
    total.sizes.update(part.sizes)
    for size, use in part.buckets.items():
        total.buckets[size] = sum_of_use(total.buckets.get(size, BucketStats()), use)
