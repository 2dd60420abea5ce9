"""The only file that names a private part of torch; each with the versions that it was read in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["FakeTensor", "FakeTensorMode", "fake_mode_of", "python_dispatcher"]


def fake_mode_of(inputs: Sequence[Any]) -> FakeTensorMode:
    """The fake mode of Dynamo's trace (2.11 to 2.13), or a fresh one that allows real tensors."""
    mode = detect_fake_mode(list(inputs))
    return mode if mode is not None else FakeTensorMode(allow_non_fake_inputs=True)


def python_dispatcher() -> AbstractContextManager[Any]:
    """Makes symbolic shapes pass through ops that decompose in C++ (2.11 to 2.13)."""
    return enable_python_dispatcher()
