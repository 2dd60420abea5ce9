"""Dynamo's traces: who is told of them, what they are shown, and the settings they run under (torch 2.11 to 2.13)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from types import CodeType, SimpleNamespace
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
from torch.utils._pytree import tree_leaves

from .dynamo_wrappers import innermost_backend
from .inductor import freezes_weights
from .probe import attributes, private

__all__ = [
    "Marks",
    "Trace",
    "compile_for_all_sizes",
    "requested_marks",
    "settings_of_trace",
    "watch_traces",
    "with_each_call",
]

_READ = "2.11 to 2.13"
attributes(
    "torch._dynamo.config", _READ, "specialize_float assume_static_by_default allow_empty_graphs install_free_tensors"
)
attributes("torch.fx.experimental._config", _READ, "backed_size_oblivious")
_config = private("torch.fx.experimental._config", _READ)
_register_hook = private("torch._dynamo.register_hook_for_recompile_user_context", _READ)
_hooks = private("torch._dynamo.utils.get_hook_for_recompile_user_context", _READ)
_register_bytecode_hook = private("torch._dynamo.convert_frame.register_bytecode_hook", _READ)
_compile_callbacks = private("torch._dynamo.callback_handler", _READ)
_on_compile_end = private("torch._dynamo.on_compile_end", _READ)
_exceeds_recompile_limit = private("torch._dynamo.cache_size.exceeds_recompile_limit", _READ)
_TensorifyState = private("torch._dynamo.symbolic_convert.TensorifyState", _READ)
_compile = private("torch._dynamo.convert_frame._compile", _READ)
attributes(
    "torch._dynamo.convert_frame._compile",
    _READ,
    "code compiler_fn cache_size compile_id locals recompile_reason",
    lambda: SimpleNamespace(**dict.fromkeys((*_compile.__code__.co_varnames, *_compile.__code__.co_cellvars))),
)


#: Dynamic dimensions of tensors: (tensor, dimensions, whether a dimension that turns out fixed is an error) of each.
Marks = list[tuple[torch.Tensor, list[int], bool]]
#: What marks a call's dynamic dimensions, for traces of this thread or task.
_MARK: ContextVar[Callable[[], Marks] | None] = ContextVar("pcg_mark", default=None)


class compile_for_all_sizes:
    """If Dynamo compiles inside, marked sizes cover 1 too, and branches on it become guards (2.11 to 2.13).

    ``mark`` returns the dynamic dimensions of the arguments, see :data:`Marks`; it is called only then,
    so a call that compiles nothing costs an assignment.
    """

    __slots__ = ("mark", "token")

    def __init__(self, mark: Callable[[], Marks]) -> None:
        self.mark = mark

    def __enter__(self) -> None:
        self.token = _MARK.set(self.mark)

    def __exit__(self, *error: object) -> None:
        _MARK.reset(self.token)


def requested_marks() -> Marks | None:
    """The dynamic dimensions that the caller asks traces of this call for, for all sizes; None where it does not."""
    mark = _MARK.get()
    return mark() if mark is not None else None


@dataclass(frozen=True)
class Trace:
    """One trace of Dynamo's that is about to begin.

    Attributes:
        wrapper: what ``torch.compile`` made of the backend.
        code: the code that is traced. arguments: its local variables, which the trace is shown; may be replaced.
        first: whether the code was never compiled before.
        limit: the name of the limit on compilations that the code has reached, so it will run eagerly; or "".
        why: the guard that failed, where Dynamo knows.
        context: the object behind the compiled callable. at_end: what is called when the running call of it ends.
    """

    wrapper: Any
    code: CodeType
    arguments: dict[str, Any]
    first: bool
    limit: str
    why: str
    context: Any
    at_end: list[Callable[[], None]] | None


#: Who is told of each trace's begin and end, in the thread that traces: registered once, at import.
_TOLD_OF_TRACES: list[Callable[[Trace], None]] = []
_TOLD_OF_ENDS: list[Callable[[], None]] = []


def watch_traces(
    before: Callable[[Trace], None] | None = None,
    after: Callable[[CodeType, CodeType], None] | None = None,
    end: Callable[[], None] | None = None,
) -> None:
    """Has ``before(trace)`` called ahead of each of Dynamo's traces, or keeps it so (2.11 to 2.13).

    What it raises reaches the caller of the compiled function as it is, and nothing has run. Dynamo calls its hooks
    for the context of recompilations in the tracing thread, holding its compile lock, ahead of every trace and of the
    limit on recompilations. ``after(code, compiled)`` is called once code has been compiled, before it runs; ``end()``
    when Dynamo ends the trace, guards included and also by an error, still ahead of everything that runs.
    """
    if before is not None:
        _TOLD_OF_TRACES.append(before)
    if after is not None:
        _register_bytecode_hook(after)
    if end is not None:
        _TOLD_OF_ENDS.append(end)
    if _before_trace not in (_hooks() or ()):
        _register_hook(_before_trace)


def _before_trace() -> str:
    frame: Any = sys._getframe(1)
    if frame.f_code.co_name != "_compile":  # up to Python 3.11 a comprehension is a frame of its own
        frame = frame.f_back
    here = frame.f_locals
    if frame.f_code.co_name != "_compile" or "compiler_fn" not in here:
        return ""
    wrapper = innermost_backend(here["compiler_fn"])
    if wrapper is None:
        trace = Trace(None, here["code"], {}, False, "", "", None, None)
    else:
        exceeded, limit = _exceeds_recompile_limit(here["cache_size"], here["compile_id"])
        first = str(here["compile_id"]).rpartition("/")[2] == "0"
        limit = f"{limit} ({getattr(torch._dynamo.config, limit)})" if exceeded else ""
        why = str(here.get("recompile_reason") or "").partition("\n")[0]
        context, at_end = _running_call(frame, wrapper)
        trace = Trace(wrapper, here["code"], here["locals"], first, limit, why, context, at_end)
    for call in _TOLD_OF_TRACES:
        call(trace)
    # torch._dynamo.reset() drops callbacks.
    if _after_trace not in _compile_callbacks.end_callbacks:
        _on_compile_end(_after_trace)
    return ""


def _after_trace(args: Any) -> None:
    for call in _TOLD_OF_ENDS:
        call()


def _running_call(frame: Any, wrapper: Any) -> tuple[Any, list[Callable[[], None]] | None]:
    """The context whose call Dynamo compiles for, and the list of what it does at the call's end (2.11 to 2.13)."""
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper":
            context, at_end = frame.f_locals.get("self"), frame.f_locals.get("cleanups")
            if innermost_backend(getattr(context, "callback", None)) is wrapper:
                return context, at_end if isinstance(at_end, list) else None
        frame = frame.f_back
    return None, None


def with_each_call(context: Any, enter: Callable[[], Callable[[], None]]) -> None:
    """Has ``enter()`` called ahead of each call behind a context, and what it returns at the call's end (2.11 to 2.13).

    That is how ``torch.compile(dynamic=...)`` sets what it sets; here for the context of one compiled function.
    """
    context.enter_exit_hooks.append(enter)


def settings_of_trace(
    trace: Trace, marks: Marks, *, for_all_sizes: bool, outermost: bool, free_tensors: bool = False
) -> Callable[[], None]:
    """Settings of torch for one trace; the result takes them back (2.11 to 2.13).

    Dynamo holds its compile lock from before they are set until after they are taken back, at the end of the trace.

    - Two calls that mark code for a profiler are left out, some 10 us a step.
    - Inductor's freezing is off: it would hold a second copy of the weights.
    - With ``dynamic=True`` a first trace has floats as constants, as it has them without.
    - Marked dimensions are dynamic; ``for_all_sizes``, for 1 too, with branches on it as guards. Dimensions of size 0
      are fixed then, and others of size 1: Dynamo makes a size dynamic that was another one before, and one that
      broadcasts is not.
    - Where the ``outermost`` function of a call computes nothing, Dynamo compiles that too. Else it would leave the
      function to Python for all later calls, whatever they do.
    - With ``free_tensors``, weights are attributes of the graph: the code that Dynamo writes does not fetch them.
    """
    with ExitStack() as stack:
        dynamo: dict[str, Any] = {}
        if getattr(torch._dynamo.config, "record_runtime_overhead", False):
            dynamo["record_runtime_overhead"] = False
        if trace.first and not (torch._dynamo.config.specialize_float or torch._dynamo.config.assume_static_by_default):
            dynamo["specialize_float"] = True
        if outermost:
            dynamo["allow_empty_graphs"] = True
        if free_tensors:
            dynamo["install_free_tensors"] = True
        if dynamo:
            stack.enter_context(torch._dynamo.config.patch(dynamo))
        if freezes_weights():
            stack.enter_context(torch._inductor.config.patch(freezing=False))
        # What is forced to be a constant of this trace may change until the next one.
        stack.callback(_forget_constants, frozenset(_TensorifyState.force_specializations))
        if for_all_sizes:
            stack.enter_context(_config.patch(backed_size_oblivious=True))
            # torch takes a symbol for positive and drops branches on 0 without a guard: 0 is a number.
            marks = [(tensor, [d for d in dims if tensor.shape[d]], surely) for tensor, dims, surely in marks]
            for tensor, dims in _fixed(trace.arguments, marks):
                stack.callback(_unmark, tensor, {k: v for k, v in vars(tensor).items() if "_dynamo_" in k})
                torch._dynamo.mark_static(tensor, dims)
        for tensor, dims, surely in marks:
            stack.callback(_unmark, tensor, {k: v for k, v in vars(tensor).items() if "_dynamo_" in k})
            (torch._dynamo.mark_dynamic if surely else torch._dynamo.maybe_mark_dynamic)(tensor, dims)
        return stack.pop_all().close


def _fixed(arguments: Mapping[str, Any], marks: Marks) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """The tensors among arguments that have dimensions of size 0, or unmarked ones of size 1, and those dimensions."""
    marked = {id(tensor): dims for tensor, dims, _ in marks}
    for leaf in tree_leaves(list(arguments.values())):
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, torch.nn.Parameter):
            dims = [d for d, n in enumerate(leaf.shape) if n < 2 and d not in marked.get(id(leaf), ())]
            if dims:
                yield leaf, dims


def _forget_constants(before: Set[str]) -> None:
    for name in _TensorifyState.force_specializations - before:
        _TensorifyState.force_specializations.discard(name)


def _unmark(tensor: torch.Tensor, before: Mapping[str, Any]) -> None:
    # Other compiled models must not find the marks.
    for name in [name for name in vars(tensor) if "_dynamo_" in name and name not in before]:
        delattr(tensor, name)
    vars(tensor).update(before)
