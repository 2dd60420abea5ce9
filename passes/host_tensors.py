"""Which tensors of a traced graph lie on the host, beside the capture device."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from pcg_compile.fx.facts import NodeFacts, alias_of, storage_of, tensors_in
from pcg_compile.torch_compat.fake_tensors import FakeTensor

from .hazard_rules import tensor_arguments

#: What makes a tensor of Python data.
FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor)


def data_of(node: fx.Node, facts: Mapping[fx.Node, NodeFacts]) -> Any:
    """The Python data that a node makes a tensor of; None for any other node."""
    if node.op != "call_function" or node.target not in FROM_DATA:
        return None
    data = node.args[0] if node.args else node.kwargs.get("data", node.kwargs.get("s", node.kwargs.get("obj")))
    is_tensor = isinstance(data, fx.Node) and isinstance(facts[data].value, torch.Tensor)
    return None if is_tensor else data


def is_lifted_number(node: fx.Node) -> bool:
    """Whether a node is a Python number that AOTAutograd's graph keeps as a tensor, as ``t[mask] = 0`` has one."""
    if node.op != "get_attr" or not str(node.target).startswith("_tensor_constant") or not node.users:
        return False
    lifts = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)
    return all(user.target in lifts for user in node.users)


class GraphMemory:
    """Where the fake tensors of one graph lie; a :class:`pcg_compile.passes.hazard_rules.Memory`.

    On a CUDA capture device this is the tensors' own device. On a CPU run, where all tensors lie in one memory, it
    follows from the statements as far as they tell: ``torch.tensor([1, 2])`` without a device would be a host tensor on
    a GPU too, and so would what is computed from nothing else; an index list and a Python number that is assigned are
    host data. All other tensors count as device tensors, so a laptop never refuses what a GPU
    would capture.
    """

    def __init__(self, graph: fx.Graph, facts: Mapping[fx.Node, NodeFacts], device: torch.device) -> None:
        self.device = device
        self.facts = facts
        self._host: set[int] = set()
        self._lifted: set[int] = set()
        if device.type == "cpu":
            for node in graph.nodes:
                if node in facts and self._is_host_made(node):
                    self._host |= alias_of(facts[node].value)

    def enter(self, node: fx.Node) -> None:
        """Makes the Python data that a node lifts itself (an index list, an assigned number) known as host tensors."""
        self._lifted = set()
        calls = self.facts[node].ops
        shapes = [call.args[0].shape for call in calls if getattr(call.op, "name", str)() == "aten::lift_fresh"]
        if self.device.type != "cpu" or not shapes or node.target not in (operator.setitem, operator.getitem):
            return
        known = alias_of(self.facts[node].value).union(
            *(alias_of(self.facts[n].value) for n in node.all_input_nodes if n in self.facts)
        )
        for call in calls:
            self._lifted |= {storage_of(t) for t in tensor_arguments(call) if t.shape in shapes} - known

    def on_host(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in host memory."""
        if self.device.type != "cpu":
            return tensor.device.type == "cpu"
        return not isinstance(tensor, FakeTensor) or storage_of(tensor) in self._host | self._lifted

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Never known of a fake tensor; and a captured graph must not read the caller's host memory at all."""
        return False

    def _is_host_made(self, node: fx.Node) -> bool:
        if any(isinstance(leaf, torch.device) for leaf in tree_leaves((node.args, dict(node.kwargs)))):
            return False
        if data_of(node, self.facts) is not None or is_lifted_number(node):
            return True
        if node.op not in ("call_function", "call_method"):
            return False
        tensors = [t for n in node.all_input_nodes for t in tensors_in(self.facts[n].value)]
        if not tensors:
            # A number or an array of numpy's own.
            return type(node.target).__name__ == "numpy_to_tensor_wrapper"
        return bool(tensors) and all(storage_of(t) in self._host for t in tensors)
