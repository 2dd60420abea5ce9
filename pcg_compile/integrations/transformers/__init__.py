"""Registers the attention implementation ``"pcg"`` with transformers.

    import pcg_compile.integrations.transformers
    model = AutoModelForCausalLM.from_config(config, attn_implementation="pcg")
    with pcg.step(batch, cache):
        logits = model(input_ids[None], position_ids=batch.positions[None]).logits

``input_ids`` and ``position_ids`` are ``[1, tokens]``, the requests of the batch one after the other; the model's own
code is unchanged. ``position_ids`` that are left out are the step's. What a token sees follows from the rules of the
model's masks, which are read without making a tensor, and from the paged cache, which replaces transformers' own. A
model that would give packed requests wrong numbers is refused with an ``OptionsError`` that says why: when it is made,
if its class and config tell, else by ``cache_for`` or in its first step, which try it with a few tokens.

Importing registers the functions for attention and masks with transformers, and a hook with torch.nn that sees models
as they are made. A model that ``set_attn_implementation`` was called on is prepared by ``cache_for``.
"""

from __future__ import annotations

import transformers
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.masking_utils import AttentionMaskInterface

from ..generation import accelerate, generate_batch
from .attention import attention
from .caches import cache_for
from .early import prepare_while_made
from .images import image_groups
from .known import NAME
from .masks import read_mask

__all__ = ["NAME", "accelerate", "attention", "cache_for", "generate_batch", "image_groups"]

transformers.AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, read_mask)
register_module_module_registration_hook(prepare_while_made)
