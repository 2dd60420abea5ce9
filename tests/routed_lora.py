"""Layers with adapters over a router without any loading, and what they compute one token at a time."""

from __future__ import annotations

import torch
from torch import nn

from pcg_compile.lora.packed import decode, pack
from pcg_compile.lora.routing import Router

ADAPTERS, RANK, WIDTH = 3, 2, 6


class Source:
    """Slots by name, without any loading."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def slots_of(self, names):
        self.calls.append("slots_of")
        return [-1 if name is None else "abc".index(name) for name in names]

    def begin_step(self, slots):
        self.calls.append("begin")

    def end_step(self, slots):
        self.calls.append("end")


class Layer(nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.base, self.router = nn.Linear(WIDTH, WIDTH), router
        a, b = torch.randn(ADAPTERS, RANK, WIDTH), torch.randn(ADAPTERS, WIDTH, RANK)
        scalings, ranks = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([2, 1, 2], dtype=torch.int32)
        factors, self.layout = pack(a, b, scalings, ranks, [WIDTH], router.id)
        self.register_buffer("factors", factors)

    @property
    def parts(self):
        return decode(self.layout).views(self.factors, WIDTH)

    def forward(self, x):
        y = self.base(x)
        torch.ops.pcg.lora(y, x, self.factors, self.layout)
        return y

    def expected(self, x, slots):
        """One token at a time; ``slots`` has one for each of x's tokens."""
        y = self.base(x)
        rows, inputs = y.view(-1, WIDTH), x.reshape(-1, WIDTH)
        a, b, scalings, ranks = self.parts
        for row, slot in enumerate(slots):
            if slot >= 0:
                rank = int(ranks[slot])
                delta = inputs[row] @ a[slot, :rank].t() @ b[slot, :, :rank].t()
                rows[row] += scalings[slot] * delta
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source = Source()
        self.router = Router(self.source, ADAPTERS, torch.device("cpu"))
        self.first, self.second = Layer(self.router), Layer(self.router)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return self.second(x)

    def expected(self, x, slots):
        x = torch.relu(self.first.expected(x, slots))
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return self.second.expected(x, slots)
