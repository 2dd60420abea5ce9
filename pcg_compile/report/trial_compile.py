"""Compiling a model for its report only: nothing is captured, and nothing has effects."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import fx

from ..backend import compile_graph, run_passes, split, token_symint
from ..calls import graph_ran
from ..counters import Counters
from ..errors import Hazard
from ..fx.facts import DataDecide, NodeFacts, trace_facts
from ..fx.padding_decisions import decide_padding, padding_hazards
from ..fx.places import place_of, place_of_stack
from ..fx.submodules import copy_graph
from ..options import Options
from ..passes.context import PassContext
from ..passes.hazard_rules import Finding, hazard_at
from ..runtime.capture import capture_device
from ..torch_compat.fake_tensors import fake_inputs

__all__ = ["CheckBackend", "ReportBackend", "compile_apart", "hazards_of_breaks"]

#: How Dynamo begins its reasons for breaks at what depends on data.
_WAITS = re.compile(
    r"(?P<shape>dynamic shape)|\.(?:item|tolist)\(\)|data.?dependent|generic_jump TensorVariable|_local_scalar_dense",
    re.IGNORECASE,
)

_SYNC = ("it waits for the device, to read a value", "Keep the value on the device: torch.where(condition, a, b)")
_SHAPE = (
    "the size of its result depends on the data, so it waits for the device",
    "Keep the shape: a mask with torch.where, or output_size= where the op takes it",
)


def compile_apart(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function whose code Dynamo has not met: what it caches goes with the function.

    Compiled by itself, a model's code would keep the report's graphs, and they would count towards its recompile limit.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # By its name Dynamo remembers which sizes of the arguments changed.
    call.__code__ = call.__code__.replace(co_name=f"call_{uuid4().hex}")
    return torch.compile(call, backend=backend)


class ReportBackend:
    """Compiles as pcg would, eagerly: a report needs no fast code."""

    watched = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = Options.parse({"compiler": "eager", **options})

    def __call__(self, gm: Any, example_inputs: Sequence[Any]) -> Any:
        with torch.no_grad():
            return compile_graph(gm, example_inputs, self.options, self)


class CheckBackend:
    """Runs the passes alone, and the graph as it is."""

    watched = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = Options.parse(options)
        self.hazards: list[Hazard] = []

    def __call__(self, gm: Any, example_inputs: Sequence[Any]) -> Any:
        with torch.no_grad():
            fakes = fake_inputs(example_inputs)
            copy = copy_graph(gm)
            try:
                facts = trace_facts(copy, fakes)
            except Exception as error:
                # Dynamo breaks the graph there, and calls again for what is before and behind.
                self.hazards += _waiting_node(copy, str(error))
                raise error.__cause__ if isinstance(error, DataDecide) and error.__cause__ else error from None
            self.hazards += hazards_of(copy, fakes, facts, self.options)

        def run(*args: Any) -> Any:
            graph_ran()
            return gm.forward(*args)

        return run


def _waiting_node(gm: Any, error: str) -> list[Hazard]:
    """The node that an error of tracing names, where it had to know a value; `t[i] = 3` with i on the device."""
    name = re.search(r"While executing %(\w+)", error)
    nodes = [node for node in gm.graph.nodes if name is not None and node.name == name[1]]
    return [
        hazard_at(place_of(node), Finding("sync", *_SYNC), getattr(node.target, "__name__", str(node.target)))
        for node in nodes
        if _WAITS.search(error)
    ]


def _blames_a_size(reason: str) -> bool:
    """Dynamo calls ``t[x.shape[0]] = 0`` dependent on data, in the op that reads ``t``, which waits for nothing."""
    return re.search(r"Operator `aten\.(?:select|slice)\b", reason) is not None


def hazards_of(
    gm: fx.GraphModule, example_inputs: Sequence[Any], facts: dict[fx.Node, NodeFacts], options: Options
) -> list[Hazard]:
    """All findings of the passes and of the padding analysis, without compiling; ``gm`` may be rewritten."""
    context = PassContext(options, capture_device(example_inputs), facts, token_symint(example_inputs), collect=True)
    plan = split(run_passes(gm, example_inputs, context), context, Counters(), only_graph=False)
    decide_padding(plan, Counters())
    return [*context.hazards, *padding_hazards(plan)]


def hazards_of_breaks(breaks: Sequence[tuple[str, Any]]) -> list[Hazard]:
    """Where Dynamo broke a graph because it had to know a value on the device; each line once."""
    found: dict[Hazard, None] = {}
    for reason, stack in breaks:
        match = _WAITS.search(reason.partition("\n")[0])
        if match is None or _blames_a_size(reason):
            continue
        finding = Finding("dynamic shape", *_SHAPE) if match["shape"] else Finding("sync", *_SYNC)
        found[hazard_at(place_of_stack(stack), finding, "graph break")] = None
    return list(found)
