"""Autocast regions and grad-mode switches of a Dynamo graph.

They are nodes in the graph, with effects on all nodes after them. A piece, or a split op, that lies inside
an autocast region must run in it, wherever the graph is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["Autocast", "autocast_regions", "is_mode_switch"]

#: The arguments of ``torch.amp.autocast_mode._enter_autocast``, outermost region first.
Autocast = tuple[tuple[Any, ...], ...]

_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast
# Everything runs without gradients, so switching them is of no effect.
_GRAD_SWITCHES = frozenset(
    {
        "_set_grad_enabled",
        "_enter_inference_mode",
        "_exit_inference_mode",
        "_force_original_view_tracking",
        "_set_multithreading_enabled",
    }
)


def is_mode_switch(node: fx.Node) -> bool:
    """Whether a node opens or closes an autocast region, or switches gradients."""
    return node.op == "call_function" and (
        node.target in (_ENTER, _EXIT) or getattr(node.target, "__name__", "") in _GRAD_SWITCHES
    )


def autocast_regions(gm: fx.GraphModule) -> Mapping[fx.Node, Autocast]:
    """The autocast regions that each node lies in; nodes outside all of them are left out."""
    regions: dict[fx.Node, Autocast] = {}
    open_regions: list[tuple[fx.Node, tuple[Any, ...]]] = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is _ENTER:
            open_regions.append((node, tuple(node.args)))
        elif node.op == "call_function" and node.target is _EXIT:
            open_regions = [region for region in open_regions if region[0] is not node.args[0]]
        elif open_regions and node.op not in ("placeholder", "output", "get_attr"):
            regions[node] = tuple(arguments for _, arguments in open_regions)
    return regions
