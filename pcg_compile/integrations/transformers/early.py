"""Looks at a model while it is made: gives it the hook, or refuses it."""

from __future__ import annotations

import copy
import inspect
import sys
from contextvars import ContextVar
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from ...errors import OptionsError
from .arguments import Arguments
from .counted import counts_positions
from .images import has_image_blocks
from .known import NAME, Known, known_of
from .trial import refused

__all__ = ["prepare_while_made", "served_model"]

#: Types of layers, as configs name them, in which a token sees others through causal attention alone, or not at all.
_LAYER_TYPES = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "attention", "dense", "mlp", "moe", "sparse"}
)
#: Rotary embeddings whose frequencies follow from the longest position of a call, whoever's it is.
_ROPE_BY_CALL = frozenset({"dynamic", "longrope"})

#: Whether a copy on the meta device is being made in this thread or task.
_COPYING: ContextVar[bool] = ContextVar("pcg_copying", default=False)


def prepare_while_made(module: torch.nn.Module, name: str, submodule: Any) -> None:
    """Prepares a model when its first submodule is registered: ahead of its layers, which look their attention up.

    A hook of :func:`torch.nn.modules.module.register_module_module_registration_hook`.

    Raises:
        OptionsError: packed requests would get other numbers than each alone, as far as its class and config tell.
    """
    if not isinstance(module, PreTrainedModel) or _COPYING.get():
        return
    if _is_to_use_pcg(module) and next(module.children(), None) is None:
        prepare(module)
        reason = _by_copy(module)
        if reason is not None:
            raise OptionsError(refused(type(module).__name__, reason))


def served_model(module: torch.nn.Module) -> Any:
    """The outermost model with ``attn_implementation="pcg"`` in a module (PEFT's, a compiled one), or None.

    One that ``set_attn_implementation`` was called on is prepared here.

    Raises:
        OptionsError: see :func:`prepare_while_made`.
    """
    models = [one for one in module.modules() if isinstance(one, PreTrainedModel) and _is_to_use_pcg(one)]
    for model in models:
        if known_of(model) is None:
            prepare(model)
    return next((model for model in models if known_of(model) is not None), None)


def _is_to_use_pcg(model: PreTrainedModel) -> bool:
    # A model around the text part makes the masks of both.
    return NAME in (model.config._attn_implementation, model.config.get_text_config()._attn_implementation)


def prepare(model: PreTrainedModel) -> None:
    """Gives a model with ``attn_implementation="pcg"``, itself or its text part, the hook that completes its calls.

    Raises:
        OptionsError: packed requests would get other numbers than each alone.
    """
    reason = _by_config(model)
    if reason is not None:
        raise OptionsError(refused(type(model).__name__, reason))
    model.config.use_cache = False
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    if known_of(model) is None and not {"input_ids", "inputs_embeds"}.isdisjoint(names):
        known = Known(model.config.get_text_config(), names)
        known.image_blocks = "token_type_ids" in names and has_image_blocks(model)
        known.keep(model)
        model.register_forward_pre_hook(Arguments(known), with_kwargs=True)


def _by_config(model: PreTrainedModel) -> str | None:
    """What the model or its config say by themselves."""
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        return f"{name} carries a state from token to token, which pages do not hold."
    types = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if types:
        return f"{name} has layers of type {', '.join(sorted(map(str, types)))}; pages hold keys and values alone."
    if getattr(config, "index_topk", None) is not None:
        return f"{name} selects the keys that a token sees by an index of its own."
    takes = inspect.signature(type(model).forward).parameters
    # Too few tokens of a trial would show it: it begins with the 8,192nd.
    if counts_positions(config) and "cache" not in takes:
        return f"{name} scales queries by positions that it counts by itself (attn_temperature_tuning)."
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {str(p.get("rope_type", p.get("type"))) for p in (rope, *rope.values()) if isinstance(p, dict)}
    if kinds & _ROPE_BY_CALL:
        return (
            f"the {min(kinds & _ROPE_BY_CALL)!r} rotary embedding of {name} follows the longest request of a step, "
            "so a request would get other numbers in other company."
        )
    if "input_ids" in takes and "position_ids" not in takes:
        return f"{name} takes no position_ids: it counts positions by itself, through the packed requests."
    return None


def _by_copy(model: PreTrainedModel) -> str | None:
    """Reason why a model whose module holds classes of attention by name cannot be made, or None."""
    if not any(_are_attention_classes(value) for value in vars(sys.modules[type(model).__module__]).values()):
        return None
    error = _error_of_copy(model, NAME)
    if error is None or _error_of_copy(model, "eager") is not None:
        return None
    name = type(model).__name__
    return f"{name} chooses its attention by itself, and does not know this one: {type(error).__name__}: {error}"


def _are_attention_classes(value: Any) -> bool:
    return isinstance(value, dict) and "eager" in value and NAME not in value and isinstance(value["eager"], type)


def _error_of_copy(model: PreTrainedModel, implementation: str) -> Exception | None:
    """What a constructor raises, called for the meta device, where tensors have no memory."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = implementation
    token = _COPYING.set(True)
    try:
        with torch.device("meta"):
            type(model)(config)
    except Exception as error:  # A constructor may raise anything; the same with "eager" tells whether "pcg" is why.
        return error
    finally:
        _COPYING.reset(token)
    return None
