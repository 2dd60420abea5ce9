"""Which step is running in this thread or task."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol

import torch

__all__ = ["RUNNING", "Running"]


class Running(Protocol):
    """What a batch asks of the step that it is in; see :class:`pcg_compile.step_state.StepState`."""

    @property
    def batch(self) -> object:
        """The step's batch."""
        ...

    @property
    def outer(self) -> Running | None:
        """The step that it is inside of."""
        ...

    @property
    def closed(self) -> bool:
        """Whether it is over."""
        ...

    def user_positions(self) -> torch.Tensor:
        """``[tokens]`` int64."""
        ...

    def user_slots(self) -> torch.Tensor | None:
        """``[tokens]`` int64; None without a cache."""
        ...

    def user_ids(self) -> torch.Tensor:
        """``[tokens]`` int64."""
        ...


#: The running step of this thread or task.
RUNNING: ContextVar[Running | None] = ContextVar("pcg_step", default=None)
