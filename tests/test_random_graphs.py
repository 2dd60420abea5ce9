"""Random graphs: whatever is read, viewed or written around split ops, values and strides are eager's at every size."""

from __future__ import annotations

import os

import models  # noqa: F401 - defines the silly ops
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import pcg_compile as pcg

EXAMPLES = int(os.environ.get("PCG_EXAMPLES", 2000 if os.environ.get("PCG_NIGHTLY") else 80))
NIGHTLY = bool(os.environ.get("PCG_NIGHTLY"))
# Shrinking compiles hundreds of graphs more: by hand, at night.
PHASES = list(Phase) if NIGHTLY else [Phase.explicit, Phase.generate]
WIDTH = 4
WEIGHT = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)) / 2
SIZES = st.lists(st.integers(1, 18), min_size=3, max_size=5)

# Each takes and gives [n, WIDTH] unless its name says otherwise.
UNARY = {
    "relu": torch.relu,
    "scale": lambda x: x * 0.5 + 1,
    "linear": lambda x: x @ WEIGHT,
    "softmax": lambda x: x.softmax(-1),
    "normed": lambda x: torch.nn.functional.layer_norm(x, (WIDTH,)),
    "clone": lambda x: x.clone(),
    "double view": lambda x: x.reshape(-1, 2).tanh().reshape(-1, WIDTH),
    "transposed": lambda x: x.t().cos().t(),
    "sizes": lambda x: x + torch.zeros(x.size()),
    "cumsum": lambda x: (x * 0.1).cumsum(0),
    "minus mean": lambda x: x - x.mean(0),
    "first": lambda x: x + x[0],
    "last": lambda x: x + x[-1],
    "by size": lambda x: x / x.shape[0],
    "flip": lambda x: x.flip(0),
    "fresh": lambda x: torch.ops.silly.fresh(x) * 0.3,
    "attention": lambda x: _attention(x),
    "two": lambda x: _two(x),
}
BINARY = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x.tanh() * y.tanh(),
    "attend to both": lambda x, y: _attention(x, y),
}
# In place: on the value itself, or on a view of it.
IN_PLACE = {
    "add_": lambda x, y: x.add_(y.detach().tanh()),
    "mul_": lambda x, y: x.mul_(0.5),
    "column": lambda x, y: x[:, 1].add_(1),
    "columns": lambda x, y: x[:, :2].copy_(y[:, 2:].clone()),
    "row": lambda x, y: x[0].mul_(0.5),
    "view": lambda x, y: x.view(-1, 2)[:, 0].add_(0.25),
    "op": lambda x, y: torch.ops.silly.attention(y * 0.2, y * 0.3, y * 0.1, x),
}


def _attention(x, y=None):
    y = x if y is None else y
    out = torch.empty_like(x)
    torch.ops.silly.attention(x * 0.3, y * 0.2, y, out)
    return out


def _two(x):
    a, b = torch.ops.silly.two(x)
    return a * 0.5 + torch.cat([b, b], -1)


step_of = st.one_of(
    st.tuples(st.just("unary"), st.sampled_from(sorted(UNARY)), st.integers(0, 9)),
    st.tuples(st.just("binary"), st.sampled_from(sorted(BINARY)), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("in place"), st.sampled_from(sorted(IN_PLACE)), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("alias"), st.sampled_from(["same", "view", "columns"]), st.integers(0, 9)),
)


def build(steps, outputs):
    """A function of two tensors [n, WIDTH] from a list of steps on a growing list of values."""

    def function(a, b):
        values, others = [a, b], []
        for kind, name, *where in steps:
            picked = [values[i % len(values)] for i in where]
            if kind == "unary":
                values.append(UNARY[name](*picked))
            elif kind == "binary":
                values.append(BINARY[name](*picked))
            elif kind == "in place":
                IN_PLACE[name](*picked)
            elif name == "same":
                values.append(picked[0].view(picked[0].shape))
            elif name == "view":
                others.append(picked[0].reshape(-1))
            else:
                others.append(picked[0][:, 1:3])
        chosen = [values[i % len(values)] for i in outputs]
        return (*chosen, *others, a.shape[0] * 2)

    return function


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=not NIGHTLY,
    phases=PHASES,
)
# A view of what a split op wrote, in a step that runs at its exact size: its strides.
@example([("unary", "attention", 0), ("unary", "by size", 0), ("alias", "columns", 2)], [0], [1, 1, 2])
@given(st.lists(step_of, min_size=1, max_size=8), st.lists(st.integers(0, 9), min_size=1, max_size=3), SIZES)
def test_values_are_eagers(steps, outputs, sizes):
    torch._dynamo.reset()
    function = build(steps, outputs)
    run = pcg.piecewise(buckets=[4, 8, 16], compiler="eager")(function)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n in sizes:
            ours = [torch.randn(n, WIDTH, generator=generator) for _ in range(2)]
            theirs = [t.clone() for t in ours]
            want = function(*theirs)
            got = run(*ours)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            for ours_out, their_out in zip(got, want, strict=True):
                if isinstance(their_out, torch.Tensor):
                    assert ours_out.stride() == their_out.stride()


def test_the_generator_reaches_captured_graphs():
    """The test above would be empty if nothing were captured."""
    torch._dynamo.reset()
    run = pcg.piecewise(buckets=[4], compiler="eager")(
        build([("unary", "fresh", 0), ("in place", "add_", 1, 0)], [0, 2])
    )
    with torch.no_grad():
        run(torch.randn(3, WIDTH), torch.randn(3, WIDTH))
    assert pcg.stats(run).replays > 0
