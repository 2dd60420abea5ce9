"""Every error that the package raises.

A message has four parts: what happened, where (file:line of the user's code), why it matters, and the cure as code.
:func:`message` lays them out, so all errors read alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = [
    "AdapterError",
    "BatchError",
    "CaptureHazard",
    "GenerationError",
    "GraphBreakingScalarWrite",
    "Hazard",
    "OptionsError",
    "PCGError",
    "ProgramError",
    "SplitOpNotFound",
    "StaleAddress",
    "TraceError",
    "UnsafePadding",
    "message",
]


class PCGError(Exception):
    """Base of all errors of this package. Their text is made by :func:`message`.

    It has no constructor of its own: Dynamo cannot trace one, and an error that is raised in code that it traces must
    reach the caller as it is.
    """


class OptionsError(PCGError, ValueError):
    """An unknown option, or a value that an option does not allow."""


class SplitOpNotFound(PCGError):
    """A split op named in the options matches no node of the graph."""


class GraphBreakingScalarWrite(PCGError):
    """A statement such as ``t[0] = 0`` copies a scalar from the host, which no captured graph can hold."""


class CaptureHazard(PCGError):
    """Something in the model cannot be captured, nor run between captured graphs."""


class UnsafePadding(PCGError):
    """Under ``strict``, a piece whose real rows may depend on padding rows."""


class TraceError(PCGError, RuntimeError):
    """A call that Dynamo cannot trace: in most cases its arguments are wrong, and it fails without pcg too."""


class BatchError(PCGError, ValueError):
    """A batch that contradicts itself, its cache, or the call it is used in."""


class StaleAddress(PCGError):
    """A captured graph would read memory that has moved."""


class ProgramError(PCGError):
    """A program that cannot be saved, or a file that does not fit the model, the machine or the versions here."""


class AdapterError(PCGError, ValueError):
    """A LoRA adapter that cannot be loaded or used, or a layer that none can be added to."""


class GenerationError(PCGError):
    """Requests of ``generate_batch`` that failed while the others finished.

    ``outputs`` holds the results of all requests, as ``generate_batch`` would have returned them.
    """

    outputs: dict[str, Any]

    def __init__(self, text: str, outputs: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.outputs = outputs if outputs is not None else {}


@dataclass(frozen=True)
class Hazard:
    """One finding of a safety pass: what a captured graph cannot hold, where, why, and what to write instead.

    ``kind`` is one of "scalar write", "host copy", "sync", "host op", "rng", "unsafe op", "dynamic shape",
    "mixing", "opaque". ``file`` and ``line`` are the user's; None and 0 where the source is unknown.
    """

    kind: str
    op: str
    file: str | None
    line: int
    reason: str
    cure: str

    def __str__(self) -> str:
        """One line ``file:line: kind: what``, then cause and cure."""
        place = f"{self.file}:{self.line}" if self.file is not None else "unknown file"
        return f"{place}: {self.kind}: {self.op}\n  {self.reason}\n  {self.cure}"


def message(what: str, where: str | None = None, why: str | None = None, cure: str | None = None) -> str:
    """The four parts of an error message, one a line; parts that are None are left out."""
    lines = [what]
    if where:
        lines.append(f"  at {where}")
    if why:
        lines.append(f"  {why}")
    if cure:
        lines.append(f"  {cure}")
    return "\n".join(lines)
