"""Paged attention as transformers calls it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...attention.base import encode_shape
from ...attention.layer import check_qkv
from ...errors import BatchError, message
from .masks import Sees

__all__ = ["attention", "rows_message"]


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Paged attention as transformers calls it.

    Args:
        query: ``[1, heads, tokens, head_dim]``. key, value: ``[1, kv_heads, tokens, head_dim]``, the new tokens only;
            values may have heads of another size, as with latent attention.
        attention_mask: what the mask function made (:class:`Sees`). It alone decides what a token sees, as in
            transformers' own eager attention: a model may pass a ``sliding_window`` that its mask does not have, or
            have one that it does not pass.

    Returns:
        ``[1, tokens, heads, head_dim]``, and no weights.

    Raises:
        BatchError: requests in rows instead of packed, a mask of the caller's, a cache of transformers', dropout,
            a bias, attention that is not causal or not over the tokens themselves.
    """
    if attention_mask is None and getattr(module, "is_causal", True) is False and not hasattr(module, "layer_idx"):
        # The tower that reads images: its tokens are no request's.
        options = {**kwargs, "is_causal": False}
        return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling, **options)
    # Each look at a shape takes Dynamo some 3 ms, in every layer of a model.
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    reason = _why_not_paged(module, of_query, of_key, of_value, attention_mask, dropout, kwargs)
    if reason is not None:
        raise BatchError(reason)
    if attention_mask.trial is not None:
        options = {**kwargs, "sliding_window": sliding_window, "softcap": softcap}
        return attention_mask.trial.attend(module, query, key, value, attention_mask, scaling, options), None
    heads, kv_heads, head_dim = of_query[1], of_key[1], of_query[3]
    # The transposes first: they undo those of the model, so Inductor need not ask whether there are two tokens.
    q, k, v = query.transpose(1, 2)[0], key.transpose(1, 2)[0], value.transpose(1, 2)[0]
    v_head_dim = of_value[3]
    if of_key != of_value or of_key[3] != head_dim or not q.dtype == k.dtype == v.dtype:
        check_qkv(q, k, v, heads, kv_heads, head_dim, v_head_dim)
    farthest = attention_mask.farthest
    window = None if farthest is None else farthest + 1
    scale = head_dim**-0.5 if scaling is None else float(scaling)
    cap, sinks = None if softcap is None else float(softcap), kwargs.get("s_aux")
    shape = encode_shape(
        heads, kv_heads, head_dim, window, cap, scale, q.dtype, True, attention_mask.chunk,
        None if v_head_dim == head_dim else v_head_dim, "auto", "" if sinks is None else "s",
    )  # fmt: skip
    if sinks is None:
        return torch.ops.pcg.paged_attention(q, k, v, module.layer_idx, shape).unsqueeze(0), None
    return torch.ops.pcg.paged_attention(q, k, v, module.layer_idx, shape, sinks).unsqueeze(0), None


def _why_not_paged(
    module: torch.nn.Module,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    attention_mask: Any,
    dropout: float,
    kwargs: dict[str, Any],
) -> str | None:
    """Why a call of attention is not what paged attention computes, or None."""
    name = type(module).__name__
    if query[0] != 1:
        return rows_message(name, query[0])
    if key[2] != query[2]:
        return message(
            f"{name} got {key[2]} keys for {query[2]} tokens",
            why="The step's cache holds the earlier keys, or the attention is not over the tokens themselves.",
            cure="Pass neither past_key_values nor use_cache=True.",
        )
    if not isinstance(attention_mask, Sees):
        return message(
            f"{name} got {'no' if attention_mask is None else 'an'} attention mask"
            + (" of transformers' mask functions" if attention_mask is None else " of another kind"),
            why="What a token sees follows from the step's batch, and from the rule that those functions are given.",
        )
    if attention_mask.nearest != 0 or kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        return f"{name} is not causal; paged attention is"
    if dropout and attention_mask.trial is None:
        return message(f"{name} has a dropout of {dropout}", why="Serving has none.", cure="Write: model.eval()")
    if kwargs.get("position_bias") is not None:
        return f"{name} passes position_bias, which paged attention does not have"
    if key[3] != query[3]:
        return f"{name} has queries of {query[3]} and keys of {key[3]} elements a head; they must agree"
    if getattr(module, "layer_idx", None) is None:
        return f"{name} has no layer_idx, so its place in the cache is unknown"
    return None


def rows_message(name: str, rows: int) -> str:
    """What a call with requests in rows gets."""
    return message(
        f"{name} got {rows} rows of tokens",
        why="Requests are packed into one row, whatever their lengths.",
        cure="Pass input_ids[None] and position_ids=batch.positions[None], both [1, tokens]",
    )
