"""Python floats that change from call to call: the ops that read them run between pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..torch_compat.fake_tensors import is_real

#: Why such an op runs between pieces.
REASON = "a float that changes from call to call, which a capture would hold as it was; pass a tensor to capture it"


class _ReadsNumbers:
    """An op whose numbers are given as tensors on the CPU."""

    def __init__(self, body: fx.GraphModule, name: str) -> None:
        self.body = body
        self.__name__ = self.__qualname__ = name

    def __call__(self, *args: Any) -> Any:
        return self.body.forward(*args)


def isolate_numbers(gm: fx.GraphModule, floats: Mapping[str, float]) -> list[fx.Node] | None:
    """Rewrites each op that reads one of Dynamo's float inputs into one that is given the input; returns those.

    Args:
        floats: by the name of its placeholder the value of each float at the trace.

    Returns:
        The new nodes; None, and the graph as it was, where a float is a result of the graph itself.
    """
    numbers: dict[fx.Node, float | None] = {}
    readers: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target == "item" and getattr(node.args[0], "name", "") in floats:
            numbers[node] = floats[node.args[0].name]
        elif any(source in numbers for source in node.all_input_nodes):
            if node.op == "output":
                return None
            if isinstance(node.meta.get("example_value"), (torch.SymFloat, torch.SymInt, torch.SymBool)):
                numbers[node] = None
            else:
                readers.append(node)
    isolated = [_isolated(gm, node, numbers) for node in readers]
    for node in reversed(numbers):
        gm.graph.erase_node(node)
    return isolated


def _isolated(gm: fx.GraphModule, node: fx.Node, numbers: Mapping[fx.Node, float | None]) -> fx.Node:
    body = fx.Graph()
    inputs: dict[fx.Node, fx.Node] = {}

    def inside(source: fx.Node) -> fx.Node:
        if source in inputs:
            return inputs[source]
        if source.op == "get_attr":
            return body.node_copy(source)
        if source not in numbers:
            inputs[source] = made = body.placeholder(source.name)
        elif numbers[source] is not None:
            given = inside(source.all_input_nodes[0])
            made = body.call_function(_number, (given, numbers[source]))
        else:
            made = body.node_copy(source, inside)
        return made

    # Placeholders come first in a graph, and what they are shows only on the way.
    needed = _tensors_of(node, numbers)
    for source in needed:
        inside(source)
    body.output(body.node_copy(node, inside))
    function = _ReadsNumbers(fx.GraphModule(gm, body), str(getattr(node.target, "__name__", node.target)))
    with gm.graph.inserting_before(node):
        made = gm.graph.call_function(function, tuple(needed))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)
    return made


def _tensors_of(node: fx.Node, numbers: Mapping[fx.Node, float | None]) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    for source in node.all_input_nodes:
        if source in numbers:
            found.update(dict.fromkeys(_tensors_of(source, numbers)))
        elif source.op != "get_attr":
            found[source] = None
    return list(found)


def _number(given: torch.Tensor, example: float) -> Any:
    return given.item() if is_real(given) else example
