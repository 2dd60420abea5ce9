"""Every call of a compiled function is served by a graph of pcg's, or counted.

Note [Calls that reach no graph]
Dynamo may keep a call from the backend: it has reached its limit on recompilations, it skips a function (RNN layers,
generators), or it finds nothing that it can trace. The function then runs as plain Python. So each compiled function
has a :class:`Watch` that is told of each call's begin and end. A call in which none of its graphs ran is counted with
Dynamo's reason. ``@pcg.piecewise`` tells its watch itself; under ``strict`` it compiles with ``fullgraph=True``, so
Dynamo refuses what it cannot take in as a whole before anything of it has run. What ``torch.compile`` returned is
watched from its first trace on. Whether that one makes a single graph is its caller's choice: under ``strict`` a graph
that ends early and the limit on recompilations are errors, a function that Dynamo makes no graph of is counted.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from contextvars import Token
from types import CodeType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .argument_form import NoFastCall
from .counters import Counters
from .errors import PCGError
from .fast_calls import TracedGraph
from .fx.places import place_of_stack
from .options import Options
from .plain_errors import in_plain_words
from .registry import RUNNING_CALL, RunningCall, add_runtime
from .step import current_step
from .torch_compat.dynamo_calls import traced_codes, traced_inputs
from .torch_compat.dynamo_graphs import breaks_since, breaks_so_far, dynamo_refused, refusal_since
from .torch_compat.dynamo_traces import Marks, Trace, requested_marks, settings_of_trace
from .torch_compat.fake_tensors import FakeTensorMode
from .torch_compat.guards import guards_hold_at
from .torch_compat.inductor import freezes_weights
from .torch_compat.shown_sizes import show_more_rows
from .weights import Weights

__all__ = [
    "Call",
    "Counted",
    "Watch",
    "check_shown_sizes",
    "graph_handed",
    "graph_ran",
    "running_call",
    "traced_code",
    "weights_of_call",
]

_LOG = logging.getLogger("pcg_compile")
_OWN = os.path.dirname(__file__) + os.sep
_UNSEEN = "Dynamo ran the call without any graph of it"


class Call(RunningCall):
    """One running call of a compiled function that goes through Dynamo."""

    __slots__ = (
        "breaks", "counted", "error_before", "graph", "graphs", "handed", "may_show_rows", "places", "restore",
        "shown", "token", "trace", "traces", "watch", "without_attributes",
    )  # fmt: skip

    def __init__(self, watch: Watch, caller: object, may_show_rows: bool, module: torch.nn.Module | None) -> None:
        super().__init__(watch.owner(), caller, module)
        self.watch, self.may_show_rows = watch, may_show_rows
        #: Whether it was counted already that the call runs without a graph.
        self.counted = False
        #: Graphs that ran, graphs that Dynamo handed over in the last trace, and traces.
        self.graphs = self.handed = self.traces = 0
        self.trace: Trace | None = None
        #: The last graph that was handed over and can be captured.
        self.graph: TracedGraph | None = None
        self.breaks: Any = None
        #: A size, 0 or 1, and the larger one that a trace was shown instead; None where it was not.
        self.shown: tuple[int, int] | None = None
        #: Where the last graph's attributes lie, if there are any.
        self.places: Weights | None = None
        #: Whether the call is to be tried again with weights as inputs of the graph.
        self.without_attributes = False
        self.restore: Callable[[], None] | None = None
        self.error_before = sys.exc_info()[1]
        self.token: Token[RunningCall | None] = RUNNING_CALL.set(self)

    def forget(self) -> None:
        """The call is tried again: it is neither counted nor blamed."""
        self.counted, self.trace = True, None

    def settings_end(self) -> None:
        """Takes back what was set for the last trace."""
        if self.restore is not None:
            restore, self.restore = self.restore, None
            restore()


def running_call() -> Call | None:
    """The innermost running call that goes through Dynamo, if there is one."""
    call = RUNNING_CALL.get()
    return call if isinstance(call, Call) else None


def graph_ran() -> None:
    """Notes that a graph of the running call runs.

    Another thread's callbacks may keep Dynamo from telling of the end of a trace; what it had set ends here then.
    """
    call = RUNNING_CALL.get()
    if type(call) is Call:
        call.graphs += 1
        if call.restore is not None:
            call.settings_end()


def graph_handed(runtime: Any = None, fake_mode: FakeTensorMode | None = None, layouts: Sequence[Any] = ()) -> None:
    """Notes that Dynamo handed a graph over; or, with its runtime, that the graph can be captured."""
    call = running_call()
    if call is None:
        return
    if fake_mode is None:
        call.handed += 1
        call.graph = None
    else:
        seen, codes = traced_inputs(fake_mode), traced_codes()
        call.graph = TracedGraph(weakref.proxy(runtime), seen, codes, fake_mode, layouts, call.places)
        runtime.traced = call.graph


def weights_of_call(tensors: Sequence[torch.Tensor]) -> Callable[[], Sequence[torch.Tensor]] | None:
    """What gives the tensors that are attributes of the graph that is being compiled, at each call of it.

    None where there are none, and nobody has to know which modules the graph runs for.

    Raises:
        NoFastCall: the running call asked for attributes, and they lie in none of its modules.
    """
    call = running_call()
    if call is None or not call.watch.free_tensors:
        fixed = tuple(tensors)
        return (lambda: fixed) if fixed else None
    try:
        call.places = Weights(tensors, call.module, call.watch.modules)
    except NoFastCall:
        call.without_attributes = True
        raise
    return call.places.of_call


class OtherSizes(PCGError):
    """A trace that was shown more rows than its call has is not right for the call; it is tried again without."""


def check_shown_sizes(fake_mode: FakeTensorMode | None = None) -> None:
    """Checks that the running call may use what a trace made that was shown more rows than there are.

    Args:
        fake_mode: the trace's. None: the trace made no graph, so nobody knows.

    Raises:
        OtherSizes: it may not. Nothing has run.
    """
    call = running_call()
    if call is None or call.shown is None or call.traces > 1 or call.graphs or (fake_mode is None and call.handed):
        return
    if fake_mode is None or not guards_hold_at(*call.shown, fake_mode):
        raise OtherSizes("traced with more rows than there are")


def traced_code() -> CodeType | None:
    """The code that Dynamo traces for the running call."""
    call = running_call()
    return call.trace.code if call is not None and call.trace is not None else None


class Watch:
    """The calls of one compiled function: told of each one's begin and end, it counts those that no graph served."""

    def __init__(self, owner: object, options: Options, whole: bool = False) -> None:
        self.owner = weakref.ref(owner)
        self.options = options
        #: Whether traces have weights as attributes of the graph; modules that the function refers to.
        self.free_tensors = False
        self.modules: Sequence[torch.nn.Module] = ()
        #: Whether the function must be one graph: what is no graph of it is then an error under ``strict``.
        self.whole = whole and options.strict
        self._counters: Counters | None = None
        #: Code that Dynamo leaves to Python in each call, and code that it compiles no more: (reason, place) of each.
        self.left_out: dict[CodeType, tuple[str, str]] = {}
        self.given_up: dict[CodeType, tuple[str, str]] = {}

    def begin(self, caller: object = None, may_show_rows: bool = False, module: torch.nn.Module | None = None) -> Call:
        """A call begins.

        Args:
            caller: whom its figures belong to; None: the owner.
            may_show_rows: a trace that fails because it was shown more rows than there are is tried again without.
            module: what the function is called on.
        """
        return Call(self, caller if caller is not None else self.owner(), may_show_rows, module)

    def end(self, call: Call) -> None:
        """The call ends, perhaps with an error: counts it if no graph ran.

        Raises:
            PCGError: under ``strict``, where Dynamo refused the function, or the call ran without a graph. In place of
                Dynamo's errors: see :func:`in_plain_words`.
        """
        error = sys.exc_info()[1]
        if error is call.error_before:
            error = None
        RUNNING_CALL.reset(call.token)
        if error is None and call.graphs and not call.traces and not self.left_out:
            return  # the usual call
        call.settings_end()
        if error is not None:
            if self.whole and dynamo_refused(error):
                reason = f"Dynamo makes no single graph of the function: {_first_line(str(error))}"
                self.fall_back(reason, "", cause=error)
            if (plain := in_plain_words(error)) is not None:
                raise plain from None
            return
        self._trace_ended(call)
        reasons = list(self.left_out.values())
        if not call.graphs:
            reasons += self.given_up.values()
            reasons += [] if reasons or call.counted else [(_UNSEEN, "")]
        for reason, where in dict.fromkeys(reasons):
            self.fall_back(reason, where)

    def traced(self, call: Call, trace: Trace) -> None:
        """A trace of the function, or of a function that it calls, is about to begin.

        Raises:
            PCGError: under ``strict``, where the code has reached Dynamo's limit on compilations.
        """
        self._trace_ended(call)
        call.trace, call.handed, call.breaks = trace, 0, breaks_so_far()
        call.traces += 1
        place = f"{trace.code.co_filename}:{trace.code.co_firstlineno}"
        if trace.limit:
            call.trace = None
            why = f" (it would compile again because {trace.why})" if trace.why else ""
            reason = f"{trace.code.co_name} has reached Dynamo's {trace.limit}: other calls of it run eagerly{why}"
            if self.options.strict:
                self.fall_back(reason, place, strict=True)
            self.given_up[trace.code] = (reason, place)
            return
        for known in (self.left_out, self.given_up):
            known.pop(trace.code, None)
        if freezes_weights():
            _LOG.warning("torch._inductor.config.freezing is left out: it would hold a second copy of the weights")
        requested = requested_marks()
        marks = requested if requested is not None else _token_dims(trace)
        shown = show_more_rows(trace.arguments, marks) if call.traces == 1 and call.may_show_rows else None
        if shown is not None:
            marks, call.shown = shown
        for_all_sizes = requested is not None or bool(marks)
        call.restore = settings_of_trace(
            trace,
            marks,
            for_all_sizes=for_all_sizes,
            outermost=call.traces == 1,
            free_tensors=self.free_tensors and call.traces == 1,
        )

    def fall_back(
        self, reason: str, where: str, *, strict: bool | None = None, cause: BaseException | None = None
    ) -> None:
        """Counts a call, or a part of one, that runs without a graph.

        Raises:
            PCGError: with ``strict``, or where the function must be one graph; from ``cause``.
        """
        owner = self.owner()
        if self._counters is None:
            self._counters = Counters()
            if owner is not None:
                add_runtime(owner, self._counters, None)
        self._counters.strict = self.whole if strict is None else strict
        self._counters.serve()
        try:
            self._counters.fall_back(reason, where)
        except PCGError as error:
            raise error from cause

    def _trace_ended(self, call: Call) -> None:
        trace, call.trace = call.trace, None
        # Functions of pcg's own around a model, such as its hooks, hold nothing to compile.
        if trace is None or call.handed or trace.code.co_filename.startswith(_OWN):
            return
        breaks = breaks_since(call.breaks)
        if not breaks and call.traces > 1:
            return  # a function inside that computes nothing
        reason = _first_line(breaks[-1][0]) if breaks else refusal_since(call.breaks) or "Dynamo skips it"
        stack = breaks[-1][1] if breaks else None
        place = str(place_of_stack(stack)) if stack else f"{trace.code.co_filename}:{trace.code.co_firstlineno}"
        self.left_out[trace.code] = (f"{trace.code.co_name} runs eagerly, no graph of it: {reason}", place)


class Counted:
    """A callable that Dynamo gets for a graph; each call is counted as a fallback."""

    def __init__(self, function: Callable[..., Any], counters: Counters, reason: str, where: str = "") -> None:
        self.function, self.counters, self.fallback = function, counters, (reason, where)

    def __call__(self, *args: Any) -> Any:
        graph_ran()
        self.counters.serve()
        self.counters.fall_back(*self.fallback)
        return self.function(*args)


def _token_dims(trace: Trace) -> Marks:
    """Inside ``pcg.step()`` the dimensions that have as many entries as the step has tokens, one of each argument."""
    step = current_step()
    if step is None or trace.code.co_filename.startswith(_OWN):
        return []
    n, found = step.batch.num_tokens, []
    for tensor in {id(t): t for t in _tensors(trace.arguments)}.values():
        dims = [d for d, size in enumerate(tensor.shape) if size == n]
        if dims and (n > 1 or len(dims) == 1):
            found.append((tensor, dims[:1], False))
    return found


def _tensors(value: Any) -> list[torch.Tensor]:
    leaves = tree_leaves([v for v in value.values() if not isinstance(v, torch.nn.Module)])
    return [leaf for leaf in leaves if type(leaf) is torch.Tensor]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
