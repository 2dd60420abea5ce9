"""What passes that bring a step's metadata into a graph have in common: new inputs, new nodes, sizes as nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from pcg_compile.fx.facts import NodeFacts
from pcg_compile.fx.sizes import expr_of
from pcg_compile.torch_compat.expressions import expression_nodes
from pcg_compile.torch_compat.fake_tensors import fake_mode_of

from .context import PassContext, StepInput


class Rewriter:
    """Adds nodes and step inputs to a graph; they carry fake values, so facts can be made of them."""

    def __init__(self, gm: fx.GraphModule, context: PassContext) -> None:
        self.gm, self.graph, self.context = gm, gm.graph, context
        self.facts: dict[fx.Node, NodeFacts] = context.facts
        self.fake_mode = fake_mode_of([f.value for f in context.facts.values()])
        self.placeholders: list[fx.Node] = [
            n for n in gm.graph.find_nodes(op="placeholder") if "pcg_step_input" not in n.meta
        ]
        self.inputs: dict[str, fx.Node] = {}

    def step_input(self, step_input: StepInput) -> fx.Node:
        """The placeholder of a step input; equal names are one."""
        name = step_input.name
        if name not in self.inputs:
            after = self.graph.find_nodes(op="placeholder")
            with self.graph.inserting_after(after[-1]) if after else self.graph.inserting_before():
                node = self.graph.placeholder(name)
            with self.fake_mode:
                node.meta["example_value"] = step_input.fake(step_input.size)
            node.meta["pcg_step_input"] = step_input
            self.inputs[name] = node
        return self.inputs[name]

    def call(
        self, like: fx.Node, target: Any, args: tuple[Any, ...], fake: Callable[[], torch.Tensor] | None = None
    ) -> fx.Node:
        """A call that is, to the user, at the place of ``like``; ``fake`` makes its example result."""
        node = (
            self.graph.call_method(target, args) if isinstance(target, str) else self.graph.call_function(target, args)
        )
        node.stack_trace = like.stack_trace
        node.meta.update({key: like.meta[key] for key in ("nn_module_stack", "source_fn_stack") if key in like.meta})
        if fake is not None:
            with self.fake_mode:
                node.meta["example_value"] = fake()
        return node

    def ahead_of_all(self, like: fx.Node, target: Any, size: Any, *args: Any) -> fx.Node:
        """``target(size, *args)`` ahead of everything that is computed; ``size`` is an int or a SymInt."""
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            return self.call(like, target, (self.size_node(size), *args))

    def size_node(self, size: Any) -> fx.Node | int:
        """A size as an argument: a number, the placeholder that holds it, or arithmetic on placeholders."""
        expr = expr_of(size)
        if not isinstance(expr, sympy.Basic) or not expr.free_symbols:
            return int(expr)
        sources: dict[Any, fx.Node] = {}
        for node in self.placeholders:
            value = self.facts[node].value
            if isinstance(value, torch.SymInt):
                if expr_of(value) == expr:
                    return node
                sources.setdefault(expr_of(value), node)
        made: fx.Node | int = expression_nodes(self.graph, expr, {s: sources[s] for s in expr.free_symbols})
        return made

    def done(self) -> fx.GraphModule:
        """The rewritten graph, checked."""
        self.graph.lint()
        self.gm.recompile()
        return self.gm
