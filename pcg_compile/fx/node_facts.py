"""What facts are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class OpCall:
    """One dispatched op: its overload (or higher-order op), the fake arguments it was called with, and its result."""

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    # Without a default of the class, which a copied call's would be taken for.
    result: Any = field(default_factory=lambda: None)


class CopiedCall(OpCall):
    """An op call like another one, whose arguments are made when somebody looks at them: few ask for more than the op.

    ``copy`` makes this one's arguments of the other's.
    """

    def __init__(self, like: OpCall, copy: Callable[[Any], Any]) -> None:
        vars(self).update(op=like.op, _like=like, _copy=copy)

    def __getattr__(self, name: str) -> Any:
        if name not in ("args", "kwargs", "result"):
            raise AttributeError(name)
        made = vars(self)[name] = self._copy(getattr(self._like, name))
        return made


@dataclass(frozen=True)
class NodeFacts:
    """What one node does: its fake value, the ops that it dispatches, the storages that it writes."""

    value: Any
    ops: tuple[OpCall, ...]
    writes: frozenset[int]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among the leaves of a nested value."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def arguments_of(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What was given to an op, by the names of its schema; to a function without one, by position and keyword."""
    schema = getattr(op, "_schema", None) or getattr(getattr(op, "default", None), "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else map("arg{}".format, range(len(args)))
    return {**dict(zip(names, args, strict=False)), **kwargs}


def written_tensors(call: OpCall) -> Iterator[torch.Tensor]:
    """The argument tensors that an op writes, by its schema."""
    schema = getattr(call.op, "_schema", None)
    if schema is None:
        return
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        if argument.name in call.kwargs:
            yield from tensors_in(call.kwargs[argument.name])
        elif position < len(call.args):
            yield from tensors_in(call.args[position])
