"""Live compiled graphs, and whose calls they served; nothing here keeps them alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import FunctionType, MethodType
from typing import Any

import torch

from .counters import Counters
from .stats import Stats, expect_increase
from .torch_compat.dynamo_wrappers import calling_wrapper, wrapper_of

__all__ = [
    "RUNNING_CALL",
    "RunningCall",
    "add_runtime",
    "expect",
    "find_owners",
    "forget",
    "graphs_of",
    "graphs_of_caller",
    "is_compiled",
    "present_caller",
    "reset",
    "reset_backend",
    "runtimes",
    "runtimes_of_caller",
    "stats",
]


class _Entry:
    """One graph: its figures, and the runtime that Dynamo's cache holds (None for a graph left to Inductor)."""

    def __init__(self, backend: object, counters: Counters, runtime: Any) -> None:
        self.backend = weakref.ref(backend)
        self.counters = counters
        self.runtime: Callable[[], Any] = weakref.ref(runtime) if runtime is not None else lambda: None
        self.captures = runtime is not None

    def alive(self) -> bool:
        """Whether anyone can still call the graph or ask for its figures."""
        return self.backend() is not None or self.runtime() is not None or self.counters.called_by_living()


@dataclass(frozen=True)
class Owner:
    """Whose figures are meant: what was called, and for a decorated function the backend that is its own.

    Attributes:
        caller: what ``torch.compile`` made of the backend for one compiled model; or the module whose decorated
            method was called; None: whatever called.
        backend: of a decorated function; None: any.
    """

    caller: object | None
    backend: object | None = None

    def owns(self, entry: _Entry) -> bool:
        """Whether it has used a graph."""
        if self.backend is not None and entry.backend() is not self.backend:
            return False
        return self.caller is None or entry.counters.served(self.caller)


#: Registry of graphs; it keeps their figures, not the graphs. Replaced as a whole, under the lock.
_GRAPHS: list[_Entry] = []
_LOCK = threading.Lock()


class RunningCall:
    """A running call of a compiled function.

    Attributes:
        owner: whose graphs it uses: a decorated function's backend, or what torch.compile made of one.
        caller: whom its figures belong to: the module that a decorated method was called on, else the owner.
        module: the module that a function is called on; None for others.
        fast: whether nobody has evaluated Dynamo's guards.
    """

    __slots__ = ("caller", "fast", "module", "owner")

    def __init__(
        self, owner: object, caller: object, module: torch.nn.Module | None = None, fast: bool = False
    ) -> None:
        self.owner, self.caller, self.module, self.fast = owner, caller, module, fast


#: The innermost running call of this thread or task.
RUNNING_CALL: ContextVar[RunningCall | None] = ContextVar("pcg_running_call", default=None)


def present_caller(backend: object | None) -> object | None:
    """Whose call of a graph, that ``backend`` had compiled, is running: figures are booked on it.

    Frames are searched only where a compiled model runs graphs that an equal one has compiled, and was never traced.
    """
    running = RUNNING_CALL.get()
    if running is not None and running.owner is backend:
        return running.caller
    return calling_wrapper() or backend


def add_runtime(backend: object, counters: Counters, runtime: Any) -> None:
    """Enters one graph, for whoever had it compiled.

    Args:
        runtime: None for a graph without captures, and for calls without a graph.
    """
    compiled_by = weakref.ref(backend)
    caller = present_caller(backend)
    logged = next((e.counters.logged for e in list(_GRAPHS) if e.counters.served(caller)), set())
    counters.enter(lambda: present_caller(compiled_by()), logged)
    with _LOCK:
        _GRAPHS.append(_Entry(backend, counters, runtime))


def forget(backend: object) -> None:
    """Drops the graphs of a backend, figures included."""
    with _LOCK:
        _GRAPHS[:] = [entry for entry in _GRAPHS if entry.backend() is not backend]


def graphs_of_caller(backend: object) -> int:
    """How many graphs the present caller has used so far."""
    caller = present_caller(backend)
    return sum(entry.counters.served(caller) for entry in list(_GRAPHS))


def runtimes_of_caller(caller: object) -> list[Any]:
    """The live runtimes that a caller has used."""
    return _runtimes([entry for entry in list(_GRAPHS) if entry.counters.served(caller)])


def find_owners(compiled: Any) -> list[Owner]:
    """Whose figures belong to an object: what a decorator or torch.compile returned, or a module with such parts."""
    backend = getattr(compiled, "__pcg_owner__", None)
    if backend is not None:
        on = getattr(compiled, "__self__", None)
        return [Owner(on if isinstance(on, torch.nn.Module) else None, backend)]
    wrapper = wrapper_of(compiled)
    if wrapper is not None:
        return [Owner(wrapper)]
    if not isinstance(compiled, torch.nn.Module):
        return []
    owners: dict[tuple[int, int], Owner] = {}
    for module in compiled.modules():
        for owner in _owners_at(module):
            owners[id(owner.caller), id(owner.backend)] = owner
    return list(owners.values())


def is_compiled(model: Any) -> bool:
    """Whether a model, or a part of it, was compiled by pcg."""
    owners = find_owners(model)
    return any(owner.backend is not None or _is_ours(owner.caller) for owner in owners)


def _is_ours(wrapper: Any) -> bool:
    ours = getattr(getattr(wrapper, "compiler_fn", None), "__pcg_backend__", False)
    return ours or any(entry.counters.served(wrapper) for entry in list(_GRAPHS))


def _owners_at(module: torch.nn.Module) -> Iterator[Owner]:
    """Of one module: itself compiled, its decorated methods, and functions that decorating one of its methods gave."""
    wrapper = wrapper_of(module)
    if wrapper is not None and _is_ours(wrapper):
        yield Owner(wrapper)
    own = [value for value in vars(module).values() if isinstance(value, (FunctionType, MethodType))]
    for value in own:
        if getattr(value, "__pcg_owner__", None) is not None:
            yield Owner(None, value.__pcg_owner__)  # type: ignore[union-attr]
    for cls in type(module).__mro__:
        for value in vars(cls).values():
            if isinstance(value, FunctionType) and getattr(value, "__pcg_owner__", None) is not None:
                yield Owner(module, value.__pcg_owner__)  # type: ignore[attr-defined]
    for entry in list(_GRAPHS):
        backend = entry.backend()
        if getattr(backend, "module", lambda: None)() is module:
            yield Owner(None, backend)


def _entries(compiled: Any) -> list[tuple[_Entry, list[object] | None]]:
    """Graphs, and the callers of each that are meant; None: all of them."""
    graphs = list(_GRAPHS)
    if compiled is None:
        return [(entry, None) for entry in graphs]
    owners = find_owners(compiled)
    if not owners:
        raise TypeError(
            f"{_short(compiled)} was not compiled by pcg, nor is any part of it: pass what torch.compile(..., "
            'backend="pcg") or @pcg.piecewise gave, or a module that has it as its forward or among its children'
        )
    found: list[tuple[_Entry, list[object] | None]] = []
    for entry in graphs:
        callers = [owner.caller for owner in owners if owner.owns(entry)]
        if callers:
            found.append((entry, None if None in callers else callers))
    return found


def graphs_of(compiled: Any) -> list[tuple[Counters, Any]]:
    """The graphs of one compiled model that may still be called: figures and runtime (None without captures).

    Raises:
        TypeError: see :func:`stats`.
    """
    return [(entry.counters, entry.runtime()) for entry, _ in _entries(compiled) if entry.alive()]


def _short(value: Any) -> str:
    """A model may be hundreds of lines long."""
    text = repr(value).splitlines()
    return text[0] + (" ...)" if len(text) > 1 else "")


def _runtimes(entries: list[_Entry]) -> list[Any]:
    found = [entry.runtime() for entry in entries]
    return [runtime for runtime in found if runtime is not None]


def runtimes(compiled: Any = None) -> list[Any]:
    """The live runtimes of one compiled model, or of all."""
    return _runtimes([entry for entry, _ in _entries(compiled)])


def stats(compiled: Any = None) -> Stats:
    """What one compiled model did, or all of them: a frozen snapshot. May be called from any thread.

    Args:
        compiled: what ``torch.compile(..., backend="pcg")`` or ``@pcg.piecewise`` gave; or a module that has it as its
            forward or among its children, whose figures are added up. A decorated method of a class counts for all
            instances, a bound one for its own.

    Raises:
        TypeError: ``compiled`` was not compiled by pcg, nor is any part of it.
    """
    entries = _entries(compiled)
    of_graphs = [runtime.caches(callers) for entry, callers in entries if (runtime := entry.runtime()) is not None]
    caches = {id(cache): cache for found in of_graphs for cache in found}
    total = Stats.total([entry.counters.snapshot(callers) for entry, callers in entries])
    return replace(total, workspaces=sum(cache.workspace_nbytes() for cache in caches.values()))


def expect(compiled: Any = None, /, **increase: int) -> Any:
    """``with pcg.expect(compiled, pieces=3, captured=6): ...`` checks by how much counters rise inside the block.

    Args:
        compiled: as for :func:`stats`; left out: all models.
        increase: figures of :class:`Stats`, and by how much each must rise.

    Raises:
        AssertionError: with both figures.
        TypeError: a name that is no counter.
    """
    return expect_increase(lambda: stats(compiled), **increase)


def reset(compiled: Any = None) -> None:
    """Drops captured graphs and zeroes the figures; registered ops stay. Also reached by ``torch.compiler.reset()``.

    Models that share a graph keep their own.
    """
    for entry, callers in _entries(compiled):
        _reset(entry, callers)
    with _LOCK:
        # Until here also the figures of graphs that are gone belong to the totals.
        _GRAPHS[:] = [entry for entry in _GRAPHS if entry.alive()]


def reset_backend(backend: object) -> None:
    """The same for the graphs of one backend."""
    for entry in list(_GRAPHS):
        if entry.backend() is backend:
            _reset(entry, None)


def _reset(entry: _Entry, callers: list[object] | None) -> None:
    runtime = entry.runtime()
    if runtime is not None:
        runtime.reset(callers)
    else:
        entry.counters.reset(callers)
