"""Runs the safety passes on what Dynamo traces of a small function, without the rest of the backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pcg_compile.errors import Hazard
from pcg_compile.fx.facts import trace_facts
from pcg_compile.options import Options
from pcg_compile.passes.capture_hazards import capture_hazards
from pcg_compile.passes.context import PassContext
from pcg_compile.passes.scalar_writes import scalar_writes
from pcg_compile.torch_compat.fake_tensors import fake_inputs


@dataclass
class Traced:
    """What the passes made of the graphs of one call, and what the rewritten graphs returned."""

    contexts: list[PassContext]
    graphs: list[fx.GraphModule]
    result: Any = None

    @property
    def hazards(self) -> list[Hazard]:
        return [hazard for context in self.contexts for hazard in context.hazards]

    @property
    def splits(self) -> dict[fx.Node, str]:
        return {node: reason for context in self.contexts for node, reason in context.splits.items()}

    @property
    def notes(self) -> list[str]:
        return [note for context in self.contexts for note in context.notes]

    def kinds(self) -> set[str]:
        return {hazard.kind for hazard in self.hazards}


def traced(
    function: Callable[..., Any], *args: Any, collect: bool = True, fullgraph: bool = True, **options: Any
) -> Traced:
    """Traces and runs ``function`` on ``args`` with the passes applied."""
    seen = Traced([], [])

    def backend(gm: fx.GraphModule, real: list[Any]) -> Callable[..., Any]:
        inputs = fake_inputs(real)
        devices = {x.device for x in inputs if isinstance(x, torch.Tensor) and x.device.type == "cuda"}
        device = next(iter(devices), torch.device("cpu"))
        with torch.no_grad():
            context = PassContext(Options.parse(options), device, trace_facts(gm, inputs), collect=collect)
            gm = scalar_writes(gm, context)
            context.facts = trace_facts(gm, inputs)
            gm = capture_hazards(gm, context)
        seen.contexts.append(context)
        seen.graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True),
        torch.no_grad(),
    ):
        seen.result = torch.compile(function, backend=backend, fullgraph=fullgraph)(*args)
    return seen
