"""What all parts of one compiled graph's runtime have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..counters import Counters
from ..distributed.agreement import Agreement
from ..fx.plan import Plan
from ..options import Options
from .buckets import BucketChooser
from .capture import Engine

__all__ = ["Shared"]


@dataclass
class Shared:
    """The plan of a graph, and what runs it.

    Attributes:
        agreement: for a graph with collectives, what ranks must decide together.
        grew: whether a step has captured something since ``memory_budget`` was last looked at.
    """

    plan: Plan
    options: Options
    counters: Counters
    chooser: BucketChooser
    engine: Engine
    device: torch.device
    agreement: Agreement | None = None
    grew: bool = False
    _boxed: dict[fx.GraphModule, Callable[[list[Any]], Any]] = field(default_factory=dict)

    def boxed(self, module: fx.GraphModule) -> Callable[[list[Any]], Any]:
        """What a graph computes, as a function of one list of arguments that it empties."""
        if module not in self._boxed:
            graph = fx.Graph()
            arguments = graph.placeholder("arguments")
            copies: dict[fx.Node, fx.Node] = {}
            for node in module.graph.nodes:
                if node.op == "placeholder":
                    copies[node] = graph.call_method("pop", (arguments, 0))
                else:
                    copies[node] = graph.node_copy(node, copies.__getitem__)
            self._boxed[module] = fx.GraphModule(module, graph).forward
        return self._boxed[module]
