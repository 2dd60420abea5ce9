"""What models and configs declare that packed steps cannot serve."""

from __future__ import annotations

import inspect

from transformers.modeling_utils import PreTrainedModel

__all__ = ["declared_reason"]

#: Types of layers, as configs name them, in which a token sees others through causal attention alone, or not at all.
_LAYER_TYPES = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "attention", "dense", "mlp", "moe", "sparse"}
)
#: Rotary embeddings whose frequencies follow from the longest position of a call, whoever's it is.
_ROPE_BY_CALL = frozenset({"dynamic", "longrope"})


def declared_reason(model: PreTrainedModel) -> str | None:
    """Why packed requests would get other numbers, as far as the model or its config say so; or None."""
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        return f"{name} carries a state from token to token, which pages do not hold."
    types = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if types:
        return f"{name} has layers of type {', '.join(sorted(map(str, types)))}; pages hold keys and values alone."
    if getattr(config, "index_topk", None) is not None:
        return f"{name} selects the keys that a token sees by an index of its own."
    # Too few tokens of a trial would show it: it begins with the 8,192nd.
    if getattr(config, "attn_temperature_tuning", None) and not all(getattr(config, "no_rope_layers", None) or [1]):
        return f"{name} scales queries by positions that it counts by itself (attn_temperature_tuning)."
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {str(p.get("rope_type", p.get("type"))) for p in (rope, *rope.values()) if isinstance(p, dict)}
    if kinds & _ROPE_BY_CALL:
        return (
            f"the {min(kinds & _ROPE_BY_CALL)!r} rotary embedding of {name} follows the longest request of a step, "
            "so that a request would get other numbers in other company."
        )
    takes = inspect.signature(type(model).forward).parameters
    if "input_ids" in takes and "position_ids" not in takes:
        return f"{name} takes no position_ids: it counts positions by itself, through the packed requests."
    return None
