"""A rank's part of adapters: rows of fused layers, and sizes that the number of ranks does not divide."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pcg_compile as pcg
from pcg_compile.errors import AdapterError
from pcg_compile.lora.peft_folder import Factors
from pcg_compile.lora.shards import WHOLE, Share, _smallest

PARTS = {"q": 8, "k": 4, "v": 4}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_have_all_rows_of_all_parts_once(ranks):
    factors = {name: Factors(torch.randn(2, 6), torch.randn(width, 2), 1.5) for name, width in PARTS.items()}
    found = {name: [] for name in PARTS}
    for rows in torch.arange(16).chunk(ranks):
        share = Share(rows)
        mine = share.rows_of(PARTS)
        assert sum(map(len, mine.values())) == len(rows) and all(map(len, mine.values()))
        for name, one in share.cut(mine, factors).items():
            assert one.a is factors[name].a and one.scaling == 1.5
            found[name].append(one.b)
    for name, parts in found.items():
        assert torch.cat(parts).equal(factors[name].b)


def test_rows_of_parts_that_are_packed_alike_on_each_rank():
    mine = Share(torch.tensor([0, 1, 2, 3, 8, 9, 12, 13])).rows_of(PARTS)
    assert {name: rows.tolist() for name, rows in mine.items()} == {"q": [0, 1, 2, 3], "k": [0, 1], "v": [0, 1]}


def test_columns_are_of_the_first_factor():
    factors = {"q": Factors(torch.randn(2, 6), torch.randn(8, 2), 1.0)}
    share = Share(columns=torch.tensor([3, 4, 5]))
    assert share.sizes(6, 8) == (3, 8) and WHOLE.sizes(6, 8) == (6, 8)
    cut = share.cut(share.rows_of({"q": 8}), factors)["q"]
    assert cut.a.equal(factors["q"].a[:, 3:]) and cut.b is factors["q"].b


def test_the_smallest_part():
    for size in range(1, 14):
        for ranks in range(1, 7):
            parts = torch.arange(size).tensor_split([-(-size // ranks) * i for i in range(1, ranks)])
            assert (_smallest(size, [ranks]) > 0) == all(map(len, parts)), (size, ranks)


def test_a_plain_weight_that_is_a_part():
    model = nn.Sequential()
    model.q = nn.Linear(6, 8)
    model.q.weight = nn.Parameter(model.q.weight[:4].clone())
    with pytest.raises(AdapterError, match="the weight of q, 4 x 6, is a rank's part, and a plain tensor"):
        pcg.lora.AdapterPool(model, target_modules=["q"])
    model.q = nn.Linear(6, 8)
    model.q._hf_tp_plan = "rowwise"
    with pytest.raises(AdapterError, match="transformers 5.18 or later"):
        pcg.lora.AdapterPool(model, target_modules=["q"])
