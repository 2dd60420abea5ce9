"""Calls that Dynamo cannot trace run eagerly, counted; wrong arguments raise what they raise in eager."""

from __future__ import annotations

import pytest
import torch

import pcg_compile as pcg
from pcg_compile.errors import PCGError


@torch.library.custom_op("untraceable_calls::untraceable", mutates_args=())
def untraceable(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@untraceable.register_fake
def _(x):
    raise RuntimeError("no shape for this")


@pytest.mark.parametrize("guards", ["dynamo", "inputs"])
def test_a_call_that_dynamo_cannot_trace_runs_eagerly(guards):
    compiled = pcg.piecewise(buckets=[4], compiler="eager", guards=guards)(lambda x: untraceable(x + 1))
    with torch.no_grad():
        for n in (3, 1, 3):
            x = torch.randn(n, 2)
            torch.testing.assert_close(compiled(x), (x + 1) * 3)
    stats = pcg.stats(compiled)
    (fallback,) = stats.fallbacks
    assert "cannot trace this call" in fallback.reason and "no shape for this" in fallback.reason
    assert fallback.count == 3 and "test_untraceable_calls.py" in fallback.where


def test_a_call_that_dynamo_cannot_trace_is_an_error_under_strict():
    done = []

    def forward(x):
        done.append(1)
        return untraceable(x)

    compiled = pcg.piecewise(buckets=[4], compiler="eager", strict=True)(forward)
    with torch.no_grad(), pytest.raises(PCGError, match="cannot trace this call"):
        compiled(torch.randn(3, 2))
    assert not done


def test_wrong_arguments_are_an_error_in_plain_words():
    """Not Dynamo's, with all that it was about to do."""
    embed = torch.nn.Embedding(8, 4)
    compiled = pcg.piecewise(buckets=[4], compiler="eager")(embed.forward)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Expected tensor for argument #1 'indices'") as caught:
        compiled(torch.ones(3))
    assert type(caught.value) is RuntimeError and len(str(caught.value).splitlines()) < 3
