"""A small model of three pieces and a buffer that every step changes, compiled beside an eager copy."""

from __future__ import annotations

import models  # noqa: F401 - defines the silly ops
import torch
from torch import nn


class Model(nn.Module):
    """Three pieces, two of them equal, with a buffer that every step changes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        x = torch.ops.silly.fresh(self.first(x).relu())
        return torch.ops.silly.fresh(self.second(x)) + self.calls


def pair():
    ours, theirs = Model().eval(), Model().eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def compile_it(model, **options):
    return torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [4, 8, 16], **options})


@torch.no_grad()
def check(compiled, theirs, *sizes):
    for n in sizes:
        x = torch.randn(n, 4)
        torch.testing.assert_close(compiled(x), theirs(x))


def warm(compiled, theirs):
    check(compiled, theirs, 3, 5, 6)
