"""Small functions that went wrong once, or well might: values, layouts, aliases, errors, random state are eager's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pcg_compile as pcg

SIZES = [5, 3, 8, 1, 17, 2, 7, 16, 4, 20, 5]
OPTIONS = {"buckets": [4, 8, 16], "compiler": "eager"}
WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
KEPT = torch.arange(16.0).view(4, 4)
LINEAR = nn.Linear(4, 4)
CONV = nn.Conv1d(4, 4, 3, padding=1)


def tokens(n):
    return (torch.randn(n, 4),)


@pcg.split_op("adversarial::attend", mutates_args=("out",))
def attend(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_((q @ k.t()).softmax(-1) @ k)


@pcg.split_op("adversarial::add_sum", mutates_args=("x",), fake=lambda x: x.new_empty(x.shape[1:]))
def add_sum(x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x.sum(0)


@torch.library.custom_op("adversarial::peak", mutates_args=())
def peak(x: torch.Tensor) -> torch.Tensor:
    """Rows depend on the others only once some value is large."""
    return x * (2 if x.abs().max() > 100 else 1)


@torch.library.custom_op("adversarial::capacity", mutates_args=())
def capacity(x: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """Of each kind, half as many rows as there are."""
    earlier = (kind[:, None] == kind[None]).tril().sum(1)
    return x * (earlier <= x.shape[0] // 2)[:, None]


peak.register_fake(torch.empty_like)
capacity.register_fake(lambda x, kind: torch.empty_like(x))


def attention(x, out=None):
    out = torch.empty_like(x) if out is None else out
    torch.ops.adversarial.attend(x, x + 1, out)
    return out


def into_one_buffer_twice(x):
    out = torch.empty_like(x)
    attention(x, out)
    y = out * 2
    attention(y, out)
    return out + y


def around_a_write(x):
    y = x * 2
    before, part = y.clone(), y[:, :2]
    total = torch.ops.adversarial.add_sum(y[:, 1:])
    after = attention(y)
    y.mul_(0.5)
    return before, part, total, after, y


def gradient_in_a_region(x):
    with torch.enable_grad():
        y = LINEAR(x)
    return y, y.detach() * 2


def gives_data(x):
    x.data = x * 2
    return x + 1


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("kept", torch.zeros(24, 4))

    def forward(self, x):
        self.calls += 1
        self.kept[: x.shape[0]] = x
        return attention(self.kept[: x.shape[0]] * 1.0) + self.calls


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x) * 2


#: Name: (function, arguments for n tokens). What needs no captured graph says so in ``UNCAPTURED``.
CASES = {
    # Sizes as numbers.
    "1 / n": (lambda x: (x * (1 / x.shape[0]), x + 1), tokens),
    "sizes divided": (lambda x: (x.shape[0] / 2, torch.ones(math.ceil(x.shape[0] / 3), 2) * 2, x + 1), tokens),
    "sizes rounded": (lambda x: (x * round(x.shape[0] / 3, 1), x[: round(x.shape[0] / 2)] + 1), tokens),
    "sizes cut": (lambda x: x[: int(x.shape[0] ** 0.5)] * math.trunc(x.shape[0] / 2), tokens),
    "sizes and bits": (lambda x: (x * (x.shape[0] ^ 3), torch.ones(x.shape[0] | 1) + (x.shape[0] & 6)), tokens),
    "sine of a size": (lambda x: x * math.sin(x.shape[0]) + (x.shape[0] / 2) % 1.0, tokens),
    "positions": (lambda x: x + torch.arange(1, x.shape[0] + 1)[:, None], tokens),
    "triangle": (lambda x: torch.ones(x.shape[0], x.shape[0]).tril() + x[:, :1], tokens),
    # Arguments.
    "expanded": (lambda x: x * 2 + 1, lambda n: (torch.randn(1, 4).expand(n, 4),)),
    "at times expanded": (lambda x: x * 2, lambda n: (torch.randn(1, 4).expand(n, 4) if n % 2 else torch.randn(n, 4),)),
    "every other row": (lambda x: (x.add_(1), x * 2), lambda n: (torch.randn(2 * n, 4)[::2],)),
    "at times transposed": (
        lambda x: (x.add_(1), x * 2),
        lambda n: (torch.randn(4, n).t() if n % 2 else torch.randn(n, 4),),
    ),
    "twice the same": (lambda x, y: (x.add_(y), x * y), lambda n: tokens(n) * 2),
    "overlapping": (lambda x, y: (x.add_(1), y * 2), lambda n: (lambda t: (t[:n], t[1:]))(torch.randn(n + 1, 4))),
    "a number": (lambda x, s: x * s + 1, lambda n: (torch.randn(n, 4), n * 0.37)),
    "a scalar tensor": (lambda x, s: (x * s, s.add_(1))[0], lambda n: (torch.randn(n, 4), torch.tensor(n * 0.3))),
    "other memory": (gives_data, tokens),
    "one row": (lambda x, y: x + y, lambda n: (torch.randn(n, 4), torch.randn(1, 4))),
    # Results.
    "the argument": (lambda x: (x.view(-1), x.add_(1)), tokens),
    "expanded results": (lambda x: (lambda y: (y, y.expand(-1, 4), y[:1]))(x[:, :1] * 2), tokens),
    "nested": (lambda x: {"a": x * 2, "b": [None, (x.shape, {"c": x[1:]})]}, tokens),
    "squeezed": (lambda x: (x.squeeze(0) * 2, x[:, None].squeeze(1)), tokens),
    "one result twice": (lambda x: (lambda y: (y, y, y.t()))(x * 2), tokens),
    "complex": (lambda x: (x.real * 2, x.conj(), x.imag), lambda n: (torch.randn(n, 4, dtype=torch.complex64),)),
    "bytes": (
        lambda x: ((x.float() * 2).to(x.dtype), ~(x == 1)),
        lambda n: (torch.randint(0, 5, (n, 4), dtype=torch.uint8),),
    ),
    # Tokens that meet.
    "convolution": (lambda x: CONV(x.t()[None])[0].t() + 1, tokens),
    "interpolation": (lambda x: F.interpolate(x.t()[None], scale_factor=2.0) + 1, tokens),
    "running statistics": (Norm, lambda n: (torch.randn(n + 1, 4),)),
    "shifted": (lambda x: torch.cat([torch.zeros(1, 4), x[:-1]]) * 2 + x, tokens),
    "half": (lambda x: (x * 2)[: x.shape[0] // 2] + (x * 2)[-1], tokens),
    "outer": (lambda x: x[:, :1] @ x[:, :1].t(), tokens),
    "rows": (lambda x, i: x[i] + 1, lambda n: (torch.randn(n, 4), torch.randint(-n, n, (n // 2 + 1,)))),
    "narrow rows": (lambda x, i: x[i] + 1, lambda n: (torch.randn(n, 4), torch.randint(-n, n, (3,)).int())),
    "the same row again": (lambda x, i: x[i] + 1, lambda n: (torch.randn(n, 4), torch.tensor([-1]).expand(n))),
    "rows of two": (
        lambda x, y, i: x[i] + y[i],
        lambda n: (torch.randn(n, 4), torch.randn(n + 1, 4), torch.randint(-n, n, (3,))),
    ),
    "rows, some fixed": (
        lambda x, y, i: (x * 2)[i] + KEPT[i],
        lambda n: (torch.randn(n + 4, 4), torch.randn(n, 4), torch.randint(-4, 4, (3,))),
    ),
    "no such row": (lambda x, i: x[i] + 1, lambda n: (torch.randn(n, 4), torch.tensor([n if n % 2 else -n, 0]))),
    "no such row below": (lambda x, i: x[i] + 1, lambda n: (torch.randn(n, 4), torch.tensor([-n - 1 if n % 2 else 0]))),
    "a capacity": (lambda x, i: capacity(x, i) + 1, lambda n: (torch.randn(n, 4), torch.randint(0, 4, (n,)))),
    "a peak": (lambda x: peak(x) + 1, lambda n: (torch.randn(n, 4) + (200 if n in (7, 8) else 0),)),
    "random": (lambda x: attention(x + torch.rand(4)) + torch.rand(4), tokens),
    "random rows": (lambda x: F.dropout(x, 0.5) + 1, tokens),
    "chosen by data": (lambda x: attention((x * 2)[x[:, 0] > -1]) @ WEIGHT, tokens),
    # Split ops.
    "one buffer": (into_one_buffer_twice, tokens),
    "around a write": (around_a_write, tokens),
    "into an argument": (lambda x, out: (attention(x, out), x * 2)[1], lambda n: tokens(n) + tokens(n)),
    "into a view": (lambda x: (lambda b: (attention(x, b[1:, 2:6]), b * 2)[1])(torch.zeros(x.shape[0] + 1, 8)), tokens),
    "into itself": (lambda x: (lambda y: (attention(y, y), y * 2)[1])(x * 1), tokens),
    "buffers": (Counter, tokens),
    # Transforms, regions, branches.
    "vmap": (lambda x: torch.vmap(lambda c: c - c.mean(), in_dims=1, out_dims=1)(x) * 2, tokens),
    "gradient": (lambda x: torch.func.grad(lambda y: (y**3).sum())(x) * 2, tokens),
    "jvp": (lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1] * 2, tokens),
    "gradient in a region": (gradient_in_a_region, tokens),
    "cond": (lambda x: torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x + 1, (x,)) * 2, tokens),
    "raises": (lambda x: (x * 2)[4], tokens),
    "breaks": (lambda x: (torch._dynamo.graph_break(), (x * 2).relu())[1] * 3, tokens),
}  # fmt: skip
#: Cases without any replay at changing sizes.
UNCAPTURED = {
    "1 / n", "sizes divided", "sizes rounded", "sizes cut", "sizes and bits", "sine of a size",
    "other memory", "complex", "convolution", "interpolation", "running statistics", "half", "a peak", "a capacity",
    "rows of two", "rows, some fixed", "random rows", "jvp", "vmap", "gradient in a region",
}  # fmt: skip


def tensors_of(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_of(v)]
    return [value] if isinstance(value, torch.Tensor) else []


def others_of(value):
    if isinstance(value, dict):
        return {k: others_of(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [others_of(v) for v in value]
    return "tensor" if isinstance(value, torch.Tensor) else (type(value), value)


def aliases(results, arguments):
    """Which results are an argument or another result, or lie in the memory of one."""
    everything = [*arguments, *results]
    return [
        (i, j, everything[j] is t, everything[j].untyped_storage().data_ptr() == t.untyped_storage().data_ptr())
        for i, t in enumerate(results)
        for j in range(len(arguments) + i)
        if t.numel() and everything[j].numel()
    ]


def same(got, want):
    assert (got.shape, got.dtype, got.requires_grad) == (want.shape, want.dtype, want.requires_grad)
    assert got.is_conj() == want.is_conj()
    strides = zip(got.shape, got.stride(), want.stride(), strict=True)
    assert 0 in got.shape or all(a == b for size, a, b in strides if size > 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def attempt(function, arguments):
    torch.manual_seed(3)
    try:
        return function(*arguments), None, torch.get_rng_state()
    except Exception as error:
        return None, type(error), torch.get_rng_state()


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    torch._dynamo.reset()
    function, make = CASES[name]
    ours = function() if isinstance(function, type) else function
    theirs = copy.deepcopy(ours) if isinstance(ours, nn.Module) else ours
    run = pcg.piecewise(**OPTIONS)(ours.forward if isinstance(ours, nn.Module) else ours)
    kept = []
    with torch.no_grad():
        for n in SIZES:
            torch.manual_seed(n)
            mine = make(n)
            torch.manual_seed(n)
            other = make(n)
            want, want_error, want_state = attempt(theirs, other)
            got, error, state = attempt(run, mine)
            assert error is want_error
            if error is not None:
                continue
            assert others_of(got) == others_of(want)
            arguments, results = tensors_of((mine, got)), tensors_of(got)
            for one, two in zip(arguments, tensors_of((other, want)), strict=True):
                same(one, two)
            if isinstance(ours, nn.Module):
                for one, two in zip(ours.buffers(), theirs.buffers(), strict=True):
                    same(one, two)
            assert aliases(results, tensors_of(mine)) == aliases(tensors_of(want), tensors_of(other))
            assert torch.equal(state, want_state)
            inputs = {t.untyped_storage().data_ptr() for t in tensors_of(mine)}
            kept += [(t, t.clone()) for t in results if t.untyped_storage().data_ptr() not in inputs]
    for result, then in kept:
        torch.testing.assert_close(result, then, rtol=0, atol=0, equal_nan=True)
    stats = pcg.stats(run)
    assert (stats.replays == 0) == (name in UNCAPTURED)
    assert stats.replays or stats.fallbacks


@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
def test_a_decorated_forward_is_captured(region):
    """Called with gradients enabled, but computing none."""
    torch._dynamo.reset()
    function = region()(lambda x: (LINEAR(x) * 2, x.add_(1), x[1:]))
    run = torch.compile(function, backend="pcg", options=OPTIONS)
    for n in SIZES:
        x = torch.randn(n, 4)
        other = x.clone()
        want, got = function(other), run(x)
        assert [t.requires_grad for t in got] == [False] * 3
        assert [t.is_inference() for t in got] == [t.is_inference() for t in want]
        for one, two in zip((*got, x), (*want, other), strict=True):
            same(one, two)
    assert pcg.stats(run).replays > 5
    assert torch.is_grad_enabled()
