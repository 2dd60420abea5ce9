"""A graph, its sizes and inputs as plain data (what JSON holds), and back: nothing is executed but imports."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import sympy
import torch
from torch import fx

from ..torch_compat.restored_traces import expression_class, name_of_function

__all__ = [
    "CannotSave", "decode", "decode_expression", "encode", "encode_expression", "graph_from_data", "graph_to_data",
    "import_name", "named_constant",
]  # fmt: skip

_NAMED = (torch.dtype, torch.layout, torch.memory_format)


class CannotSave(Exception):
    """What of a graph cannot be written as data."""


def import_name(name: str) -> Any:
    """The object of a dotted name, whose longest importable part is a module.

    Raises:
        ImportError: there is none.
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[end:]:
                found = getattr(found, part)
        except AttributeError as error:
            raise ImportError(f"there is no {name}") from error
        return found
    raise ImportError(f"there is no {name}")


def _name(value: Any) -> str:
    if isinstance(value, torch._ops.HigherOrderOperator):
        name = f"torch.ops.higher_order.{value.name()}"
    elif isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = f"torch.ops.{value}"
    elif isinstance(value, type) or not callable(value):
        name = f"{value.__module__}.{value.__qualname__}"
    else:
        name = name_of_function(value)
    try:
        found = import_name(name)
    except ImportError:
        found = None
    if found is not value:
        raise CannotSave(f"{name}, which cannot be imported by that name")
    return name


def encode_expression(expr: Any) -> Any:
    """A size, or a condition on sizes, as data: an int, a symbol's name, or a list of an operation and its operands."""
    if isinstance(expr, bool) or expr in (sympy.true, sympy.false):
        return ["bool", bool(expr)]
    if isinstance(expr, int) or getattr(expr, "is_Integer", False):
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return expr.name
    if isinstance(expr, sympy.Rational):
        return ["Rational", int(expr.p), int(expr.q)]
    name = type(expr).__name__
    if expression_class(name) is not type(expr):
        raise CannotSave(f"the size {expr}")
    return [name, *map(encode_expression, expr.args)]


def decode_expression(data: Any, symbols: Mapping[str, sympy.Symbol]) -> Any:
    """The expression; an int for a number."""
    if isinstance(data, int):
        return data
    if isinstance(data, str):
        return symbols[data]
    name, *operands = data
    if name == "bool":
        return sympy.true if operands[0] else sympy.false
    if name == "Rational":
        return sympy.Rational(*operands)
    kind = expression_class(name)
    if kind is None:
        raise ValueError(f"{name} is no operation on sizes")
    return kind(*[sympy.sympify(decode_expression(operand, symbols)) for operand in operands])


def named_constant(value: Any) -> str:
    """The dotted name of an object that is one for all calls and processes, such as the mask of every step; or ""."""
    module, _, name = getattr(type(value), "constant_name", "").rpartition(".")
    return f"{module}.{name}" if module and getattr(sys.modules.get(module), name, None) is value else ""


def encode(value: Any) -> Any:
    """A value in a node's arguments, or a function's constant argument, as data.

    Raises:
        CannotSave: it is of another kind.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return {"float": value.hex()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [encode(one) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(one)] for key, one in value.items()]}
    if kind is slice:
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, _NAMED):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, Enum):
        return {"member": [_name(type(value)), value.name]}
    if name := named_constant(value):
        return {"name": name}
    if callable(value) and not isinstance(value, torch.Tensor):
        return {"name": _name(value)}
    raise CannotSave(f"a {kind.__name__} among the arguments of an op")


def decode(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The value of such data."""
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    return _DECODERS[kind](content, nodes)


_DECODERS: Mapping[str, Callable[[Any, Mapping[str, fx.Node]], Any]] = {
    "float": lambda content, nodes: float.fromhex(content),
    "complex": lambda content, nodes: complex(*map(float.fromhex, content)),
    "node": lambda content, nodes: nodes[content],
    "tuple": lambda content, nodes: tuple(decode(one, nodes) for one in content),
    "list": lambda content, nodes: [decode(one, nodes) for one in content],
    "dict": lambda content, nodes: {decode(key, nodes): decode(one, nodes) for key, one in content},
    "slice": lambda content, nodes: slice(*(decode(one, nodes) for one in content)),
    "ellipsis": lambda content, nodes: Ellipsis,
    "torch": lambda content, nodes: getattr(torch, content),
    "device": lambda content, nodes: torch.device(content),
    "member": lambda content, nodes: import_name(content[0])[content[1]],
    "name": lambda content, nodes: import_name(content),
}


def graph_to_data(gm: fx.GraphModule) -> list[Any]:
    """The nodes of a graph.

    Raises:
        CannotSave: an attribute of the graph, or a function or argument that has no name in another process.
    """
    found = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value: Any = gm
            for part in str(node.target).split("."):
                value = getattr(value, part)
            raise CannotSave(f"{node.target}, a {type(value).__name__} that is part of the graph")
        target = node.target if isinstance(node.target, str) else _name(node.target)
        found.append([node.op, node.name, target, encode(node.args), encode(dict(node.kwargs)), node.stack_trace])
    return found


def graph_from_data(data: list[Any]) -> fx.GraphModule:
    """The graph of such data; its inputs have no values yet."""
    graph, nodes = fx.Graph(), {}  # type: ignore[var-annotated]
    for op, name, target, args, kwargs, stack in data:
        function = import_name(target) if op == "call_function" else target
        node = graph.create_node(op, function, decode(args, nodes), decode(kwargs, nodes), name)
        if stack:
            node.stack_trace = stack
        nodes[name] = node
    return fx.GraphModule(torch.nn.Module(), graph)
