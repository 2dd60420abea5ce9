"""What must hold of a step for a padding request to cover the padding of an op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from .sizes import size_at


@dataclass(frozen=True)
class Request:
    """What the sizes of a graph's symbols leave open about one op in request mode.

    Sizes are ints or expressions of the graph's symbols.

    Attributes:
        tokens: the number of rows.
        entries: the size of ``qo_indptr``, requests + 1.
        lengths: pairs of sizes that must be equal: of ``slot_mapping`` and the number of tokens, ...
        ends: (argument, size): the last entry of a cumulative sum among the call's arguments, and what it must be.
        others: sizes of tensors without tokens and without a role, such as caches. A dimension that is as long as the
            batch may have an entry a request, or a token.
    """

    tokens: Any
    entries: Any
    lengths: tuple[tuple[Any, Any], ...]
    ends: tuple[tuple[fx.Node, Any], ...]
    others: tuple[Any, ...]

    def fits(self, sizes: Mapping[sympy.Symbol, int], bucket: Mapping[sympy.Symbol, int]) -> bool:
        """Whether a step's sizes agree, and nothing but tokens is padded at the bucket."""
        entries, tokens = size_at(self.entries, sizes), size_at(self.tokens, sizes)
        for other in self.others:
            size = size_at(other, sizes)
            if size in (entries, entries - 1) or size != size_at(other, bucket):
                return False
            # A size that is fixed is not the number of tokens, which is dynamic.
            if isinstance(other, sympy.Basic) and size == tokens:
                return False
        return all(size_at(one, sizes) == size_at(other, sizes) for one, other in self.lengths)

    def checker(
        self, sizes: Mapping[sympy.Symbol, int], positions: Mapping[fx.Node, int]
    ) -> Callable[[Sequence[Any], bool], bool]:
        """``fn(args, wait)``: whether the values of a call's arguments agree, for calls of these sizes.

        Values on a device are only read where it may ``wait`` for them.
        """
        wanted = [(positions[node], size_at(end, sizes)) for node, end in self.ends]

        def agree(args: Sequence[Any], wait: bool) -> bool:
            for position, end in wanted:
                indptr: torch.Tensor = args[position]
                if (wait or indptr.device.type == "cpu") and (len(indptr) == 0 or int(indptr[-1]) != end):
                    return False
            return True

        return agree
