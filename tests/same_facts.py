"""Compares facts of a graph, traced twice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from pcg_compile.fx.facts import NodeFacts, storage_of

Facts = Mapping[fx.Node, NodeFacts]


def look(value: Any) -> Any:
    """What of a value must be the same, beyond its identity; unbacked sizes are counted up with each trace."""
    if isinstance(value, torch.Tensor):
        text = str((value.shape, value.stride(), value.dtype, value.device, value.storage_offset()))
    else:
        text = str(value) if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) else str(type(value))
    return re.sub(r"\bu[0-9]+\b", "u", text)


def looks(value: Any) -> list[Any]:
    return [look(leaf) for leaf in tree_leaves(value)]


def storages(value: Any) -> list[int]:
    return [storage_of(leaf) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def compare(kept: Facts, traced: Facts) -> None:
    """Same nodes, values, ops and writes; the same tensors alias, under whatever names their storages have."""
    assert list(kept) == list(traced)
    names: dict[int, int] = {}
    for node, one in kept.items():
        other = traced[node]
        assert [look(leaf) for leaf in tree_leaves(one.value)] == [look(leaf) for leaf in tree_leaves(other.value)], (
            node
        )
        assert [str(call.op) for call in one.ops] == [str(call.op) for call in other.ops], node
        pairs = [*zip(storages(one.value), storages(other.value), strict=True)]
        for mine, theirs in zip(one.ops, other.ops, strict=True):
            pairs += zip(storages((mine.args, mine.kwargs)), storages((theirs.args, theirs.kwargs)), strict=True)
        for left, right in pairs:
            assert names.setdefault(left, right) == right, node
        assert {names[storage] for storage in one.writes if storage in names} == {
            storage for storage in other.writes if storage in set(names.values())
        }, node
    assert len(set(names.values())) == len(names)
