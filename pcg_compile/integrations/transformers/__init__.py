"""Registers the attention implementation ``"pcg"`` with transformers.

    import pcg_compile.integrations.transformers
    model = AutoModelForCausalLM.from_config(config, attn_implementation="pcg")
    cache = cache_for(model, num_pages=64)
    with pcg.step(batch, cache):
        logits = model(input_ids[None], position_ids=batch.positions[None]).logits

``input_ids`` and ``position_ids`` are ``[1, tokens]``, the requests of the batch one after the other; the model's own
code is unchanged. ``position_ids`` that are left out are the step's. What a token sees follows from the model's masks,
of which the rule is read and no tensor made, and from the paged cache, which takes the place of transformers' own.

:func:`cache_for`, :func:`generate_batch` and :func:`prepare` try a model with a few tokens, once, and refuse one that
packed requests would get wrong numbers from with an ``OptionsError`` that says why. A model that nobody prepared raises
in its first call.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers.masking_utils import AttentionMaskInterface

from ...errors import OptionsError, message
from ..generation import accelerate, generate_batch
from .attention import attention
from .caches import cache_for
from .known import NAME, outermost
from .masks import read_mask
from .trial import prove

__all__ = ["NAME", "accelerate", "attention", "cache_for", "generate_batch", "prepare"]

transformers.AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, read_mask)


def prepare(model: Any) -> None:
    """Prepares a model with ``attn_implementation="pcg"`` for steps; :func:`cache_for` does that too.

    Raises:
        OptionsError: it has another attention, or packed requests would get wrong numbers from it.
    """
    served = outermost(model)
    if served is None:
        name = type(model).__name__
        raise OptionsError(message(f"{name} does not attend through pcg", cure='model.set_attn_implementation("pcg")'))
    prove(served)
