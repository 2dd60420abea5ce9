"""What passes are handed beside the graph.

A pass is a free function ``(gm, context) -> gm``. It reads ``context.facts`` (made for the graph as it
stands), may rewrite the graph, and reports through ``context``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from pcg_compile.errors import Hazard
from pcg_compile.fx.facts import NodeFacts
from pcg_compile.options import Options


@dataclass(frozen=True)
class StepInput:
    """A tensor that pieces read but the traced call does not pass: it comes from the step.

    Attributes:
        name: shown by explain and dump; equal names are one input.
        fake: ``fn(size) -> Tensor`` an example under the fake mode.
        get: ``fn(state, size) -> Tensor`` the real tensor for a bucket's size, at an address that stays.
        size: the number of rows that it is for, an int or a SymInt.
        scratch: True where pad rows are indices into memory that no request owns (``slot_mapping``).
    """

    name: str
    fake: Callable[[Any], torch.Tensor]
    get: Callable[[Any, int], torch.Tensor]
    size: Any
    scratch: bool = False


@dataclass
class PassContext:
    """Shared by the passes of one graph."""

    options: Options
    #: The capture device: CUDA where an input lies there, else the CPU.
    device: torch.device
    #: Facts of every node of the graph as it stands; traced again after each pass that rewrites.
    facts: dict[fx.Node, NodeFacts]
    #: The SymInt (or int) of the token dimension, None where no input has a dynamic size.
    tokens: Any = None
    #: Nodes that must run between pieces, with the reason (a hazard that can be isolated).
    splits: dict[fx.Node, str] = field(default_factory=dict)
    #: Those of them that a step counts: an op that its owner marks as unsafe to capture is as good as a split op.
    counted: set[fx.Node] = field(default_factory=set)
    #: All findings, for explain() and check().
    hazards: list[Hazard] = field(default_factory=list)
    #: (reason, where) of what is captured and yet not as it should be; counted once, when the graph is compiled.
    remarks: list[tuple[str, str]] = field(default_factory=list)
    #: What rewriting passes did, one line each, for explain() and dump().
    notes: list[str] = field(default_factory=list)
    #: For each pass that ran, its name and what it added to ``notes`` and ``hazards``.
    outcomes: list[tuple[str, list[str], list[Hazard]]] = field(default_factory=list)
    #: Dynamo's graph before the passes, for dump().
    source: fx.GraphModule | None = None
    #: Whether Dynamo broke the frame behind this graph: its results are inputs of another one.
    continued: bool = False
    #: Why rows of this graph's inputs, and then of its results, are not the step's tokens in order; "" where they are.
    moved: str = ""
    #: True for pcg.check(): collect hazards, never raise.
    collect: bool = False
