"""Which inputs of a step share memory.

Note [memory by range]. Facts are made for inputs that lie apart (``fx/fake_storages.py``). Captured graphs, copies into
static buffers and compiled pieces are right as long as no input that the graph writes overlaps another one in memory;
inputs that are only read may overlap as they like. That is a fact of a step: the same tensors may be disjoint slices of
one buffer now and the same rows in the next step. So each step compares, by address and extent, what the graph writes
(arguments, parameters, buffers, the cache of the step) with all other inputs. The comparison is repeated only where an
address has changed; steps whose inputs overlap run Dynamo's own graph eagerly, and are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..fx.plan import InputSpec, Plan, SplitOpItem
from ..fx.sizes import symbols_of
from ..memory.ranges import FixedMemory, Range, any_overlap, range_of
from .binding import Binding

__all__ = ["StepMemory"]

#: Sets of addresses that a program remembers as disjoint.
_REMEMBERED = 64


class StepMemory:
    """Compares the memory of a step's inputs.

    Attributes:
        watched: positions of the arguments whose addresses each step compares; empty where the graph writes no input.
    """

    def __init__(self, plan: Plan) -> None:
        tensors = [s for s in plan.inputs if isinstance(s.value, torch.Tensor) and s.value.layout == torch.strided]
        self._fixed = [s for s in tensors if s.kind in ("static", "bound")]
        #: With paged attention between pieces the cache is written behind the graph.
        self._writes_cache = any(isinstance(s, SplitOpItem) and s.op.own_metadata for s in plan.items)
        self._mutated = frozenset(s.position for s in tensors if s.node in plan.mutated)
        users = [s for s in tensors if s.kind == "user"]
        self.writes = bool(self._mutated) or self._writes_cache
        self.watched = tuple(s.position for s in users) if self.writes else ()
        #: Whether the same sizes and addresses mean the same ranges.
        self._stable = all(self._extent_follows(s, plan) for s in users)

    @staticmethod
    def _extent_follows(spec: InputSpec, plan: Plan) -> bool:
        return symbols_of(spec.value.stride()) <= frozenset(plan.symbols)

    def addresses(self, args: Sequence[Any]) -> tuple[int, ...]:
        """Those of the watched arguments."""
        return tuple([args[i].data_ptr() for i in self.watched])

    def overlapping(self, binding: Binding, args: Sequence[Any], step: Any) -> bool:
        """Whether an input that the graph writes overlaps another one in memory."""
        if not self.writes:
            return False
        fixed = binding.fixed
        if fixed is None:
            fixed = binding.fixed = self._fixed_memory(args, step)
        if fixed.overlapping:
            return True
        users: list[tuple[Range, bool]] = []
        for position in self.watched:
            one = range_of(args[position])
            if one is not None:
                written = position in self._mutated
                if (fixed.all if written else fixed.written).meet(one):
                    return True
                users.append((one, written))
        return any_overlap(users)

    def remember(self, known: set[tuple[int, ...]], addresses: tuple[int, ...]) -> None:
        """Notes addresses that were found disjoint, for a program whose sizes they came with."""
        if self._stable:
            if len(known) >= _REMEMBERED:
                known.clear()
            known.add(addresses)

    def _fixed_memory(self, args: Sequence[Any], step: Any) -> FixedMemory:
        written: list[Range] = []
        read: list[Range] = []
        for spec in self._fixed:
            one = range_of(args[spec.position])
            if one is not None:
                (written if spec.position in self._mutated else read).append(one)
        cache = step.cache if step is not None else None
        if self._writes_cache and cache is not None:
            written += [one for one in map(range_of, (*cache.k, *cache.v)) if one is not None]
        return FixedMemory(written, read)
