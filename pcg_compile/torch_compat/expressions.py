"""Expressions of sizes as nodes of a graph and as numbers (torch 2.11 to 2.13)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .probe import attributes

_READ = "2.11 to 2.13"
attributes("torch.utils._sympy.interp", _READ, "sympy_interp")
attributes("torch.utils._sympy.reference", _READ, "PythonReferenceAnalysis")
attributes("torch.fx.experimental.symbolic_shapes.ShapeEnv", _READ, "create_symintnode create_symfloatnode")


_Analysis: Any = PythonReferenceAnalysis


class _NodeAnalysis(_Analysis):  # type: ignore[misc]
    """Torch's, with what it leaves to sympy's own functions or to Python protocols that a proxy does not have."""

    # Rounding to whole numbers asks a value's own methods, which a proxy has not.
    floor_to_int = staticmethod(lambda x, dtype: _call_node(math.floor, x))
    ceil_to_int = staticmethod(lambda x, dtype: _call_node(math.ceil, x))
    trunc_to_int = staticmethod(lambda x, dtype: _call_node(torch.sym_int, x))
    round_to_int = staticmethod(lambda x, dtype: _call_node(round, x))
    round_decimal = staticmethod(lambda x, digits: _call_node(round, x, digits))
    floor = staticmethod(lambda x: _call_node(torch.sym_float, _call_node(math.floor, x)))
    ceil = staticmethod(lambda x: _call_node(torch.sym_float, _call_node(math.ceil, x)))
    trunc = staticmethod(lambda x: _call_node(torch.sym_float, _call_node(torch.sym_int, x)))
    int_truediv = staticmethod(operator.truediv)
    truncdiv = staticmethod(lambda a, b: _call_node(torch.sym_int, a / b))
    add, sub, mul = staticmethod(operator.add), staticmethod(operator.sub), staticmethod(operator.mul)
    bitwise_and, bitwise_or = staticmethod(operator.and_), staticmethod(operator.or_)
    bitwise_xor = staticmethod(operator.xor)


for _name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan"):
    setattr(_NodeAnalysis, _name, staticmethod(partial(lambda f, x: _call_node(f, x), getattr(torch, f"_sym_{_name}"))))


#: What torch's analysis raises for a function that it has no Python form of, or that a proxy does not support.
_NO_NODES = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


def _call_node(function: Callable[..., Any], *args: Any) -> Any:
    proxies = [a for a in args if isinstance(a, fx.Proxy)]
    return proxies[0].tracer.create_proxy("call_function", function, args, {}) if proxies else function(*args)


def expression_nodes(graph: fx.Graph, expr: Any, symbols: Mapping[sympy.Symbol, fx.Node]) -> Any:
    """A node at the end of ``graph`` that computes ``expr`` from its symbols' nodes, or a number (2.11 to 2.13).

    An expression that no nodes are known for is one call, which no compiler can look into.
    """
    tracer = GraphAppendingTracer(graph)
    proxies = {symbol: fx.Proxy(node, tracer) for symbol, node in symbols.items()}
    before = set(graph.nodes)
    try:
        result = sympy_interp(_NodeAnalysis, proxies, expr)
    except _NO_NODES:
        for node in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(node)
        free = sorted(expr.free_symbols, key=str)
        return graph.call_function(_Expression(expr, tuple(free)), tuple(symbols[s] for s in free))
    return result.node if isinstance(result, fx.Proxy) else result


def evaluate_expression(expr: Any, values: Mapping[sympy.Symbol, Any]) -> Any:
    """An expression at values of its symbols, floats among them, by Python's arithmetic (2.11 to 2.13)."""
    try:
        return sympy_interp(_NodeAnalysis, dict(values), expr)
    except (KeyError, AttributeError, NotImplementedError):
        # A function that torch has no Python form of.
        symbols = tuple(sorted(expr.free_symbols, key=str))
        return _Expression(expr, symbols)(*(values[s] for s in symbols))


def number_of_symbol(symbol: sympy.Symbol, like: Any) -> Any:
    """A SymInt or SymFloat of a symbol that only the data give a value, beside another number (2.11 to 2.13)."""
    env = like.node.shape_env
    return (env.create_symintnode if symbol.is_integer else env.create_symfloatnode)(symbol, hint=None)


class _Expression:
    """An expression of sizes as a function of them."""

    def __init__(self, expr: Any, symbols: tuple[sympy.Symbol, ...]) -> None:
        self.expr, self.symbols = expr, symbols
        self.__name__ = self.__qualname__ = "expression"

    def __call__(self, *sizes: int | float) -> Any:
        value: Any = self.expr.xreplace({s: sympy.sympify(n) for s, n in zip(self.symbols, sizes, strict=True)})
        if isinstance(value, sympy.logic.boolalg.BooleanAtom):
            return bool(value)
        return int(value) if value.is_integer and not value.is_Float else float(value)
