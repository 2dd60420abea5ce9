"""Shapes that change in place, of values on either side of a boundary between pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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


IDLE = {
    "in evaluation": lambda x: F.dropout(x, 0.5, training=False),
    "of nothing": lambda x: F.dropout(x, 0, True),
    "a module": nn.Dropout(0.3).eval(),
}


@pytest.mark.parametrize("of", ["the argument", "a value"])
@pytest.mark.parametrize("name", IDLE)
def test_a_dropout_that_drops_nothing_gives_its_argument(name, of):
    """torch's fake tensors show a copy: what is written to it would not reach the argument."""

    def function(x):
        x = x if of == "the argument" else x * 2
        y = IDLE[name](x)
        y.add_(1)
        return y, x * 1

    torch._dynamo.reset()
    run = pcg.piecewise(compiler="eager", buckets=[4, 8])(function)
    with torch.no_grad():
        for n in (5, 1, 3):
            ours = torch.randn(n, 4)
            theirs = ours.clone()
            got, want = run(ours), function(theirs)
            torch.testing.assert_close((*got, ours), (*want, theirs))
            assert (got[0] is ours) == (want[0] is theirs)


def test_a_detached_view_of_a_parameter_requires_no_gradients():
    layer = nn.Linear(4, 4)

    def function(x):
        weight, bias = layer.weight, layer.bias
        return weight.detach(), bias.data[1:], weight.detach().view(-1), weight.t(), bias, x @ weight

    torch._dynamo.reset()
    run = pcg.piecewise(compiler="eager", buckets=[4, 8])(function)
    with torch.no_grad():
        for n in (3, 5):
            x = torch.randn(n, 4)
            got, want = run(x), function(x)
            torch.testing.assert_close(got, want)
            assert [t.requires_grad for t in got] == [t.requires_grad for t in want]
            assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in zip(got[:5], want, strict=False))
