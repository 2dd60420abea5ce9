"""Shapes that change in place, of values on either side of a boundary between pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pcg_compile as pcg

aten = torch.ops.aten


@pcg.split_op("inplace_shapes::double", fake=lambda x: torch.empty_like(x))
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


CHANGES = {
    "unsqueeze_": lambda t: t.unsqueeze_(0),
    "t_": lambda t: t.t_(),
    "swapaxes_": lambda t: t.swapaxes_(0, 1),
    "transpose_ and back": lambda t: t.transpose_(0, 1).transpose_(0, 1),
    "twice": lambda t: t.unsqueeze_(0).unsqueeze_(1).squeeze_(0),
    "aten": lambda t: aten.transpose_(aten.unsqueeze_(t, 1), 0, 1),
    "overload": lambda t: aten.squeeze_.dim(aten.unsqueeze_.default(t, 0), 0),
    "written": lambda t: t.add_(1).t_().mul_(2),
}
PLACES = {
    "result of a cut": lambda x, change: (lambda t: (change(t), t + 1))(torch.ops.inplace_shapes.double(x + 1)),
    "inside a piece": lambda x, change: (lambda t: (change(t), t + 1))(x * 2),
    "ahead of a cut": lambda x, change: (lambda t: (change(t), torch.ops.inplace_shapes.double(t) + t))(x * 2),
    "after a view": lambda x, change: (lambda t: (lambda v: (change(t), v + 1, t + 1))(t[:, :2]))(
        torch.ops.inplace_shapes.double(x)
    ),
}


def strides(tensor: torch.Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_shapes_that_change_in_place(place, change):
    torch._dynamo.reset()

    def function(x: torch.Tensor) -> Any:
        return PLACES[place](x, CHANGES[change])

    compiled = torch.compile(function, backend="pcg", options={"compiler": "eager", "buckets": [8]})
    with torch.no_grad():
        for n in (4, 5, 6):
            x = torch.randn(n, 4)
            got, want = compiled(x), function(x)
            for one, other in zip(got, want, strict=True):
                assert torch.equal(one, other) and strides(one) == strides(other), n
            assert [a is b for a in got for b in got] == [a is b for a in want for b in want]
    assert pcg.stats(compiled).replays > 0
