"""What a model gets for an attention mask: what its tokens see, as a rule, and never a tensor.

A step packs requests, so no rectangular mask exists. :func:`read_mask` is registered as the mask function of
``attn_implementation="pcg"``: it reads the rule that transformers builds masks from, and returns what the rule says as
a :class:`Sees`, which the model hands to its attention like any mask.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch

from ...errors import BatchError, message
from .rules import read_rule

__all__ = ["STEP_MASK", "TRIAL", "Sees", "StepMask", "read_mask"]

#: The trial that runs in this thread or task.
TRIAL: ContextVar[Any] = ContextVar("pcg_trial", default=None)


class _NoTensor:
    """Base of what stands for a mask; anything that a model computes with it is an error."""

    #: What it is, for messages.
    what = "the mask"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise BatchError(_computes_with(f"{self.what}.{name}"))

    def _refuse(self, *args: Any) -> Any:
        raise BatchError(_computes_with(self.what))

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __invert__ = __and__ = __rand__ = __or__ = _refuse
    __hash__ = object.__hash__


def _computes_with(what: str) -> str:
    return message(
        f"the model computes with {what} by itself",
        why="Requests are packed, so a step has no such mask: what a token sees follows from the batch.",
        cure='Use another attn_implementation, such as "sdpa", without pcg.step().',
    )


class StepMask(_NoTensor):
    """Passed to the model as ``attention_mask``: the batch of the running step tells what exists.

    transformers' mask functions look at its form, which is that of a mask that is prepared already.

    Attributes:
        trial: the :class:`~.trial.Trial` that it is part of, or None in a step.
    """

    what = "attention_mask"
    #: Where the one of every step is found: for graphs it is a constant.
    constant_name = f"{__name__}.STEP_MASK"
    shape = (1, 1, 0, 0)
    ndim = 4

    def __init__(self, trial: Any = None) -> None:
        self.trial = trial

    def dim(self) -> int:
        """Number of dimensions, as a tensor's."""
        return 4

    def to(self, *args: Any, **kwargs: Any) -> StepMask:
        """Itself: it is on no device."""
        return self

    def cumsum(self, dim: int) -> NoPadding:
        """Where transformers begins to count the padding on the left, which the chunks of a request begin behind."""
        return NoPadding()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 0 if function is torch.zeros_like else NotImplemented


class NoPadding:
    """The padding on the left of each row: none. It stands for the tensors that transformers computes that with."""

    __hash__ = object.__hash__

    def __eq__(self, other: Any) -> Any:
        return self

    def sum(self, dim: int) -> NoPadding:
        """Over the tokens."""
        return self

    def __getitem__(self, row: Any) -> int:
        return 0


#: The mask of every step. One object, so graphs have nothing to guard.
STEP_MASK = StepMask()


class Sees(_NoTensor):
    """What tokens of one layer see, by the distance between query and key.

    Attributes:
        nearest, farthest: smallest and largest ``q - kv`` that is seen; None for no limit. Causal attention has
            ``nearest == 0``; a window of ``w`` tokens has ``farthest == w - 1``.
        chunk: a token sees only its own chunk of as many positions; None for all.
        trial: the :class:`~.trial.Trial` that it is part of, or None in a step.
    """

    what = "its attention mask"

    def __init__(self, nearest: int | None, farthest: int | None, chunk: int | None = None, trial: Any = None) -> None:
        self.nearest, self.farthest, self.chunk, self.trial = nearest, farthest, chunk, trial


def read_mask(*args: Any, mask_function: Any = None, attention_mask: Any = None, **kwargs: Any) -> Sees:
    """The mask function of ``attn_implementation="pcg"``, as transformers calls it.

    Args:
        mask_function: the rule, a function of batch, head, query and key. attention_mask: a :class:`StepMask`.

    Raises:
        BatchError: a rule that is no range of distances, or a mask that hides what the batch does not.
    """
    if isinstance(attention_mask, StepMask):
        trial = attention_mask.trial
    else:
        trial = TRIAL.get()
        if trial is None:
            raise BatchError(
                message(
                    "a mask was made outside of the model's call"
                    if attention_mask is None
                    else "a mask was made from an attention_mask",
                    why="Requests are packed: what a token sees follows from the batch of the running step.",
                    cure="Call the model itself, model(...), and pass no attention_mask.\n"
                    '  After model.set_attn_implementation("pcg"), make its cache with cache_for(model, ...).',
                )
            )
    return Sees(*read_rule(mask_function), trial)
