"""Statements as the user wrote them, for messages: what a node writes, and how to write it instead."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pcg_compile.fx.places import Place


@dataclass(frozen=True)
class Statement:
    """``target[index] = value``; each part as text."""

    target: str
    index: str
    value: str

    def __str__(self) -> str:
        return f"{self.target}[{self.index}] = {self.value}"

    def on_device(self) -> str:
        """The same write as a fill on the device."""
        place = f"{self.target}[{_as_slice(self.index)}]"
        return f"{place}.zero_()" if self.value in ("0", "0.0") else f"{place}.fill_({self.value})"

    def refusal(self, device: torch.device) -> tuple[str, str, str]:
        """What is wrong with it on a tensor of ``device``, why, and the cure."""
        return (
            f"`{self}` writes a host scalar into a tensor on {device}",
            f"A CUDA graph cannot capture it: the {self.value} is copied from host memory at every step.",
            f"Write it on the device instead: {self.on_device()}",
        )


def assignment_at(place: Place, index: Any, value: Any) -> Statement:
    """The assignment that runs at a line; its parts by value where the line cannot be read."""
    return _parse(place.source) or Statement("tensor", _index(index), _name(value))


def assignment_of(node: fx.Node, place: Place) -> Statement:
    """The assignment that became ``operator.setitem``: the source line where it can be read, else the graph's names."""
    found = _parse(place.source)
    if found is not None:
        return found
    target, index, value = node.args[:3]
    return Statement(_name(target), _index(index), _name(value))


def _parse(source: str) -> Statement | None:
    try:
        body = ast.parse(source.strip()).body
    except (SyntaxError, ValueError):
        return None
    if len(body) != 1 or not isinstance(body[0], ast.Assign) or len(body[0].targets) != 1:
        return None
    target = body[0].targets[0]
    if not isinstance(target, ast.Subscript):
        return None
    index = ast.unparse(target.slice)
    if isinstance(target.slice, ast.Tuple) and target.slice.elts:
        index = index.removeprefix("(").removesuffix(")")
    return Statement(ast.unparse(target.value), index, ast.unparse(body[0].value))


def _name(value: Any) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    # Dynamo calls the local variable t of the traced frame l_t_, or L_t_.
    name = value.name
    return name[2:-1] if name[:2] in ("l_", "L_") and name.endswith("_") else name


def _index(index: Any) -> str:
    if isinstance(index, tuple):
        return ", ".join(map(_index, index)) or "()"
    if isinstance(index, slice):
        parts = ["" if part is None else _name(part) for part in (index.start, index.stop)]
        return ":".join(parts if index.step is None else [*parts, _name(index.step)])
    return "..." if index is Ellipsis else _name(index)


def _as_slice(index: str) -> str:
    """``0`` as ``0:1``: one dimension is left, so also a plain assignment would be a fill."""
    try:
        number = int(index)
    except ValueError:
        return index
    return f"{number}:" if number == -1 else f"{number}:{number + 1}"
