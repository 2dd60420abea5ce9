"""Layers whose ``forward`` was replaced by one that does more than the layer: adapters go inside of that."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from ..errors import AdapterError

__all__ = ["has_forward_of_class", "opened_forward"]

#: What transformers' ``install_forward`` calls the method that it replaces (5.18 to 5.24).
_REPLACED = "original_forward"


def has_forward_of_class(module: nn.Module) -> bool:
    """Whether calling a module calls its class's ``forward``."""
    forward = vars(module).get("forward")
    return forward is None or _is_of_class(forward, module)


def opened_forward(name: str, module: nn.Module) -> Callable[[nn.Module], Callable[..., Any]]:
    """What makes of a module's own ``forward`` one that calls the module's class as it will be then.

    transformers' parallel styles replace ``module.forward`` by a function that brings the input to the rank, calls the
    method that was there, and sums up the ranks' results: adapters go inside of it.

    Returns:
        A function of the module that gives the new forward.

    Raises:
        AdapterError: a forward of which it is not known what it does with the class's.
    """
    forward = vars(module)["forward"]
    names = forward.__code__.co_freevars if inspect.isfunction(forward) else ()
    cells = dict(zip(names, forward.__closure__ or (), strict=True)) if names else {}
    original: Any = cells[_REPLACED].cell_contents if _REPLACED in cells else None
    if not _is_of_class(original, module):
        raise AdapterError(
            f"the forward of {name} was replaced by {getattr(forward, '__qualname__', forward)!r}",
            why="Adapters come before the ranks' results are summed up, and whether it does that is not known.",
            cure="Split the model by parallelize_module(model, ...), or by from_pretrained(..., tp_plan='auto').",
        )

    def opened(module: nn.Module) -> Callable[..., Any]:
        inside = {**cells, _REPLACED: CellType(MethodType(type(module).forward, module))}
        new = FunctionType(
            forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, tuple(inside.values())
        )
        new.__kwdefaults__, new.__qualname__ = forward.__kwdefaults__, forward.__qualname__
        return new

    return opened


def _is_of_class(function: Any, module: nn.Module) -> bool:
    """Whether it is the method that the module's class has for ``forward``."""
    return bool(function == MethodType(type(module).forward, module))
