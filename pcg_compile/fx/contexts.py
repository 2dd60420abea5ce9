"""Autocast regions and grad-mode switches of a Dynamo graph.

They are nodes in the graph, with effects on all nodes after them. A piece, or a split op, that lies inside
an autocast region must run in it, wherever the graph is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

#: The arguments of ``torch.amp.autocast_mode._enter_autocast``, outermost region first.
Autocast = tuple[tuple[Any, ...], ...]

_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast
# Everything runs without gradients, so switches have no effect except inside transforms that compute gradients.
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
    return node.op == "call_function" and (node.target in (_ENTER, _EXIT) or is_grad_switch(node))


def is_grad_switch(node: fx.Node) -> bool:
    """Whether a node switches gradients."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _GRAD_SWITCHES


def switches_gradients_on(gm: fx.GraphModule) -> bool:
    """Whether a part of a graph that is traced without gradients asks for them, other than inside a transform."""
    depth = 0
    for node in gm.graph.nodes:
        depth += transform_depth(node)
        if depth == 0 and is_grad_switch(node) and node.target.__name__ == "_set_grad_enabled" and node.args[0] is True:
            return True
    return False


def region_without_gradients(gm: fx.GraphModule) -> type[torch.no_grad] | type[torch.inference_mode] | None:
    """The no_grad or inference_mode region that holds all calls of a graph, or None."""
    enabled, inference = True, 0
    seen: set[bool] = set()
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "") if is_grad_switch(node) else ""
        if name == "_set_grad_enabled":
            enabled = bool(node.args[0])
        elif name.endswith("_inference_mode"):
            inference += 1 if name.startswith("_enter") and node.args[0] else -1
        elif node.op.startswith("call_") and enabled and not inference:
            return None
        elif node.op.startswith("call_"):
            seen.add(inference > 0)
    return None if not seen else torch.inference_mode if seen == {True} else torch.no_grad


def is_transform(node: fx.Node) -> bool:
    """Whether a node enters or leaves a function transform such as vmap, whose state spans the nodes between."""
    module = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and "functorch" in module


def transform_depth(node: fx.Node) -> int:
    """1 for a node that enters a function transform, -1 for one that leaves it, else 0."""
    name = getattr(node.target, "__name__", "") if is_transform(node) else ""
    return name.endswith("increment_nesting") - name.endswith("decrement_nesting")


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
