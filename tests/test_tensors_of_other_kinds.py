"""Nested tensors, and others without strides of their own: their graphs run eagerly, counted with the reason."""

import re

import pytest
import torch

import pcg_compile as pcg


def _jagged(n):
    return torch.nested.nested_tensor([torch.randn(n, 4), torch.randn(2, 4)], layout=torch.jagged)


def _from_values(x):
    return (torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 2, x.shape[0]])) * 2).values()


KINDS = {
    "jagged": (_jagged, lambda x: (x * 2 + 1).values(), r"input x is a nested tensor"),
    "jagged, made inside": (lambda n: torch.randn(n, 4), _from_values, "gives a nested tensor"),
    "mkldnn": (lambda n: torch.randn(n, 4).to_mkldnn(), lambda x: x.to_dense() * 2, "layout torch._mkldnn"),
}


@pytest.fixture(autouse=True)
def _inference():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


#: Each way to compile, by what makes it of a function and options.
ENTRIES = {
    "compile": lambda function, **options: torch.compile(function, backend="pcg", options=options),
    "dynamo": lambda function, **options: pcg.piecewise(**options)(function),
    "inputs": lambda function, **options: pcg.piecewise(guards="inputs", **options)(function),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_runs_eagerly_and_each_call_is_counted(kind, entry):
    make, function, reason = KINDS[kind]
    compiled = ENTRIES[entry](function, compiler="eager", buckets=[4, 8])
    for n in (3, 5, 4, 5):
        x = make(n)
        torch.testing.assert_close(compiled(x), function(x))
    (fallback,) = pcg.stats(compiled).fallbacks
    assert fallback.count == 4
    assert re.search(reason, fallback.reason)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_strict_names_it(kind, entry):
    make, function, reason = KINDS[kind]
    compiled = ENTRIES[entry](function, compiler="eager", strict=True)
    with pytest.raises(Exception, match=reason):
        compiled(make(3))


VALUES = {
    "conjugated": lambda n: torch.randn(n, 4, dtype=torch.complex64).conj(),
    "negated": lambda n: torch.randn(n, 4, dtype=torch.complex64).conj().imag,
    "complex": lambda n: torch.randn(n, 4, dtype=torch.complex64),
    "a subclass": lambda n: torch.randn(n, 4).as_subclass(_Plain),
    "a parameter": lambda n: torch.nn.Parameter(torch.randn(n, 4), requires_grad=False),
    "fp8": lambda n: torch.randn(n, 4).to(torch.float8_e4m3fn).view(torch.uint8),
    "quantized": lambda n: torch.quantize_per_tensor(torch.randn(n, 4), 0.1, 0, torch.qint8),
    "sparse": lambda n: torch.randn(n, 4).relu().to_sparse(),
}


class _Plain(torch.Tensor):
    """Nothing but another type."""


@pytest.mark.parametrize("kind", VALUES)
def test_other_kinds_are_right(kind):
    def function(x):
        x = x.dequantize() if x.is_quantized else x.to_dense() if x.is_sparse else x
        return x * 2

    compiled = torch.compile(function, backend="pcg", options={"compiler": "eager", "buckets": [4, 8]})
    for n in (3, 5, 4):
        x = VALUES[kind](n)
        torch.testing.assert_close(compiled(x), function(x))
