"""The forward hook that adds adapters to a layer, and what a copy of the layer has in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import BatchError, message
from ..step import current_step
from .shards import own_tensors

__all__ = ["AdapterHook", "hook_of_a_copy"]


class AdapterHook:
    """Adds each token's adapter to a layer's output. It belongs to the layer that its pool loads adapters into."""

    def __init__(self, router: Any) -> None:
        self.router = router

    def __call__(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:
            y, x = own_tensors(module, output, args[0])
            torch.ops.pcg.lora(y, x, module.pcg_lora_factors, module.pcg_lora_layout)
        elif not torch.compiler.is_compiling():
            _refuse_gradients()
        return output

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What a deep copy and a pickle have in its place."""
        return _copied, ()


def _copied() -> Callable[..., None]:
    return hook_of_a_copy


def hook_of_a_copy(module: Any, args: Any, output: torch.Tensor) -> None:
    """A copied layer is the base model's: its pool knows nothing of it, and loads no adapter into it."""
    if not torch.compiler.is_compiling():
        state = current_step()
        adapters = None if state is None else state.batch.adapters
        if isinstance(adapters, torch.Tensor) or any(adapters or ()):
            raise BatchError(
                message(
                    "the batch names adapters, and the model is a copy of the one that their pool was made on",
                    cure="Make a pool for the copy: AdapterPool(copy, ...)",
                )
            )


def _refuse_gradients() -> None:
    """Gradients of the base model are the caller's business, those of a batch with adapters would be wrong."""
    state = current_step()
    if state is not None and state.batch.adapters is not None:
        raise BatchError(
            message("the batch names adapters, and gradients are enabled", cure="Call it in torch.no_grad().")
        )
