"""What a user reads in place of an error of Dynamo's, with its hundreds of lines of traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import PCGError, TraceError, message
from .fx.places import place_of_stack
from .torch_compat.dynamo_graphs import error_of_backend, op_failed, traced_stack

__all__ = ["in_plain_words", "noted", "place_of_error", "why_untraceable"]

#: What the text of an error says is wrong with the arguments, and what to do.
_CURES = (
    (r"'indices'.*Long, Int", "Token ids are integers. Write: ids.long()"),
    (r"same device", "Move the model and its inputs to one device. Write: model.to(x.device)"),
)
_ELSE = "If the call works without torch.compile, keep the op out of the graph: @torch.compiler.disable"


def in_plain_words(error: BaseException) -> PCGError | None:
    """What to raise instead of an error of a compiled call: pcg's own that Dynamo wrapped, or why it cannot be traced.

    None where the error stays as it is.
    """
    inner = error_of_backend(error)
    if isinstance(inner, PCGError):
        return inner.with_traceback(None)
    if not op_failed(error):
        return None
    what = f"the call cannot be traced: {why_untraceable(error)}"
    return TraceError(message(what, place_of_error(error), cure=_cure(error) or _ELSE))


@contextmanager
def noted(error: BaseException) -> Iterator[None]:
    """Errors of a call that Dynamo could not trace, and that fails in eager too, say where and what to do."""
    try:
        yield
    except Exception as wrong:  # whatever eager raises for wrong arguments
        # Python 3.10 has no notes.
        note = getattr(wrong, "add_note", lambda text: None)
        note(message("pcg: wrong arguments", place_of_error(error), cure=_cure(error)))
        raise


def why_untraceable(error: BaseException) -> str:
    """The error of the op that failed, without Dynamo's words around it."""
    text = str(error)
    found = re.search(r"got \w+\((['\"])(.+)\1\)", text) or re.search(r"Explanation: ()(.+)", text)
    return (found[2] if found else text.partition("\n")[0]).strip()


def place_of_error(error: BaseException) -> str:
    """The user's line that Dynamo failed at, "" where it does not tell."""
    stack = traced_stack(error)
    return str(place_of_stack(stack)) if stack else ""


def _cure(error: BaseException) -> str | None:
    return next((cure for pattern, cure in _CURES if re.search(pattern, why_untraceable(error))), None)
