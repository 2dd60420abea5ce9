"""Traces of another process, without Dynamo: their sizes, their inputs, and what is traced now (torch 2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from .fake_tensors import FakeTensorMode, isolated_tracing, python_dispatcher
from .probe import attributes, private

__all__ = ["RestoredTrace", "expression_class", "name_of_function", "source_of_symbol", "symbol_of"]

_READ = "2.11 to 2.13"
attributes(
    "torch.fx.experimental.symbolic_shapes.ShapeEnv", _READ, "create_symbol create_symboolnode source_to_var", ShapeEnv
)
_config = private("torch.fx.experimental._config", _READ)
_ConstantSource = private("torch._dynamo.source.ConstantSource", _READ)
_qualified_name = private("torch.fx.node._get_qualified_name", _READ)
_functions = private("torch.utils._sympy.functions", _READ)


def source_of_symbol(fake_mode: FakeTensorMode, symbol: sympy.Symbol) -> tuple[str, int]:
    """What a symbol is the size of, as Dynamo names it, and its value in the trace (2.11 to 2.13)."""
    env: Any = fake_mode.shape_env
    names = [name for name, one in env.source_to_var.items() if one == symbol]
    return (names[0] if names else str(symbol)), int(env.backed_var_to_val[symbol])


def symbol_of(fake_mode: FakeTensorMode, value: Any) -> Any:
    """A size in terms of symbols that nothing else is known of (2.11 to 2.13)."""
    expr = value.node.expr if isinstance(value, torch.SymInt) else value
    return fake_mode.shape_env.replace(expr) if isinstance(expr, sympy.Basic) and fake_mode.shape_env else expr


def expression_class(name: str) -> Any:
    """The class of an expression by its name: sympy's own or torch's; None for others (2.11 to 2.13)."""
    for module in (_functions, sympy):
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, sympy.Basic):
            return found
    return None


def name_of_function(function: Callable[..., Any]) -> str:
    """The dotted name of what a node calls (2.11 to 2.13)."""
    return str(_qualified_name(function))


class RestoredTrace:
    """The fake mode of a trace that was made in another process.

    Args:
        symbols: of each symbol its name there, what it is the size of, its value, and whether it is positive.
    """

    def __init__(self, symbols: Sequence[tuple[str, str, int, bool]]) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        env: Any = self.mode.shape_env
        self.symbols: dict[str, sympy.Symbol] = {}
        for name, source, value, positive in symbols:
            self.symbols[name] = env.create_symbol(
                value, _ConstantSource(source), DimDynamic.DYNAMIC, None, positive or None, True
            )

    def number(self, expr: Any) -> Any:
        """An expression of sizes as an int or SymInt."""
        env: Any = self.mode.shape_env
        if not isinstance(expr, sympy.Expr) or expr.is_Integer:
            return int(expr)
        hint: Any = expr.xreplace(dict(env.backed_var_to_val))
        return env.create_symintnode(expr, hint=int(hint))

    def tensor(self, shape: Sequence[Any], strides: Sequence[Any], offset: Any, **kind: Any) -> torch.Tensor:
        """A fake tensor."""
        sizes, steps, start = list(map(self.number, shape)), list(map(self.number, strides)), self.number(offset)
        with self.mode, python_dispatcher(), torch.no_grad():
            if isinstance(start, int) and start == 0:
                return torch.empty_strided(sizes, steps, **kind)
            reach = sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
            return torch.empty((start + reach + 1,), **kind).as_strided(sizes, steps, start)

    @contextmanager
    def running(self, conditions: Sequence[Any], layouts: Sequence[Any]) -> Iterator[None]:
        """Inside, code that asks for the running trace gets this one, with its conditions on sizes (2.11 to 2.13).

        Args:
            layouts: conditions that are known, and are no guards; see ``layouts_apart``.
        """
        env: Any = self.mode.shape_env
        with _config.patch(backed_size_oblivious=True), isolated_tracing(self.mode):
            for condition in conditions:
                bool(env.create_symboolnode(condition))
            count = len(env.guards)
            for condition in layouts:
                bool(env.create_symboolnode(condition))
            for i, guard in enumerate(env.guards[count:], count):
                framework = SimpleNamespace(name="run_node")
                env.guards[i] = replace(guard, sloc=replace(guard.sloc, framework_loc=framework))
            yield

    def describe(self, node: fx.Node, value: Any, source: str, static: bool) -> None:
        """Gives an input of the graph what Dynamo notes of one."""
        node.meta["example_value"] = value
        if source:
            node._dynamo_source = _ConstantSource(source)
        if static:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
