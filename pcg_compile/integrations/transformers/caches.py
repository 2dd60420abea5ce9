"""A cache that fits a model."""

from __future__ import annotations

from typing import Any

import torch

from ...attention import PagedKVCache
from ...errors import OptionsError, message
from .early import served_model
from .known import known_of
from .trial import prove

__all__ = ["cache_for"]


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

    A model with ``attn_implementation="pcg"`` is called with a few tokens, once. What its layers store decides the
    cache's shape, and a model that would give packed requests wrong numbers is refused.

    Args:
        model: a transformers model or config. num_pages: pages a layer, page 0 included.
        page_size, max_requests: as :class:`PagedKVCache` takes them.
        dtype, device: the model's where None; for a config its dtype, and torch's defaults.

    Raises:
        OptionsError: a size out of range, a model without attention heads, one whose layers differ in key heads or in
            elements a head, one that would give packed requests wrong numbers.
    """
    config = getattr(model, "config", model).get_text_config()
    layers: dict[int, tuple[int, int, int]] = {}
    if isinstance(model, torch.nn.Module):
        parameter = next(model.parameters())
        dtype, device = dtype or parameter.dtype, device if device is not None else parameter.device
        layers = _layers_of(model)
    if layers:
        number, shapes = max(layers) + 1, sorted(set(layers.values()))
        if len(shapes) > 1:
            raise OptionsError(_differ(config, "keys of " + " and ".join(f"{h} heads of {d}" for h, d, _ in shapes)))
        ((kv_heads, head_dim, v_head_dim),) = shapes
    else:
        number, kv_heads, head_dim, v_head_dim = _by_config(config)
    return PagedKVCache(
        number,
        num_pages,
        page_size,
        max_requests,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        dtype=dtype or _dtype_of(config),
        device=device,
    )


def _layers_of(model: torch.nn.Module) -> dict[int, tuple[int, int, int]]:
    served = served_model(model)
    if served is None or any(parameter.is_meta for parameter in served.parameters()):
        return {}
    prove(served)
    known = known_of(served)
    return known.layers if known is not None else {}


def _by_config(config: Any) -> tuple[int, int, int, int]:
    """Layers, key heads, elements of a key's and of a value's, as far as a config tells."""
    heads = _field(config, "num_attention_heads")
    if heads is None:
        raise OptionsError(f"{type(config).__name__} has no num_attention_heads, so there is nothing to cache")
    kv_heads = _field(config, "num_key_value_heads") or heads
    # With latent attention, config.head_dim is its rotary part.
    latent = _field(config, "qk_head_dim")
    head_dim = latent or _field(config, "head_dim") or config.hidden_size // heads
    return config.num_hidden_layers, kv_heads, head_dim, (latent and _field(config, "v_head_dim")) or head_dim


def _field(config: Any, name: str) -> Any:
    """A field that all layers share, or None.

    A config whose layers differ in it raises, or has a list by layer; Gemma 4 has another name for some of its layers.
    """
    try:
        value = getattr(config, name, None)
    except RuntimeError as error:
        raise OptionsError(_differ(config, name)) from error
    if isinstance(value, (list, tuple)):
        if len(set(value)) > 1:
            raise OptionsError(_differ(config, name))
        value = value[0] if value else None
    try:
        other = getattr(config, f"global_{name}", None)
    except RuntimeError as error:
        raise OptionsError(_differ(config, name)) from error
    if isinstance(other, int) and not isinstance(other, bool) and other != value:
        raise OptionsError(_differ(config, name))
    return value


def _differ(config: Any, what: str) -> str:
    return message(
        f"the layers of {type(config).__name__} differ: {what}",
        why="A PagedKVCache has one number of key heads, and of elements a head, for all layers.",
        cure='Use another attn_implementation, such as "sdpa", without pcg.step().',
    )


def _dtype_of(config: Any) -> torch.dtype | None:
    """A config's dtype, which may be a name in one that was read from a file."""
    dtype = getattr(config, "dtype", None)
    return getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
