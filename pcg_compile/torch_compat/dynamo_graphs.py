"""Dynamo's graphs: their inputs, where they end, the function they come from (torch 2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.symbol import SymT, symbol_is_type

from .fake_tensors import fake_mode_of
from .probe import attributes, exceptions, private

__all__ = [
    "TRACE_AGAIN",
    "breaks_since",
    "breaks_so_far",
    "changing_floats",
    "dynamo_refused",
    "graph_break_of",
    "graph_breaks",
    "is_asked_for",
    "is_static_input",
    "keep_traced_function",
    "refusal_since",
    "trace_failed",
    "traced_function",
]

_READ = "2.11 to 2.13"
attributes("torch._dynamo.config", _READ, "assume_static_by_default")
attributes("torch.utils._sympy.symbol", _READ, "SymT symbol_is_type")
attributes("torch._dynamo.pgo", _READ, "get_code_state auto_dynamic")
_breaks = private("torch._dynamo.utils.graph_break_reasons", _READ)
_counters = private("torch._dynamo.utils.counters", _READ)
_pgo = private("torch._dynamo.pgo", _READ)
_TensorifyState = private("torch._dynamo.symbolic_convert.TensorifyState", _READ)
_TraceAgain = private("torch._dynamo.exc.TensorifyScalarRestartAnalysis", _READ)
#: What has Dynamo trace once more, with floats that a compiler cannot take as numbers as constants.
TRACE_AGAIN = exceptions("torch._dynamo.exc", _READ, "TensorifyScalarRestartAnalysis")
_REFUSALS = exceptions(
    "torch._dynamo.exc", _READ, "Unsupported UserError FailOnRecompileLimitHit UncapturedHigherOrderOpError"
)
_FAILURES = exceptions("torch._dynamo.exc", _READ, "TorchRuntimeError InternalTorchDynamoError")
_FAILED_OPS = exceptions("torch._dynamo.exc", _READ, "TorchRuntimeError")
_OF_BACKENDS = exceptions("torch._dynamo.exc", _READ, "BackendCompilerFailed")


def is_static_input(node: fx.Node) -> bool:
    """Whether a placeholder of Dynamo's is a parameter or a buffer of a module (2.11 to 2.13)."""
    return isinstance(node.meta.get("example_value"), torch.nn.Parameter) or (
        "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    )


def is_asked_for(reason: str) -> bool:
    """Whether the code itself asked for a break of the graph, where nothing else runs (2.11 to 2.13)."""
    return reason.startswith("Call to `torch._dynamo.graph_break()`")


def graph_break_of(gm: fx.GraphModule) -> tuple[str, Any] | None:
    """Why Dynamo broke the frame after this graph, and the user's frames; None where it did not (2.11 to 2.13)."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    return (reason.reason, reason.user_stack) if getattr(reason, "graph_break", False) else None


def breaks_so_far() -> tuple[int, Mapping[str, int]]:
    """What :func:`breaks_since` and :func:`refusal_since` begin at (2.11 to 2.13)."""
    return len(_breaks), dict(_counters["unimplemented"])


def breaks_since(before: tuple[int, Mapping[str, int]]) -> list[tuple[str, Any]]:
    """The reason and the user's frames of each break of a graph since then (2.11 to 2.13)."""
    return [(reason.reason, reason.user_stack) for reason in _breaks[before[0] :]]


def refusal_since(before: tuple[int, Mapping[str, int]]) -> str:
    """What Dynamo has met since then and does not trace, "" for nothing; it notes no break where no graph is left."""
    found = [text for text, times in _counters["unimplemented"].items() if times > before[1].get(text, 0)]
    return found[-1].partition("\n")[0] if found else ""


def dynamo_refused(error: BaseException | None) -> bool:
    """Whether an error of a call with ``fullgraph=True`` is that Dynamo makes no single graph of it (2.11 to 2.13)."""
    unseen = isinstance(error, RuntimeError) and "fullgraph=True found no compiled frames" in str(error)
    return unseen or isinstance(error, _REFUSALS)


def trace_failed(error: BaseException) -> bool:
    """Whether an error of a call is one of Dynamo's trace of it (2.11 to 2.13)."""
    return isinstance(error, _FAILURES)


def op_failed(error: BaseException) -> bool:
    """Whether it is that of an op, which fails on fake tensors (2.11 to 2.13)."""
    return isinstance(error, _FAILED_OPS)


def error_of_backend(error: BaseException) -> BaseException | None:
    """The error that a backend raised, of the one that Dynamo makes of it; None of others (2.11 to 2.13)."""
    return getattr(error, "inner_exception", None) if isinstance(error, _OF_BACKENDS) else None


def traced_stack(error: BaseException) -> Any:
    """The user's frames where a trace failed, outermost first; None where Dynamo does not tell (2.11 to 2.13)."""
    return getattr(error, "real_stack", None)


@contextmanager
def graph_breaks() -> Iterator[list[tuple[str, Any]]]:
    """The reason and the user's frames of each break of a graph inside; filled at the end (2.11 to 2.13)."""
    before, found = breaks_so_far(), []  # type: ignore[var-annotated]
    try:
        yield found
    finally:
        found += breaks_since(before)


def changing_floats(gm: fx.GraphModule, code: CodeType | None) -> dict[fx.Node, float]:
    """The inputs of a graph that are Python floats which change from call to call, and their values (2.11 to 2.13).

    Dynamo makes tensors on the CPU of those, and ``item()`` of them in the graph. With ``dynamic=True`` it does so for
    all floats; then it is made to trace again with those that do not change as constants.
    """
    found: dict[fx.Node, float] = {}
    fresh: list[str] = []
    env = fake_mode_of([]).shape_env
    for node in gm.graph.find_nodes(op="placeholder"):
        number = getattr(node.meta.get("example_value"), "item_memo", None)
        symbol = getattr(getattr(number, "node", None), "_expr", None)
        # A tensor of the caller's that is read by .item() has a symbol that only the data tell.
        if not isinstance(symbol, sympy.Symbol) or env is None or not symbol_is_type(symbol, SymT.FLOAT):
            continue
        source = getattr(getattr(node, "_dynamo_source", None), "name", "")
        if _has_changed(str(source() if callable(source) else source), code):
            found[node] = float(env.backed_var_to_val[symbol])
        elif not _TensorifyState.should_specialize(symbol.name):
            fresh.append(symbol.name)
    for name in fresh:
        _TensorifyState.specialize(name)
    if fresh:
        # Has Dynamo trace the code once more.
        raise _TraceAgain()
    return found


def _has_changed(source: str, code: CodeType | None) -> bool:
    """Whether Dynamo has seen two values of a number; also where it cannot tell (2.11 to 2.13)."""
    if code is None or torch._dynamo.config.assume_static_by_default:
        return True  # it makes no symbol of any other number
    where = (code.co_filename, code.co_firstlineno, code.co_name)
    for key, state in _pgo.get_code_state().items():
        if (key.filename, key.firstlineno, key.name) == where and source in state.automatic_dynamic:
            return state.automatic_dynamic[source].scalar is _pgo.auto_dynamic
    return True


def traced_function(gm: fx.GraphModule | None) -> tuple[str, str] | None:
    """File and name of the function that Dynamo traced a graph of, where it kept them (2.11 to 2.13)."""
    stack = getattr(getattr(gm, "compile_subgraph_reason", None), "user_stack", None)
    return (stack[0].filename, stack[0].name) if stack else None


def keep_traced_function(copy: fx.GraphModule, original: fx.GraphModule) -> None:
    """Lets a copy of Dynamo's graph answer :func:`traced_function` as well (2.11 to 2.13)."""
    copy.compile_subgraph_reason = getattr(original, "compile_subgraph_reason", None)  # type: ignore[assignment]
