"""Tensors of Dynamo's graph: attributes that become inputs, and kinds of tensors that no graph can hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import fx

from .places import name_of_input, place_of


def attributes_as_inputs(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """A graph with its tensor attributes as further inputs, and those tensors; the graph itself where it has none.

    Dynamo makes attributes of weights where it is told to (``torch._dynamo.config.install_free_tensors``,
    ``prepare_freezing``). As inputs they are bound by address and never copied, as weights are that Dynamo passes.
    Modules that are attributes, such as the branches of a ``cond``, stay.
    """
    found: dict[str, torch.Tensor] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value: Any = reduce(getattr, str(node.target).split("."), gm)
        if isinstance(value, torch.Tensor):
            found[str(node.target)] = value
    if not found:
        return gm, []
    graph = fx.Graph()
    placeholders = gm.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, fx.Node] = {node: graph.node_copy(node) for node in placeholders}
    given: dict[str, fx.Node] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in found:
            continue
        if name not in given:
            given[name] = made = graph.placeholder(node.name)
            made.meta = {**node.meta, "tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
        copies[node] = given[name]
    for node in gm.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    lifted = fx.GraphModule(gm, graph)
    lifted.meta.update(gm.meta)
    return lifted, list(found.values())


#: Layouts of tensors that have strides.
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
