"""What is known of a model that has ``attn_implementation="pcg"``."""

from __future__ import annotations

from typing import Any

import torch

from .counted import counts_positions

__all__ = ["NAME", "Known", "known_of"]

#: What to pass as ``attn_implementation``.
NAME = "pcg"
#: Where the module keeps it.
_ATTRIBUTE = "pcg_known"


class Known:
    """What is known of one model.

    Attributes:
        config: the config of its text part, which names the attention that is used.
        names: names of forward's parameters, in order.
        proven: whether a trial has shown that the model computes with packed requests what it computes with one.
        trying: whether a trial is running in some thread.
        warned: whether a user was told that a mask costs a look at the device.
        offset: where the model's own positions begin, which is added to the step's: RoBERTa's begin at padding_idx + 1.
        image_blocks: whether ``token_type_ids`` say which tokens see each other.
        counts: whether layers count positions by themselves, from the cache that the call is given.
        layers: by ``layer_idx`` that the trial saw, key heads, and elements of a key's and of a value's.
    """

    #: A saved program does not compare what changes as the model runs.
    changes_in_calls = True

    def __init__(self, config: Any, names: tuple[str, ...]) -> None:
        self.config, self.names = config, names
        self.proven = self.trying = self.warned = False
        self.offset = 0
        self.image_blocks = False
        self.counts = counts_positions(config)
        self.layers: dict[int, tuple[int, int, int]] = {}

    def keep(self, module: torch.nn.Module) -> None:
        """Makes it what :func:`known_of` finds for a module."""
        setattr(module, _ATTRIBUTE, self)


def known_of(module: torch.nn.Module) -> Known | None:
    """What is known of a module; None where it is no model, or never had ``attn_implementation="pcg"``."""
    found = vars(module).get(_ATTRIBUTE)
    return found if isinstance(found, Known) else None
