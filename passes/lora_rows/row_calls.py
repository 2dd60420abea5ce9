"""What the rules of rows are given: one op, and what is known of its arguments and of the values of indices."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pcg_compile.fx.facts import tensors_in

from ..padding_safety.dims import as_expr
from .layouts import Lost, State


class Indices:
    """What is known of the values of index tensors, by a key of their values."""

    def __init__(self) -> None:
        self.keys: dict[int, Hashable] = {}
        #: Permutations, each with the one that it is the inverse of, if that is known.
        self.permutations: dict[Hashable, Hashable] = {}
        #: 0, 1, 2, ...
        self.counting: set[Hashable] = set()
        #: Others divided by a number: the key and tensor of the other, and the number.
        self.quotients: dict[Hashable, tuple[Hashable, torch.Tensor, int]] = {}

    def key(self, tensor: torch.Tensor) -> Hashable:
        """Equal for equal values."""
        return self.keys.get(id(tensor), id(tensor))

    def quotient(self, key: Hashable) -> tuple[Hashable, torch.Tensor, int] | None:
        """The index that this one is divided from, and by what, where it has not been written since."""
        found = self.quotients.get(key)
        return found if found is not None and self.key(found[1]) == found[0] else None

    def note(self, name: str, given: dict[str, Any], result: torch.Tensor) -> None:
        """Notes what the values of an index are, where they follow from another's."""
        source, key = given.get("self"), self.key(result)
        of = self.key(source) if isinstance(source, torch.Tensor) else None
        count = given.get("other")
        if name == "aten::sort" and result.dim() == 1:
            self.permutations[key] = of if of in self.permutations and not given.get("descending") else None
            if self.permutations[key] is not None and self.permutations[of] is None:
                self.permutations[of] = key
        elif name == "aten::arange" and (given.get("start", 0), given.get("step", 1)) == (0, 1):
            self.counting.add(key)
        elif any(t.is_floating_point() or t.dtype is torch.bool for t in tensors_in([source, result])):
            return
        elif name in ("aten::_to_copy", "aten::clone", "aten::detach", "aten::alias") and source is not result:
            self.keys[id(result)] = of
        elif name == "aten::floor_divide" or (name == "aten::div" and given.get("rounding_mode") == "floor"):
            if type(count) is int and count > 0 and isinstance(source, torch.Tensor):
                self.quotients[key] = of, source, count
        elif name in ("aten::index_put", "aten::scatter", "aten::index_copy"):
            # inverse[permutation] = arange(n), whatever lay in ``inverse`` before.
            index = [self.key(t) for t in tensors_in([given.get("indices"), given.get("index")])]
            values = [self.key(t) for n in ("values", "source", "src") for t in tensors_in(given.get(n))]
            if len(index) == 1 and index[0] in self.permutations and values and values[0] in self.counting:
                self.permutations[key] = index[0]


@dataclass
class RowCall:
    """One op, its arguments by name, its results, and what is known of the tokens of one input."""

    op: str
    arguments: dict[str, Any]
    results: list[torch.Tensor]
    tensors: list[torch.Tensor]
    state: Callable[[torch.Tensor], State]
    indices: Indices
    place: fx.Node | None

    def get(self, *names: str, default: Any = None) -> Any:
        """The first argument of these names that was given."""
        return next((self.arguments[name] for name in names if self.arguments.get(name) is not None), default)

    @property
    def shape(self) -> list[Any]:
        """Of the first result."""
        return [as_expr(size) for size in self.results[0].shape]

    def axis(self, rank: int, name: str = "dim", default: int = 0) -> int:
        return int(self.get(name, default=default)) % max(1, rank)

    def lost(self) -> Lost:
        """Rows that cannot be followed through this op."""
        return Lost(f"{self.op} may change the order of rows")


Result = State | list[State]
Rule = Callable[[RowCall], Result]
