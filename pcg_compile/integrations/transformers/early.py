"""Looks at a model while it is made: gives it the hook, or refuses what no call could serve."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from ...errors import OptionsError
from .arguments import Arguments
from .counted import counts_positions
from .images import has_image_blocks
from .known import NAME, Known, known_of
from .trial import refusal, refused

__all__ = ["prepare"]

#: Types of layers, as configs name them, in which a token sees others through causal attention alone, or not at all.
_LAYER_TYPES = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "attention", "dense", "mlp", "moe", "sparse"}
)
#: Rotary embeddings whose frequencies follow from the longest position of a call, whoever's it is.
_ROPE_BY_CALL = frozenset({"dynamic", "longrope"})

#: Whether a copy on the meta device is being made in this thread, and the config of the last.
_COPYING: ContextVar[bool] = ContextVar("pcg_copying", default=False)
_COPIED: ContextVar[weakref.ref[Any] | None] = ContextVar("pcg_copied", default=None)


def prepare(model: PreTrainedModel) -> None:
    """Prepares a model that is being made with, or set to, ``attn_implementation="pcg"``, itself or its text part.

    Raises:
        OptionsError: packed requests would get other numbers than each alone.
    """
    reason = _by_config(model) or _by_copy(model)
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
            "so that a request would get other numbers in other company."
        )
    if "input_ids" in takes and "position_ids" not in takes:
        return f"{name} takes no position_ids: it counts positions by itself, through the packed requests."
    return None


def _by_copy(model: PreTrainedModel) -> str | None:
    """What a copy on the meta device shows: whether it can be made at all, and how its layers attend."""
    last = _COPIED.get()
    if _COPYING.get() or (last is not None and any(config is model.config for config in _configs(last()))):
        return None
    kind, token = type(model), _COPYING.set(True)
    try:
        copied = _copy(kind, model.config, NAME)
        if isinstance(copied, Exception):
            if not isinstance(_copy(kind, model.config, "eager"), Exception):
                return (
                    f"{kind.__name__} chooses its attention by itself, and does not know this one: "
                    f"{type(copied).__name__}: {copied}"
                )
        else:
            reason, _ = refusal(copied, structure=True)
            if reason is not None:
                return reason
    finally:
        _COPYING.reset(token)
    _COPIED.set(weakref.ref(model.config))
    return None


def _copy(kind: Any, config: Any, implementation: str) -> Any:
    """A model of a config without memory, or the error."""
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    try:
        with torch.device("meta"):
            return kind(config).eval()
    except Exception as error:  # Whatever a constructor raises: that the same without "pcg" does not is the verdict.
        return error


def _configs(config: Any) -> Iterator[Any]:
    """A config and those inside of it."""
    if config is None:
        return
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        yield from _configs(getattr(config, name, None))
