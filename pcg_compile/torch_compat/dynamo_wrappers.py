"""What ``torch.compile`` makes of a backend and of a function (torch 2.11 to 2.13)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch._dynamo.eval_frame

from .probe import attributes, private

__all__ = ["calling_wrapper", "ensure_backend", "inline_when_traced", "innermost_backend", "wrapper_of"]

_READ = "2.11 to 2.13"
attributes("torch._dynamo.eval_frame", _READ, "DisableContext OptimizeContext")
_Wrapper = private("torch._TorchCompileWrapper", _READ)
_register_backend = private("torch._dynamo.register_backend", _READ)


#: Where the code around a compiled call lies: what torch.compile returns, and what runs a backend's callable.
_EVAL_FRAME = torch._dynamo.eval_frame.__file__


def calling_wrapper() -> object | None:
    """The object that ``torch.compile`` made of a backend, whose graph is being compiled or called (2.11 to 2.13).

    Equal compiled functions share what Dynamo compiled for the first of them; only the call itself tells them apart.
    Dynamo runs a backend's callable in a function that holds the callback of the present call, for putting it back;
    farther out is the function that torch.compile returned. None where neither is found.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        # 1 us of a step, most of it for the attributes that lead to the wrapper.
        if frame.f_code.co_filename == _EVAL_FRAME:
            name = "callback" if "callback" in frame.f_code.co_freevars else "prior"
            found = innermost_backend(frame.f_locals.get(name))
            if found is not None:
                return found
        frame = frame.f_back
    return None


def inline_when_traced(wrapper: Callable[..., Any], function: Callable[..., Any]) -> None:
    """Has Dynamo trace ``function`` where traced code calls ``wrapper``, as for torch.compile's own (2.11 to 2.13)."""
    wrapper._torchdynamo_inline = function  # type: ignore[attr-defined]


def wrapper_of(compiled: Any) -> object | None:
    """The same object, from what ``torch.compile`` returned, or a module after ``module.compile()`` (2.11 to 2.13)."""
    if isinstance(compiled, torch.nn.Module):
        compiled = vars(compiled).get("dynamo_ctx") or vars(compiled).get("_compiled_call_impl")
    if hasattr(compiled, "callback"):
        return innermost_backend(compiled.callback)
    for cell in getattr(compiled, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            found = innermost_backend(getattr(cell.cell_contents, "callback", None))
            if found is not None:
                return found
    return None


def innermost_backend(seen: Any) -> object | None:
    for _ in range(16):
        if seen is None or isinstance(seen, _Wrapper):
            found: object | None = seen
            return found
        seen = getattr(seen, "_torchdynamo_orig_backend", None) or getattr(seen, "_torchdynamo_orig_callable", None)
    return None


def ensure_backend(name: str, backend: Callable[..., Any]) -> None:
    """Registers a backend unless an entry point does (2.11 to 2.13)."""
    if name not in torch.compiler.list_backends():
        _register_backend(backend, name=name)
