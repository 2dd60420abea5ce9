"""Registers the attention implementation ``"pcg"`` with transformers.

    import pcg_compile.integrations.transformers
    model = AutoModelForCausalLM.from_config(config, attn_implementation="pcg")
    with pcg.step(batch, cache):
        logits = model(input_ids[None], position_ids=batch.positions[None]).logits

``input_ids`` and ``position_ids`` are ``[1, tokens]``, the requests of the batch one after the other; the model's own
code is unchanged. No mask is made, the paged cache tells what a token sees. ``use_cache`` is switched off in the
config of every model that is made with, or set to, this implementation, since the paged cache takes the place of
transformers' own; transformers has no hook for that, so its check of the implementation's name is wrapped. A model that
would give wrong numbers with packed requests is refused there (``OptionsError``), with the reason.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from typing import Any

import torch
import transformers
from transformers.modeling_utils import PreTrainedModel

from ..attention import PagedKVCache
from ..attention.base import encode_shape
from ..attention.layer import check_qkv
from ..errors import BatchError, OptionsError, message

__all__ = ["NAME", "attention", "cache_for"]

#: What to pass as ``attn_implementation``.
NAME = "pcg"

#: Types of layers, as configs name them, in which a token sees others through causal attention alone, or not at all.
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention", "dense", "mlp", "moe", "sparse"})
#: Rotary embeddings whose frequencies follow from the longest position of a call, whoever's it is.
_ROPE_BY_CALL = frozenset({"dynamic", "longrope"})
#: Models that attend several times a step under one layer_idx, each time with other keys or values.
_ATTEND_TWICE = frozenset({"diffllama", "hrm_text"})


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Paged attention as transformers calls it.

    Args:
        query: ``[1, heads, tokens, head_dim]``. key, value: ``[1, kv_heads, tokens, head_dim]``, the new tokens only.

    Returns:
        ``[1, tokens, heads, head_dim]``, and no weights.

    Raises:
        BatchError: requests in rows instead of packed, a mask, a cache of transformers', dropout, sinks, attention that
            is not causal or not over the tokens themselves.
    """
    # Each look at a shape takes Dynamo some 3 ms, in every layer of a model.
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    reason = _unsupported(module, of_query, of_key, of_value, attention_mask, dropout, kwargs)
    if reason is not None:
        raise BatchError(reason)
    heads, kv_heads, head_dim = of_query[1], of_key[1], of_query[3]
    # The transposes first: they undo those of the model, so that Inductor need not ask whether there are two tokens.
    q, k, v = query.transpose(1, 2)[0], key.transpose(1, 2)[0], value.transpose(1, 2)[0]
    if of_key != of_value or of_key[3] != head_dim or not q.dtype == k.dtype == v.dtype:
        check_qkv(q, k, v, heads, kv_heads, head_dim)
    scale = head_dim**-0.5 if scaling is None else float(scaling)
    shape = encode_shape(
        heads, kv_heads, head_dim, sliding_window, None if softcap is None else float(softcap), scale, q.dtype
    )
    return torch.ops.pcg.paged_attention(q, k, v, module.layer_idx, shape).unsqueeze(0), None


def _unsupported(
    module: torch.nn.Module,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    attention_mask: torch.Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> str | None:
    name = type(module).__name__
    if query[0] != 1:
        return message(
            f"{name} got {query[0]} rows of tokens",
            why="Requests are packed into one row, whatever their lengths.",
            cure="Pass input_ids[None] and position_ids=batch.positions[None], both [1, tokens]",
        )
    if key[2] != query[2]:
        return message(
            f"{name} got {key[2]} keys for {query[2]} tokens",
            why="The step's cache holds the earlier keys, or the attention is not over the tokens themselves.",
            cure="Pass neither past_key_values nor use_cache=True.",
        )
    if attention_mask is not None:
        return message(f"{name} got an attention mask", why="What a token sees follows from the step's batch alone.")
    if dropout:
        return message(f"{name} has a dropout of {dropout}", why="Serving has none.", cure="Write: model.eval()")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        return f"{name} is not causal; paged attention is"
    for extra in ("s_aux", "position_bias"):
        if kwargs.get(extra) is not None:
            return f"{name} passes {extra}, which paged attention does not have"
    if value[3] != query[3]:
        return f"{name} has keys of {query[3]} and values of {value[3]} elements a head; they must agree"
    if getattr(module, "layer_idx", None) is None:
        return f"{name} has no layer_idx, so that its place in the cache is unknown"
    return None


def cache_for(
    model: Any,
    num_pages: int,
    page_size: int = 16,
    max_requests: int = 256,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> PagedKVCache:
    """A cache that fits a model, or the model of a config.

    Args:
        model: a transformers model or config. num_pages: pages a layer, page 0 included.
        page_size, max_requests: as :class:`PagedKVCache` takes them.
        dtype, device: the model's where None; for a config its dtype, and torch's defaults.

    Raises:
        OptionsError: a size out of range, a model without attention heads.
    """
    config = getattr(model, "config", model).get_text_config()
    if isinstance(model, torch.nn.Module):
        parameter = next(model.parameters())
        dtype, device = dtype or parameter.dtype, device if device is not None else parameter.device
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise OptionsError(f"{type(config).__name__} has no num_attention_heads, so that there is nothing to cache")
    # With latent attention, config.head_dim is its rotary part.
    head_dim = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    return PagedKVCache(
        config.num_hidden_layers,
        num_pages,
        page_size,
        max_requests,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        dtype=dtype or getattr(config, "dtype", None),
        device=device,
    )


def _why_not(model: PreTrainedModel) -> str | None:
    """Why a token of ``model`` would depend on more than its request's tokens, their positions and the paged cache."""
    name, config = type(model).__name__, model.config.get_text_config()
    module = sys.modules.get(type(model).__module__)
    try:
        source = "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):
        source = ""
    if re.search(r"^class \w*Attention\w*\(", source, re.M) and "ALL_ATTENTION_FUNCTIONS" not in source:
        return f"{name} computes attention by itself, whatever attn_implementation says."
    if getattr(model, "_is_stateful", False):
        return f"{name} carries a state from token to token, which pages do not hold."
    types = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if types:
        return f"{name} has layers of type {', '.join(sorted(map(str, types)))}; pages hold keys and values alone."
    if getattr(config, "index_topk", None) is not None:
        return f"{name} selects the keys that a token sees by an index of its own."
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
    if config.model_type in _ATTEND_TWICE or _loops_over_layers(type(model).forward):
        return f"{name} attends several times with one layer_idx, and a page holds one key and value a layer."
    return None


def _loops_over_layers(forward: Any) -> bool:
    """Whether a model passes through its layers again and again: a loop over ``self.layers`` within a loop."""
    try:
        source = textwrap.dedent(inspect.getsource(forward))
    except (OSError, TypeError):
        return False
    open_nodes: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while open_nodes:
        node, inside = open_nodes.pop()
        if isinstance(node, ast.For) and inside and re.search(r"\bself\.layers\b", ast.unparse(node.iter)):
            return True
        inside = inside or isinstance(node, (ast.For, ast.While))
        open_nodes += [(child, inside) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
    return False


def _switch_cache_off(check: Any) -> Any:
    """Wraps the method that every model passes the name of its attention through, when made and when it is set."""

    @functools.wraps(check)
    def checked(self: PreTrainedModel, requested: str | None, *args: Any, **kwargs: Any) -> str:
        name = check(self, requested, *args, **kwargs)
        if name == NAME:
            reason = _why_not(self)
            if reason is not None:
                raise OptionsError(
                    message(
                        f'attn_implementation="pcg" would give wrong numbers with {type(self).__name__}',
                        why=reason,
                        cure='Use another attn_implementation, such as "sdpa", without pcg.step().',
                    )
                )
            self.config.use_cache = False
        return name

    checked.__pcg__ = True  # type: ignore[attr-defined]
    return checked


def _register() -> None:
    transformers.AttentionInterface.register(NAME, attention)
    check = PreTrainedModel.get_correct_attn_implementation
    if not getattr(check, "__pcg__", False):
        PreTrainedModel.get_correct_attn_implementation = _switch_cache_off(check)


_register()
