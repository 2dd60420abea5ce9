"""What Inductor does with the time in which it waits for kernels: it compiles the next piece.

Inductor writes a module for a graph, which hands kernels to other processes, or to other threads that run a compiler,
and then waits for them. Pieces are compiled one inside the other's wait: all state that compiling a graph changes and
puts back afterwards is put back in order, and the kernels of all pieces compile beside each other and beside the next
piece's Python.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["one_inside_another", "while_kernels_compile"]

T = TypeVar("T")
#: Pieces inside each other: each is some 25 frames of Python.
_MOST_INSIDE = 8
#: What to do in the next wait of this thread, once.
_WORK: ContextVar[Callable[[], None] | None] = ContextVar("pcg_work_in_waits", default=None)
#: What is one for the process, and belongs to the graph that is compiled.
_OF_A_GRAPH = ("_entries", "_static_autotuners", "_winners")


def one_inside_another(makers: Sequence[Callable[[Callable[[], None] | None], T]]) -> list[T]:
    """Calls each maker with what it may call in a wait, once, to have the next one called there.

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


@contextmanager
def while_kernels_compile(work: Callable[[], None] | None) -> Iterator[None]:
    """Has ``work`` done, once, where this thread would wait for kernels of Inductor (2.11 to 2.13)."""
    if work is None or not _watch_waits():
        yield
        return
    counted: Counter[str] = Counter()
    token = _WORK.set(_apart(work, counted))
    try:
        yield
    finally:
        _WORK.reset(token)
        counters["inductor"].update(counted)


def _watch_waits() -> bool:
    """Has Inductor's waits look for work; whether they do."""
    try:
        from torch._inductor.async_compile import AsyncCompile, get_compile_threads
        from torch._inductor.codecache import CodeCacheFuture

        waits: dict[str, Callable[..., Any]] = {"wait": AsyncCompile.wait, "triton": AsyncCompile.triton}
        ready = AsyncCompile.use_process_pool
    except (ImportError, AttributeError):
        return False
    if hasattr(waits["wait"], "pcg_looks_for_work"):
        return True

    def in_flight(self: Any, scope: dict[str, Any], *args: Any, **kwargs: Any) -> bool:
        return any(isinstance(value, (Future, CodeCacheFuture)) for value in scope.values())

    def alone(self: Any, *args: Any, **kwargs: Any) -> bool:
        # Its processes are not up yet: it would compile the kernel itself, and nothing beside it.
        return bool(get_compile_threads() > 1 and not ready())

    for (name, wait), when in zip(waits.items(), (in_flight, alone), strict=True):
        setattr(AsyncCompile, name, _looking_for_work(wait, when))
    return True


def _looking_for_work(wait: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    @wraps(wait)
    def looks_for_work(*args: Any, **kwargs: Any) -> Any:
        work = _WORK.get()
        if work is not None and when(*args, **kwargs):
            _WORK.set(None)
            work()
        return wait(*args, **kwargs)

    looks_for_work.pcg_looks_for_work = True  # type: ignore[attr-defined]
    return looks_for_work


def _apart(work: Callable[[], None], counted: Counter[str]) -> Callable[[], None]:
    """The same, under the settings of now, and apart from the graph that is compiled when it is called.

    What is counted of it goes to ``counted``: a graph's own counts are kept in Inductor's cache, and counted again
    whenever it comes from there.
    """
    from torch._inductor.async_compile import CompiledTritonKernels
    from torch._inductor.triton_bundler import TritonBundler
    from torch._inductor.virtualized import threadlocal

    configs = [torch._inductor.config, torch._functorch.config]
    settings = [dict(config.get_config_copy()) for config in configs]
    handlers = dict(vars(threadlocal))

    def run() -> None:
        kernels, CompiledTritonKernels._cache = CompiledTritonKernels._cache, {}
        bundle = {name: getattr(TritonBundler, name) for name in _OF_A_GRAPH if hasattr(TritonBundler, name)}
        for name in bundle:
            setattr(TritonBundler, name, None)
        inner, before = dict(vars(threadlocal)), Counter(counters["inductor"])
        _replace(vars(threadlocal), handlers)
        try:
            with ExitStack() as stack:
                for config, then in zip(configs, settings, strict=True):
                    now = config.get_config_copy()
                    changed = {name: value for name, value in then.items() if now.get(name) is not value}
                    if changed:
                        stack.enter_context(config.patch(changed))
                stack.enter_context(_disable_current_modes())
                stack.enter_context(torch._C._DisablePythonDispatcher())
                work()
        finally:
            counted.update(counters["inductor"])
            counted.subtract(before)
            counters["inductor"].subtract(counted)
            _replace(vars(threadlocal), inner)
            CompiledTritonKernels._cache = kernels
            for name, value in bundle.items():
                setattr(TritonBundler, name, value)

    return run


def _replace(table: dict[str, Any], by: dict[str, Any]) -> None:
    table.clear()
    table.update(by)
