"""Graphs that are not captured at all: what runs instead, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .attention.ops import refuse_gradients as refuse_gradients_of_attention
from .fx.contexts import region_without_gradients, switches_gradients_on
from .fx.facts import NodeFacts, squeezed_sizes
from .fx.graph_inputs import strange_tensor
from .fx.places import name_of_input
from .fx.splitting import op_names
from .torch_compat.inductor import compile_all_with_inductor
from .torch_compat.subclasses import is_subclass

__all__ = ["Uncaptured", "refuse_gradients", "refuse_squeezed_sizes", "refuse_strange_tensors"]


class Uncaptured(Exception):
    """A stage found that a graph cannot be captured. Its arguments: (what runs instead, reason, where).

    Each call is counted with the reason; "" where what runs instead is an error.
    """

    def __init__(self, function: Callable[..., Any], reason: str, where: str = "") -> None:
        super().__init__(function, reason, where)


def refuse_strange_tensors(source: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Raises :class:`Uncaptured` for a graph with tensors that have no strides of their own."""
    strange = strange_tensor(source, inputs)
    if strange is not None and _requires_grad(source, inputs) is None:
        raise Uncaptured(source.forward, *strange)


def refuse_squeezed_sizes(source: fx.GraphModule, facts: Mapping[fx.Node, NodeFacts]) -> None:
    """Raises :class:`Uncaptured` where a dynamic size is squeezed, and is 1.

    Comparing makes guards, so another graph serves the sizes where a squeeze does nothing.
    """
    if any(bool(size <= 1) for size in squeezed_sizes(facts)):
        raise Uncaptured(source.forward, "a dynamic size is squeezed, and is 1: the graph runs eagerly")


def refuse_gradients(
    source: fx.GraphModule, inputs: Sequence[Any], examples: Sequence[Any]
) -> Callable[..., Any] | None:
    """Raises :class:`Uncaptured` for a graph that computes gradients: it is compiled as Inductor would.

    Args:
        inputs: what Dynamo hands over. examples: fake tensors for them.

    Returns:
        What the graph runs under where it lies in a region without gradients, or None.
    """
    plain = not any(is_subclass(value) for value in inputs)
    region = region_without_gradients(source) if plain and torch.is_grad_enabled() else None
    trainable = _requires_grad(source, examples) if region is None else None
    if trainable is None:
        if not torch.is_grad_enabled() and switches_gradients_on(source):
            raise Uncaptured(source.forward, "a part of the graph switches gradients on: it runs eagerly")
        return region
    if any("pcg::paged_attention" in op_names(node, None) for node in source.graph.nodes):
        # When the model runs, not now: an error of a backend would be wrapped in one of Dynamo's.
        raise Uncaptured(refuse_gradients_of_attention, "")
    raise Uncaptured(
        compile_all_with_inductor(source, inputs),
        f'gradients are enabled and {trainable} requires them: compiled as backend="inductor" would; '
        "for inference, call the model under torch.inference_mode()",
    )


def _requires_grad(gm: fx.GraphModule, inputs: Sequence[Any]) -> str | None:
    if not torch.is_grad_enabled():
        return None
    pairs = zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    return next((name_of_input(n) for n, v in pairs if isinstance(v, torch.Tensor) and v.requires_grad), None)
