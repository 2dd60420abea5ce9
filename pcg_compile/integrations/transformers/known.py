"""What is known of a model that was prepared for steps."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

__all__ = ["NAME", "Known", "known_of", "outermost", "parameters_of", "wants_pcg"]

#: What to pass as ``attn_implementation``.
NAME = "pcg"
#: Where the module keeps it.
_ATTRIBUTE = "pcg_known"


class Known:
    """What a trial has shown of one model: packed requests get the numbers that each gets alone.

    Attributes:
        config: the config of its text part, which names the attention that is used.
        names: names of forward's parameters, in order.
        trying: whether a trial is running in some thread.
        warned: whether a user was told that a mask costs a look at the device.
        offset: where the model's own positions begin, which is added to the step's: RoBERTa's begin at padding_idx + 1.
        layers: by ``layer_idx`` that the trial saw, key heads, and elements of a key's and of a value's.
    """

    def __init__(
        self, config: Any, names: tuple[str, ...], offset: int, layers: dict[int, tuple[int, int, int]]
    ) -> None:
        self.config, self.names, self.offset, self.layers = config, names, offset, layers
        self.trying = self.warned = False

    def keep(self, module: torch.nn.Module) -> None:
        """Makes it what :func:`known_of` finds for a module."""
        setattr(module, _ATTRIBUTE, self)


def known_of(module: torch.nn.Module) -> Known | None:
    """What is known of a module; None where it was not prepared."""
    found = vars(module).get(_ATTRIBUTE)
    return found if isinstance(found, Known) else None


def parameters_of(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of a forward's parameters, in order."""
    return tuple(inspect.signature(type(model).forward).parameters)[1:]


def wants_pcg(module: torch.nn.Module) -> bool:
    """Whether it is a model that takes tokens, and its text part has ``attn_implementation="pcg"``."""
    return (
        isinstance(module, PreTrainedModel)
        and module.config.get_text_config()._attn_implementation == NAME
        and not {"input_ids", "inputs_embeds"}.isdisjoint(parameters_of(module))
    )


def outermost(module: Any) -> Any:
    """The outermost model with ``attn_implementation="pcg"`` in a module (PEFT's, a compiled one), or None."""
    return next((inner for inner in module.modules() if wants_pcg(inner)), None)
