"""What a model's masks say is read off their rules: a range of distances exactly, or an error that names the reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils as theirs

from pcg_compile.errors import BatchError
from pcg_compile.integrations.transformers.masks import STEP_MASK, Sees, read_mask
from pcg_compile.integrations.transformers.rules import read_rule

SIZE = 9


def blockwise(blocks):
    """Tokens of one block see each other, as those of an image do."""
    return lambda b, h, q, kv: (blocks[b, q] == blocks[b, kv]) & (blocks[b, q] >= 0)


BASES = {
    "causal": lambda w: theirs.causal_mask_function,
    "window": theirs.sliding_window_causal_mask_function,
    "bidirectional": lambda w: theirs.bidirectional_mask_function,
    "both sides": lambda w: lambda b, h, q, kv: abs(q - kv) <= w,
    "in reach": lambda w: lambda b, h, q, kv: (kv - q >= -w) & (kv + 1 < q + 2),
    "ahead": lambda w: lambda b, h, q, kv: q + w > kv,
    "chunks": lambda w: theirs.chunked_overlay(w, [0]),
    "far": lambda w: lambda b, h, q, kv: q - kv >= w,
}
rules = st.recursive(
    st.tuples(st.sampled_from(sorted(BASES)), st.integers(1, SIZE)).map(lambda pair: BASES[pair[0]](pair[1])),
    lambda inner: st.tuples(st.booleans(), st.lists(inner, min_size=1, max_size=3)).map(
        lambda pair: (theirs.and_masks if pair[0] else theirs.or_masks)(*pair[1])
    ),
    max_leaves=5,
)


def values_of(rule):
    """The rule's values at all pairs of positions, as transformers' eager masks have them."""
    q, kv = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None]
    return torch.as_tensor(rule(0, 0, q, kv)).expand(SIZE, SIZE)


@given(rules)
@settings(max_examples=200, deadline=None)
def test_a_rule_that_is_read_has_the_values_that_it_has_on_tensors(rule):
    try:
        nearest, farthest, chunk = read_rule(rule)
    except BatchError as error:
        assert "neither causal nor a window" in str(error)
        return
    distance = torch.arange(SIZE)[:, None] - torch.arange(SIZE)
    seen = torch.ones(SIZE, SIZE, dtype=torch.bool)
    seen &= distance >= (-SIZE if nearest is None else nearest)
    seen &= distance <= (SIZE if farthest is None else farthest)
    if chunk is not None:
        chunks = torch.arange(SIZE) // chunk
        seen &= chunks[:, None] == chunks
    assert torch.equal(seen, values_of(rule))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (theirs.causal_mask_function, (0, None, None)),
        (theirs.sliding_window_causal_mask_function(5), (0, 4, None)),
        (theirs.or_masks(theirs.sliding_window_causal_mask_function(5), theirs.causal_mask_function), (0, None, None)),
        (theirs.bidirectional_mask_function, (None, None, None)),
        (theirs.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)), (0, None, 4)),
        (theirs.and_masks(theirs.chunked_overlay(4, [0]), theirs.sliding_window_causal_mask_function(3)), (0, 2, 4)),
    ],
)
def test_rules_of_transformers_are_read(rule, expected):
    assert read_rule(rule) == expected


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (theirs.packed_sequence_mask_function(torch.zeros(1, SIZE)), "depends on data"),
        (theirs.padding_mask_function(torch.ones(1, SIZE)), "depends on data"),
        (blockwise(torch.zeros(1, SIZE)), "depends on data"),
        (theirs.chunked_causal_mask_function(4, torch.ones(1, dtype=torch.int64)), "depends on data"),
        (theirs.or_masks(theirs.chunked_overlay(4, [0]), theirs.causal_mask_function), "neither causal nor a window"),
        (theirs.and_masks(theirs.chunked_overlay(4, [0]), theirs.chunked_overlay(6, [0])), "neither causal nor"),
        (lambda b, h, q, kv: (q + 1) // 4 == (kv + 1) // 4, "neither causal nor a window"),
        (
            theirs.or_masks(theirs.causal_mask_function, blockwise(torch.ones(1, SIZE))),
            "depends on data",
        ),
        (lambda b, h, q, kv: kv < 3, "neither causal nor a window"),
        (lambda b, h, q, kv: q >= 3, "neither causal nor a window"),
        (lambda b, h, q, kv: torch.tensor(True), "neither causal nor a window"),
        (theirs.or_masks(theirs.sliding_window_overlay(1), lambda b, h, q, kv: q - kv > 3), "neither causal"),
    ],
)
def test_other_rules_are_refused(rule, reason):
    with pytest.raises(BatchError, match=reason):
        read_rule(rule)


def test_a_mask_tensor_that_reaches_the_mask_function_is_refused():
    with pytest.raises(BatchError, match="made from an attention_mask"):
        read_mask(mask_function=theirs.causal_mask_function, attention_mask=torch.ones(1, 4))
    with pytest.raises(BatchError, match="outside of the model's call"):
        read_mask(mask_function=theirs.causal_mask_function)


@pytest.mark.parametrize(
    "compute", [lambda m: m[:, :, 0], lambda m: m + 1, lambda m: torch.zeros(1) + m, lambda m: m.sum()]
)
@pytest.mark.parametrize("mask", [STEP_MASK, Sees(0, None)], ids=["step", "sees"])
def test_a_model_that_computes_with_its_mask_is_refused(mask, compute):
    with pytest.raises(BatchError, match="by itself"):
        compute(mask)


def test_dynamo_reads_rules_too():
    def windowed(x, w):
        nearest, farthest, _ = read_rule(theirs.sliding_window_causal_mask_function(w))
        return x + nearest + farthest

    traced = torch.compile(windowed, backend="eager", fullgraph=True)
    assert traced(torch.zeros(2), 7).tolist() == [6, 6]
