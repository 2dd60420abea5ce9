"""LoRA layers that read the same x share one call, and only where that changes nothing."""

from __future__ import annotations

import pytest
import torch
from routed_lora import ADAPTERS, WIDTH, Layer, Source
from torch import nn

import pcg_compile as pcg
from pcg_compile.lora.routing import Router

NAMES = ["a", "b", "c", None]


def three(m, x):
    return [layer(x) for layer in m.layers]


def two_pairs(m, x):
    q, k, v = three(m, x)
    z = torch.tanh(q)
    return [m.layers[0](z), m.layers[1](z) * k, v]


def views_between(m, x):
    q = m.layers[0](x).view(-1, 2, WIDTH // 2).transpose(0, 1)
    q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6)
    k = m.layers[1](x).view(-1, 2, WIDTH // 2)
    return [q, k, m.layers[2](x)[..., ::2]]


def x_is_written(m, x):
    x = x * 1
    q = m.layers[0](x)
    x.add_(1)
    return [q, m.layers[1](x)]


def y_is_read_before(m, x):
    q = m.layers[0](x)
    k = m.layers[1].base(x)
    copy = k * 2
    m.layers[1].add(k, x)
    return [q, copy, k]


def y_is_made_before_and_read_between(m, x):
    k = m.layers[1].base(x)
    view = k.view(-1)
    q = m.layers[0](x)
    copy = view + 1
    m.layers[1].add(k, x)
    return [q, copy, k, view]


def y_is_made_of_another(m, x):
    q = m.layers[0](x)
    k = m.layers[1].base(x) + q
    m.layers[1].add(k, x)
    return [q, k]


def x_is_y(m, x):
    q = m.layers[0](x)
    m.layers[1].add(q, x)
    return [q]


def slices_of_one(m, x):
    both = torch.cat([m.layers[0].base(x), m.layers[1].base(x)], -1)
    m.layers[0].add(both[..., :WIDTH], x)
    m.layers[1].add(both[..., WIDTH:], x)
    return [both]


def a_buffer_is_written(m, x):
    q = m.layers[0](x)
    m.steps.add_(1)
    k = m.layers[1](x) * m.steps
    return [q, k]


def autocast_between(m, x):
    q = m.layers[0](x)
    with torch.autocast("cpu", torch.bfloat16):
        k = m.layers[1].base(x)
    k = k.float()
    m.layers[1].add(k, x)
    return [q, k]


def a_long_way(m, x):
    q = m.layers[0](x)
    k = m.layers[1].base(x)
    for i in range(5):
        k = torch.sin(k) + i
    m.layers[1].add(k, x)
    return [q, k]


def seven(m, x):
    return [layer(x) for layer in (*m.layers, *m.layers, m.layers[0])]


def tied(m, x):
    return [m.layers[0](x), m.layers[0](x), m.layers[0](x) * 2]


def another_pool(m, x):
    return [m.layers[0](x), m.other(x), m.layers[1](x)]


def attention_between(m, x):
    q, k, v = (t.view(1, 1, -1, WIDTH) for t in three(m, x))
    out = nn.functional.scaled_dot_product_attention(q, k, v).view(-1, WIDTH)
    return [out, m.layers[0](x)]


def random_between(m, x):
    q = m.layers[0](x)
    k = m.layers[1].base(x) + torch.rand_like(x) * 0
    m.layers[1].add(k, x)
    return [q, k]


# What the model does, and how many calls its layers share; None where only the values count.
MODELS = {
    three: 1, two_pairs: 2, views_between: 1, x_is_written: 2, y_is_read_before: 2,
    y_is_made_before_and_read_between: 2, y_is_made_of_another: 2, x_is_y: 2, slices_of_one: 2,
    a_buffer_is_written: 2, autocast_between: 2, a_long_way: 2, seven: 2, tied: 1, another_pool: 3,
    attention_between: 2, random_between: 2,
}  # fmt: skip


class Bare(Layer):
    def add(self, y, x):
        torch.ops.pcg.lora(y, x, self.factors, self.layout)


class Model(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        torch.manual_seed(0)
        router = Router(Source(), ADAPTERS, torch.device("cpu"))
        self.layers = nn.ModuleList(Bare(router) for _ in range(3))
        for i, layer in enumerate(self.layers):
            layer.parts[3].copy_(torch.tensor([[2, 1, 2], [0, 2, 1], [1, 1, 0]][i]))
        self.other = Bare(Router(Source(), ADAPTERS, torch.device("cpu")))
        self.register_buffer("steps", torch.ones(()))
        self.body = body

    def forward(self, x):
        return tuple(self.body(self, x))


def step(call, x, lengths, names):
    with pcg.step(pcg.Batch(lengths, adapters=names)), torch.no_grad():
        return [t.clone() for t in call(x.clone())]


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("body", MODELS, ids=lambda body: body.__name__)
def test_layers_of_one_x(body, compiler):
    torch._dynamo.reset()
    model, reference = Model(body), Model(body)
    compiled = torch.compile(model, backend="pcg", dynamic=True, options={"buckets": [4, 16], "compiler": compiler})
    for n, lengths, names in [(3, [1, 2], NAMES[:2]), (5, [2, 2, 1], ["c", None, "a"]), (9, [4, 5], ["b", "c"])]:
        x = torch.randn(n, WIDTH)
        for got, want in zip(step(compiled, x, lengths, names), step(reference, x, lengths, names), strict=True):
            tolerance = 2e-2 if body is autocast_between else 1e-5
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    report = str(pcg.explain(compiled))
    assert f"in {MODELS[body]} calls" in " ".join(report.replace("│", " ").split())


def test_random_numbers_come_in_their_order():
    def body(m, x):
        q = m.layers[0](x)
        first = torch.rand(3)
        k = m.layers[1].base(x) + torch.rand(3).sum()
        m.layers[1].add(k, x)
        return [q, first, k]

    torch._dynamo.reset()
    model = Model(body)
    compiled = torch.compile(model, backend="pcg", dynamic=True, options={"buckets": [4], "compiler": "eager"})
    x = torch.randn(3, WIDTH)
    for _ in range(3):
        torch.manual_seed(7)
        got = step(compiled, x, [3], ["b"])
        torch.manual_seed(7)
        torch.testing.assert_close(got, step(model, x, [3], ["b"]))
