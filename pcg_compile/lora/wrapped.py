"""Layers whose ``forward`` was replaced by one that does more than the layer: adapters go inside of that."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from ..errors import AdapterError, message

__all__ = ["forward_with"]

#: What transformers' ``install_forward`` calls the method that it replaces (5.18 to 5.24).
_REPLACED = "original_forward"

Inner = Callable[[nn.Module, tuple[Any, ...], Any], Any]


def forward_with(name: str, module: nn.Module, add: Inner) -> Callable[..., Any] | None:
    """A module's own ``forward`` with ``add`` right behind the method of its class that it calls.

    transformers' parallel styles replace ``module.forward`` by a function that brings the input to the rank, calls the
    method that was there, and sums up the ranks' results: a hook would come too late.

    Args:
        add: called as ``add(module, args, output)`` like a forward hook; returns the output.

    Returns:
        The new forward, not yet set; None for a module with the forward of its class, where a hook does it.

    Raises:
        AdapterError: a forward of which it is not known what it does with the class's.
    """
    forward = vars(module).get("forward")
    if forward is None or _is_of_class(forward, module):
        return None
    names = forward.__code__.co_freevars if inspect.isfunction(forward) else ()
    cells = dict(zip(names, forward.__closure__ or (), strict=True)) if names else {}
    original: Any = cells[_REPLACED].cell_contents if _REPLACED in cells else None
    if not _is_of_class(original, module):
        raise AdapterError(
            message(
                f"the forward of {name} was replaced by {getattr(forward, '__qualname__', forward)!r}",
                why="Adapters come before the ranks' results are summed up, and whether it does that is not known.",
                cure="Split the model by parallelize_module(model, ...), or by from_pretrained(..., tp_plan='auto').",
            )
        )

    def with_adapters(*args: Any, **kwargs: Any) -> Any:
        return add(module, args, original(*args, **kwargs))

    cells[_REPLACED] = CellType(with_adapters)
    new = FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, tuple(cells.values())
    )
    new.__kwdefaults__, new.__qualname__ = forward.__kwdefaults__, forward.__qualname__
    return new


def _is_of_class(function: Any, module: nn.Module) -> bool:
    """Whether it is the method that the module's class has for ``forward``."""
    return bool(function == MethodType(type(module).forward, module))
