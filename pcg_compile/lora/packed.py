"""All that adapters have on one layer, in one tensor of bytes.

Each tensor that a layer reads is an input of Dynamo's graph, which it looks up and guards at every step, and whose
address is compared: a microsecond or two, four times on each layer of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch

#: Slices of all layers of one call, as many as the kernels take pointers for.
MOST_SLICES = 4
#: Bytes that each part begins at a multiple of: kernels read 16 at once.
_ALIGN = 32

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class PackedFactors:
    """How a layer's factors lie in their tensor of bytes, and what else its LoRA op has to know.

    Bytes, since a model that is cast to another dtype would cast the ranks with the rest.

    Attributes:
        adapters: slots. rank: the pool's largest. slices: widths of the columns with factors of their own.
        dtype: of a and b. pool: id of the pool's router.
    """

    adapters: int
    rank: int
    slices: tuple[int, ...]
    dtype: torch.dtype
    pool: int = -1

    def encode(self) -> str:
        """As the text that an op takes: a constant of a graph, and one guard."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.pool}/{self.adapters}/{self.rank}/{'+'.join(map(str, self.slices))}/{name}"

    def shapes(self, inputs: int) -> tuple[tuple[int, ...], ...]:
        """Of a ``[adapters, slices * rank, in]``, b ``[adapters, out, rank]``, scalings and ranks ``[adapters]``."""
        a, b = (self.adapters, len(self.slices) * self.rank, inputs), (self.adapters, sum(self.slices), self.rank)
        return a, b, (self.adapters,), (self.adapters,)

    def empty(self, inputs: int, device: torch.device) -> torch.Tensor:
        """A tensor of zeros that holds them: uint8, in one dimension."""
        return torch.zeros(self._places(inputs)[-1][1], dtype=torch.uint8, device=device)

    def views(self, factors: torch.Tensor, inputs: int) -> Factors:
        """The parts: a and b of ``dtype``, scalings float32, ranks int32."""
        dtypes, places = (self.dtype, self.dtype, torch.float32, torch.int32), self._places(inputs)
        a, b, scalings, ranks = (
            factors[first:end].view(dtype).view(shape)
            for shape, dtype, (first, end) in zip(self.shapes(inputs), dtypes, places, strict=True)
        )
        return a, b, scalings, ranks

    def _places(self, inputs: int) -> list[tuple[int, int]]:
        places: list[tuple[int, int]] = []
        for shape, size in zip(self.shapes(inputs), (self.dtype.itemsize, self.dtype.itemsize, 4, 4), strict=True):
            first = -(-places[-1][1] // _ALIGN) * _ALIGN if places else 0
            places.append((first, first + prod(shape) * size))
        return places


def pack(
    a: torch.Tensor, b: torch.Tensor, scalings: torch.Tensor, ranks: torch.Tensor, slices: Sequence[int], pool: int = -1
) -> tuple[torch.Tensor, str]:
    """Factors as the LoRA ops take them: a new tensor, and its encoded layout."""
    layout = PackedFactors(b.shape[0], b.shape[2], tuple(slices), a.dtype, pool)
    factors = layout.empty(a.shape[-1], a.device)
    for part, given in zip(layout.views(factors, a.shape[-1]), (a, b, scalings, ranks), strict=True):
        part.copy_(given)
    return factors, layout.encode()


def renumbered(text: str, pools: Mapping[int, int]) -> str:
    """The encoded layout for the pools of another process, by the numbers that they have in this one."""
    layout = decode(text)
    return replace(layout, pool=pools[layout.pool]).encode()


@lru_cache(maxsize=4096)
def decode(text: str) -> PackedFactors:
    """What :meth:`PackedFactors.encode` wrote."""
    pool, adapters, rank, slices, name = text.split("/")
    return PackedFactors(int(adapters), int(rank), tuple(map(int, slices.split("+"))), getattr(torch, name), int(pool))
