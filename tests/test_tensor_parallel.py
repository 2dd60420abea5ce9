"""Two ranks on gloo: the values of one process, the same pieces, and faults that leave no rank waiting."""

from __future__ import annotations

import json
import re

import pytest
import torch.distributed as dist
from ranks import (
    DIFFERENT,
    adapters_of_layers,
    adapters_of_llama,
    check_adapters,
    check_different,
    check_styles,
    ranks,
)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_the_values_of_one_process(compiler):
    first, second = ranks("values", compiler)
    assert first == {**second, "worst": first["worst"]} and max(first["worst"], second["worst"]) < 1e-5
    # A static graph and one for all sizes; in each, cuts at 2 attentions and 4 all-reduces.
    assert first["graphs"] >= 1 and first["pieces"] == 7 * first["graphs"]
    assert first["replays"] > 0 and {"4", "8", "16"} <= set(first["buckets"]) and first["fallbacks"] == []


def test_a_capture_that_fails_on_one_rank_is_given_up_by_both():
    first, second = ranks("capture_fails")
    assert max(first["worst"], second["worst"]) < 1e-5
    assert first["captured"] == second["captured"]
    assert [r for r in first["fallbacks"] if "rank 1 could not capture" in r]
    assert [r for r in second["fallbacks"] if "out of memory" in r]


def test_ranks_with_different_batches_hear_of_it():
    check_different(ranks("different_sizes", json.dumps(DIFFERENT)))


def test_without_gloo_new_sizes_are_compared():
    for result in ranks("no_gloo"):
        assert result["worst"] < 1e-5 and "(rank 0: [7], rank 1: [8])" in result["error"]
        assert [r for r in result["fallbacks"] if "gloo found no way between them: no such host" in r]


def test_a_rank_that_dies_is_an_error_in_the_next_steady_step():
    first, _ = ranks("dies", timeout=90)
    assert "a rank took no part in the step" in first["error"]


def test_copies_of_a_model_serve_batches_of_their_own():
    for result in ranks("two_by_two", world=4):
        assert result["worst"] < 1e-5 and result["replays"] > 0


def test_an_error_on_one_rank_is_an_error_on_the_other():
    # A rank that waits for the other one runs into the timeout.
    first, second = ranks("split_op_raises", timeout=90)
    assert second["n"] == 6 and "rank 1 gives up" in second["error"]
    assert first["n"] == 6 and first["error"]


REFUSED = {
    "tokens": r"qkv was given x \(Shard\(dim=0\),\) and gave y .*\n.*all tokens.*\n.*input_layouts=Shard\(0\)",
    "tokens, compiled": r"qkv was given x \(Shard\(dim=0\),\)",
    "later": r"the weight of qkv was split over ranks after its adapter pool was made\n  Make the pool after",
    "forward": r"the forward of qkv was replaced by '.*lambda",
    "plain": r"the weight of qkv, 8 x 6, is a rank's part, and a plain tensor",
    "summands": r"the weight of qkv is a DTensor \(Partial\(sum\),\)",
    "small": r"one has 1 outputs, too few for each rank",
    "gathered": r"qkv computed 6 -> 16, and this rank's part of its weight is 6 -> 8",
}


def test_adapters(tmp_path):
    for result in ranks("adapters", str(adapters_of_layers(tmp_path)), timeout=300):
        # Cuts at 2 attentions and 4 all-reduces: adapters bring no collective.
        check_adapters(result, ["eager", "inductor"], pieces=7)
        check_styles(result["styles"])
        assert result["refused"].keys() == REFUSED.keys()
        for name, error in result["refused"].items():
            assert error and re.search(REFUSED[name], error), (name, error)


def test_the_plan_of_transformers(tmp_path):
    root = adapters_of_llama(tmp_path)
    for result in ranks("adapters_on_a_plan", str(root / "model"), str(root), timeout=300):
        assert result["before"] < 1e-5, result
        check_adapters(result, ["eager"])
