"""Programs that move rows about between LoRA layers, and what they must give.

A program is written once, as a function ``program(p, x, *arguments)``, and run twice: by a model with an adapter pool,
and one row after the other with each token's adapter merged into the weights. The second carries the number of each
row's token in one more column; a row made of two tokens has none.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from adapters import save_plain
from safetensors.torch import load_file
from torch import nn

import pcg_compile as pcg
from pcg_compile.errors import PCGError

WIDTH, LAYERS = 4, 3
REFUSED, RIGHT = "refused", "right"


class Plain(nn.Module):
    """The program as users write it."""

    def __init__(self, program):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.program = program

    def forward(self, x, *arguments):
        return self.program(self, x, *arguments)

    def lin(self, k, x):
        return self.layers[k](x)

    def act(self, x):
        return torch.tanh(x)

    def add(self, x, y):
        return x + y

    def rows(self, *shape):
        """Rows that no token is in."""
        return torch.full((*shape, WIDTH), 0.5)

    @property
    def width(self):
        return WIDTH


class Followed:
    """The same, with the number of its token behind each row."""

    def __init__(self, plain, slots, factors):
        self.plain, self.slots, self.factors = plain, slots, factors
        self.unknown = False

    @property
    def width(self):
        return WIDTH + 1

    def start(self, x):
        ids = torch.arange(x.numel() // WIDTH, dtype=x.dtype).view(*x.shape[:-1], 1)
        return torch.cat([x, ids], -1)

    def lin(self, k, x):
        y = self.plain.layers[k](x[..., :-1])
        rows = y.reshape(-1, WIDTH).clone()
        for row, (*_, token) in enumerate(x.reshape(-1, WIDTH + 1)):
            values = x.reshape(-1, WIDTH + 1)[row, :-1]
            if token.isnan():
                self.unknown = True
            elif (slot := self.slots[int(token)]) is not None:
                a, b = self.factors[slot][k]
                rows[row] += b @ (a @ values)
        return torch.cat([rows.view(y.shape), x[..., -1:]], -1)

    def act(self, x):
        return torch.cat([torch.tanh(x[..., :-1]), x[..., -1:]], -1)

    def add(self, x, y):
        x, y = torch.broadcast_tensors(x, y)
        ids = torch.where(x[..., -1:] == y[..., -1:], x[..., -1:], torch.nan)
        return torch.cat([x[..., :-1] + y[..., :-1], ids], -1)

    def rows(self, *shape):
        return torch.cat([torch.full((*shape, WIDTH), 0.5), torch.full((*shape, 1), torch.nan)], -1)


def adapters_for(names=("a", "b")):
    """Folders of adapters on every layer, and their factors."""
    torch.manual_seed(1)
    folders, factors = {}, {}
    for name in names:
        modules = {f"layers.{k}": (WIDTH, WIDTH) for k in range(LAYERS)}
        folders[name] = save_plain(Path(tempfile.mkdtemp()) / name, modules, 2)
        weights = load_file(folders[name] / "adapter_model.safetensors")
        factors[name] = [
            tuple(weights[f"base_model.model.layers.{k}.lora_{f}.weight"] for f in "AB") for k in range(LAYERS)
        ]
    return folders, factors


def adapter_on(layers):
    """A folder with an adapter on some layers."""
    return save_plain(Path(tempfile.mkdtemp()) / "x", dict.fromkeys(layers, (WIDTH, WIDTH)), 2)


FOLDERS, FACTORS = adapters_for()


class Check:
    """Runs one program at many sizes; each call says whether it was right or refused, and fails on anything else."""

    def __init__(self, program, dynamic: Any, arguments=(), **options):
        torch._dynamo.reset()
        self.plain = Plain(program).eval()
        self.base = Plain(program).eval()
        self.base.load_state_dict(self.plain.state_dict())
        self.pool = pcg.lora.AdapterPool(self.plain, 2, 2, [f"layers.{k}" for k in range(LAYERS)])
        for name, folder in FOLDERS.items():
            self.pool.load(name, folder)
        self.program = program
        options = {"buckets": [4, 8], "compiler": "eager", **options}

        if arguments:

            def run(x, rows):
                return self.plain(x, rows)
        else:

            def run(x):
                return self.plain(x)

        self.run = pcg.piecewise(dynamic=dynamic, **options)(run)
        self.reason = ""

    @torch.no_grad()
    def __call__(self, lengths, names, x, *arguments) -> str:
        slots = [name for length, name in zip(lengths, names, strict=True) for _ in range(length)]
        followed = Followed(self.base, slots, FACTORS)
        want = self.program(followed, followed.start(x), *arguments)[..., :WIDTH]
        try:
            with pcg.step(pcg.Batch(lengths, adapters=names)):
                got = self.run(x.clone(), *arguments)
        except PCGError as error:
            assert "layers." in str(error), error
            self.reason = str(error)
            return REFUSED
        if not followed.unknown or len(set(names)) == 1:
            if followed.unknown:
                want = self._of_one(names[0], x, arguments)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            return RIGHT
        raise AssertionError("rows of no one token got some adapter")

    def _of_one(self, name, x, arguments):
        merged = Plain(self.program).eval()
        merged.load_state_dict(self.base.state_dict())
        if name is not None:
            for k, layer in enumerate(merged.layers):
                a, b = FACTORS[name][k]
                layer.weight += b @ a
        return merged(x, *arguments)
