"""Facts kept through a rewrite equal facts traced again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from declared_metadata import WIDTH, Packed, indptr
from paged_model import Model, Traffic
from same_facts import Facts, compare
from torch import fx

from pcg_compile import backend
from pcg_compile.fx.facts import Calls, NodeFacts, trace_facts, update_facts


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compares facts wherever a pass has rewritten a graph; how many nodes each of those had."""
    seen: list[int] = []

    def checked(gm: fx.GraphModule, facts: Facts, before: Calls) -> dict[fx.Node, NodeFacts]:
        kept = update_facts(gm, facts, before)
        traced = trace_facts(gm, [kept[node].value for node in gm.graph.find_nodes(op="placeholder")])
        compare(kept, traced)
        seen.append(len(kept))
        return kept

    monkeypatch.setattr(backend, "update_facts", checked)
    return seen


def test_paged_attention_of_many_layers(updates: list[int]) -> None:
    torch._dynamo.reset()
    Traffic().check(model := Model().eval(), torch.compile(model, backend="pcg", options={"compiler": "eager"}), {1: 5})
    assert updates


def fills(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    table[0] = 7.0
    table[1:3] += 2.0
    return (x + table[0]) * table.view(2, 2)[1, 1]


def turns(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    table[0] = 7.0
    view = x.view(-1, 2)
    view.t_()
    return view.sum(1) + table[:2]


@pytest.mark.parametrize("function", [fills, turns])
def test_scalar_writes_put_right(function: Callable[..., torch.Tensor], updates: list[int]) -> None:
    """Also where an op turns a tensor in place, which must not happen to the same fake tensor twice."""
    torch._dynamo.reset()
    x, table = torch.randn(3, 2), torch.zeros(4)
    options: dict[str, Any] = {"compiler": "eager", "scalar_writes": "rewrite"}
    got = torch.compile(function, backend="pcg", options=options)(x.clone(), table.clone())
    torch.testing.assert_close(got, function(x.clone(), table.clone()))
    assert updates


def test_declared_metadata(updates: list[int]) -> None:
    torch._dynamo.reset()
    model = Packed("one_source").eval()
    lengths = [3, 1, 2]
    x, cu = torch.randn(sum(lengths), WIDTH), indptr(lengths)
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [8]}, dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, cu, 3), model(x, cu, 3))
    assert updates
