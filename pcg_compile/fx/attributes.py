"""Tensors that are attributes of Dynamo's graph, made inputs of it."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import fx


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
