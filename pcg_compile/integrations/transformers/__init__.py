"""Registers the attention implementation ``"pcg"`` with transformers.

    import pcg_compile.integrations.transformers
    model = AutoModelForCausalLM.from_config(config, attn_implementation="pcg")
    with pcg.step(batch, cache):
        logits = model(input_ids[None], position_ids=batch.positions[None]).logits

``input_ids`` and ``position_ids`` are ``[1, tokens]``, the requests of the batch one after the other; the model's own
code is unchanged. ``position_ids`` that are left out are the step's. What a token sees follows from the model's masks,
of which the rule is read and no tensor made, and from the paged cache, which takes the place of transformers' own. A
model that packed requests would get wrong numbers from is refused with an ``OptionsError`` that says why: when it is
made, where its structure tells, else by ``cache_for`` or in its first step, where it is tried with a few tokens.

transformers has no hook for a model that is made with an implementation, so its check of the implementation's name is
wrapped.
"""

from __future__ import annotations

import functools
from typing import Any

import transformers
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import PreTrainedModel

from ..generation import accelerate, generate_batch
from .attention import attention
from .caches import cache_for
from .early import prepare
from .images import image_groups
from .known import NAME
from .masks import read_mask

__all__ = ["NAME", "accelerate", "attention", "cache_for", "generate_batch", "image_groups"]


def _prepare_after(check: Any) -> Any:
    """Wraps the method that every model passes the name of its attention through, when made and when it is set."""

    @functools.wraps(check)
    def checked(self: PreTrainedModel, requested: str | None, *args: Any, **kwargs: Any) -> str:
        name = check(self, requested, *args, **kwargs)
        # A model around the text part makes the masks of both.
        if name == NAME or self.config.get_text_config()._attn_implementation == NAME:
            prepare(self)
        return name

    checked.__pcg__ = True  # type: ignore[attr-defined]
    return checked


def _register() -> None:
    transformers.AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, read_mask)
    check = PreTrainedModel.get_correct_attn_implementation
    if not getattr(check, "__pcg__", False):
        PreTrainedModel.get_correct_attn_implementation = _prepare_after(check)


_register()
