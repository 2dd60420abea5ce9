"""Live compiled graphs, found by what compiled them; nothing here keeps them alive."""

from __future__ import annotations

import weakref
from typing import Any

from .report.stats import Counters, Stats, expect_increase
from .torch_internals import wrapper_of

__all__ = [
    "add_runtime",
    "expect",
    "owners_graphs",
    "owners_runtimes",
    "release_collectives",
    "reset",
    "reset_owner",
    "runtimes",
    "stats",
]


class _Entry:
    """One graph: its figures, and the runtime that Dynamo's cache holds (None for a graph left to Inductor)."""

    def __init__(self, owner: object, counters: Counters, runtime: Any) -> None:
        self.owner = weakref.ref(owner)
        self.counters = counters
        self.runtime: weakref.ref[Any] = weakref.ref(runtime if runtime is not None else owner)
        self.records = runtime is not None

    def alive(self) -> bool:
        """Whether anyone can still call the graph or ask for its figures."""
        return self.owner() is not None or self.runtime() is not None


#: Registry of graphs; it keeps their figures, not the graphs.
_GRAPHS: list[_Entry] = []


def add_runtime(owner: object, counters: Counters, runtime: Any) -> None:
    """Enters one graph under its owner."""
    _GRAPHS.append(_Entry(owner, counters, runtime))


def _of(owner: object) -> list[_Entry]:
    # By identity: torch's own wrappers are equal where their backend and options are.
    return [entry for entry in list(_GRAPHS) if entry.owner() is owner]


def owners_runtimes(owner: weakref.ref[Any]) -> list[Any]:
    """The live runtimes of an owner."""
    alive = owner()
    found = [entry.runtime() for entry in _of(alive) if entry.records] if alive is not None else []
    return [runtime for runtime in found if runtime is not None]


def owners_graphs(owner: object) -> int:
    """How many graphs an owner has so far."""
    return len(_of(owner))


def _entries(compiled: Any) -> list[_Entry]:
    if compiled is None:
        return list(_GRAPHS)
    owner = getattr(compiled, "__pcg_owner__", None) or wrapper_of(compiled)
    if owner is None:
        raise TypeError(
            f'{compiled!r} was not compiled by pcg: pass what torch.compile(..., backend="pcg") or @pcg.piecewise gave'
        )
    return _of(owner)


def runtimes(compiled: Any = None) -> list[Any]:
    """The live runtimes of one compiled model, or of all."""
    found = [entry.runtime() for entry in _entries(compiled) if entry.records]
    return [runtime for runtime in found if runtime is not None]


def stats(compiled: Any = None) -> Stats:
    """What one compiled model did, or all of them: a frozen snapshot.

    Raises:
        TypeError: ``compiled`` was not compiled by pcg.
    """
    return Stats.total([entry.counters.snapshot() for entry in _entries(compiled)])


def expect(compiled: Any = None, **increase: int) -> Any:
    """``with pcg.expect(pieces=3, captured=6): ...`` checks by how much counters rise inside the block.

    Raises:
        AssertionError: with both figures.
        TypeError: a name that is no counter.
    """
    return expect_increase(lambda: stats(compiled), **increase)


def reset(compiled: Any = None) -> None:
    """Drops recordings and zeroes the figures; registered ops stay. Also reached by ``torch._dynamo.reset()``."""
    _reset(_entries(compiled))
    # Until here also the figures of graphs that are gone belong to the totals.
    _GRAPHS[:] = [entry for entry in _GRAPHS if entry.alive()]


def release_collectives() -> None:
    """Drops the recordings that may hold collectives; figures stay, and a later step records again."""
    for runtime in runtimes():
        if runtime.shared.agreement is not None:
            runtime.release()


def reset_owner(owner: object) -> None:
    """The same for the graphs of one owner."""
    _reset(_of(owner))


def _reset(entries: list[_Entry]) -> None:
    for entry in entries:
        runtime = entry.runtime() if entry.records else None
        if runtime is not None:
            runtime.reset()
        else:
            entry.counters.reset()
