"""What a safety rule finds, and what it must know of the tensors it looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pcg_compile.errors import Hazard
from pcg_compile.fx.facts import OpCall, tensors_in
from pcg_compile.fx.places import Place

__all__ = ["Finding", "Memory", "hazard_at", "made_from_data", "tensor_arguments"]


@dataclass(frozen=True)
class Finding:
    """What a CUDA graph cannot hold: ``kind`` as in :class:`pcg_compile.errors.Hazard`, the reason, and the cure."""

    kind: str
    reason: str
    cure: str


def hazard_at(place: Place, finding: Finding, op: str) -> Hazard:
    """A finding at a line of the user's; where that called a library, the reason names the library's line too."""
    reason = f"{finding.reason} (in the library, {place.library})" if place.library else finding.reason
    return Hazard(finding.kind, op, place.file, place.line, reason, finding.cure)


class Memory(Protocol):
    """Where tensors lie, seen from the capture device."""

    #: The capture device.
    device: torch.device

    def on_host(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in host memory, beside the capture device."""

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor is known to be page-locked."""


def made_from_data() -> Finding:
    """Python data put on the device."""
    return Finding(
        "host copy",
        "it makes a tensor of Python numbers, which are copied from the host",
        "Make it once, as a buffer: self.register_buffer(name, torch.tensor(...)); or fill it on the device: "
        "torch.full((1,), 5, device=x.device)",
    )


def tensor_arguments(call: OpCall) -> list[torch.Tensor]:
    """The tensors among an op's arguments."""
    return list(tensors_in((call.args, dict(call.kwargs))))
