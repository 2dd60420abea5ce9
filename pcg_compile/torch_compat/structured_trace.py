"""Artifacts in the log that ``TORCH_TRACE`` asks for, and tlparse shows (torch 2.11 to 2.13)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .probe import private

_VERSIONS = "2.11 to 2.13"
_ARGUMENTS = {"metadata_fn", "payload_fn", "compile_id"}
_CompileContext = private("torch._guards.CompileContext", _VERSIONS, optional=True)
_trace_structured = private("torch._logging.trace_structured", _VERSIONS, optional=True)
if _trace_structured is not None and not inspect.signature(_trace_structured).parameters.keys() >= _ARGUMENTS:
    _trace_structured = None


def compile_id() -> Any:
    """The number of the running compilation, such as 0/0; None outside of one (2.11 to 2.13)."""
    return _CompileContext.current_compile_id() if _CompileContext is not None else None


def add_artifact(name: str, text: Callable[[], str], number: Any) -> None:
    """Adds a text to the log of ``TORCH_TRACE``, beside the compilation of that number (2.11 to 2.13).

    Without that setting ``text`` is not called. There is no public way: nothing is added where torch's has changed.
    """
    if _trace_structured is not None:
        about = {"name": name, "encoding": "string"}
        _trace_structured("artifact", metadata_fn=lambda: about, payload_fn=text, compile_id=number)
