"""Compiling a model for its report only: nothing is recorded, and nothing has effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..backend import compile_graph, hazards_of, pcg
from ..errors import Hazard
from ..graph.facts import trace_facts
from ..graph.pieces import copy_graph
from ..options import Options
from ..registry import owners_graphs
from ..torch_internals import fake_inputs, wrapper_of

__all__ = ["CheckBackend", "ReportBackend", "is_compiled"]


def is_compiled(model: Any) -> bool:
    """Whether a model was compiled by pcg (and has been called, where torch.compile made it)."""
    if getattr(model, "__pcg_owner__", None) is not None:
        return True
    wrapper = wrapper_of(model)
    return wrapper is not None and (getattr(wrapper, "compiler_fn", None) is pcg or owners_graphs(wrapper) > 0)


class ReportBackend:
    """Compiles as pcg would, eagerly: a report needs no fast code."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = Options.parse({"compiler": "eager", **options})

    def __call__(self, gm: Any, example_inputs: Sequence[Any]) -> Any:
        with torch.no_grad():
            return compile_graph(gm, example_inputs, self.options, self)


class CheckBackend:
    """Runs the passes alone, and the graph as it is."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = Options.parse(options)
        self.hazards: list[Hazard] = []

    def __call__(self, gm: Any, example_inputs: Sequence[Any]) -> Any:
        with torch.no_grad():
            fakes = fake_inputs(example_inputs)
            copy = copy_graph(gm)
            self.hazards += hazards_of(copy, fakes, trace_facts(copy, fakes), self.options)
        return gm.forward
