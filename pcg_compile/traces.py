"""Dynamo's traces begin and end: the watch of the running call is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any

from .calls import Watch, check_shown_sizes, running_call
from .options import Options
from .torch_compat.dynamo_traces import Trace, watch_traces, with_each_call
from .torch_compat.guards import shape_guards

__all__ = ["begin_trace", "watch_all"]


def begin_trace(options_of: Callable[[Any], tuple[object, Options] | None], trace: Trace) -> None:
    """Dynamo is about to trace something: watches it if its backend is pcg's.

    Args:
        options_of: the owner and the options of a backend wrapper, None where the backend is not pcg's.

    Raises:
        OptionsError: the options are bad. PCGError: see :meth:`Watch.traced`.
    """
    call = running_call()
    if call is not None:
        call.settings_end()
    found = options_of(trace.wrapper) if trace.wrapper is not None else None
    if found is None:
        return
    owner, options = found
    if call is None or call.owner is not owner:
        if trace.at_end is None:
            return
        # The first trace of what torch.compile returned: this call has begun already.
        watch = Watch(owner, options)
        call = watch.begin()
        trace.at_end.append(partial(watch.end, call))
        with_each_call(trace.context, lambda: partial(watch.end, watch.begin()))
    call.watch.traced(call, trace)


def code_made(code: CodeType, compiled: CodeType) -> None:
    """Dynamo has made code, which has not run yet.

    Raises:
        OtherSizes: see :func:`check_shown_sizes`.
    """
    check_shown_sizes()
    call = running_call()
    if call is not None and call.graph is not None and call.trace is not None and call.trace.code is code:
        call.graph.complete(code, compiled, call.trace.arguments, shape_guards(call.graph.fake_mode))


def end_trace() -> None:
    """Dynamo's trace has ended, perhaps with an error: nothing that runs from here on sees what was set for it."""
    call = running_call()
    if call is not None:
        call.settings_end()


def watch_all(options_of: Callable[[Any], tuple[object, Options] | None]) -> None:
    """Has :func:`begin_trace` called ahead of each trace, :func:`code_made` and :func:`end_trace` after it."""
    watch_traces(partial(begin_trace, options_of), code_made, end_trace)
