"""Tensors that no graph of pcg's can hold: it runs eagerly, counted, and the reason names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .places import name_of_input, place_of

_STRIDED = (torch.strided, torch.jagged)


def strange_tensor(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[str, str] | None:
    """Why a graph cannot be compiled, and where: the first tensor without strides of its own, an input or a result.

    Args:
        inputs: what Dynamo hands over with the graph.
    """
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        kind = _kind(value)
        if kind is not None:
            return f"input {name_of_input(node)} is {kind}: the graph runs eagerly", ""
    for node in gm.graph.nodes:
        kind = _kind(node.meta.get("example_value"))
        if kind is not None:
            return f"{node.name} gives {kind}: the graph runs eagerly", str(place_of(node))
    return None


def _kind(value: Any) -> str | None:
    if not isinstance(value, torch.Tensor):
        return None
    if value.is_nested:
        return "a nested tensor"
    if value.layout not in _STRIDED:
        return f"a tensor of layout {value.layout}"
    return "a quantized tensor" if value.is_quantized else None
