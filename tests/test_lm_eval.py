"""lm-eval's model "pcg" against lm-eval's own Hugging Face model, on tasks that need no network."""

from __future__ import annotations

import pytest
import torch
from models import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import pcg_compile as pcg

lm_eval = pytest.importorskip("lm_eval", reason="pip install '.[lm-eval]'")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from pcg_compile.integrations.lm_eval import PCGLM  # noqa: E402

WORDS = [f"w{i}" for i in range(30)]
OPTIONS = {"device": "cpu", "max_length": 64}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    torch._dynamo.reset()
    tokenizer = word_tokenizer(WORDS)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=len(tokenizer), num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return HFLM(model, tokenizer=tokenizer, **OPTIONS), PCGLM(
        model, tokenizer=tokenizer, max_batch_tokens=48, **OPTIONS
    )


def sentence(start, length):
    return " ".join(WORDS[(start + i * i) % len(WORDS)] for i in range(length))


def documents(**kwargs):
    from datasets import Dataset

    rows = [{"text": sentence(i, 3 + 2 * i), "label": i % 3, "next": WORDS[i]} for i in range(9)]
    return {"test": Dataset.from_list(rows)}


def task(**config):
    return ConfigurableTask(
        config={"custom_dataset": documents, "test_split": "test", "doc_to_text": "{{text}}", **config}
    )


def scores(model, made):
    # Without lm-eval's own tasks, whose 13,000 files take it 10 s to read.
    manager = TaskManager(include_defaults=False)
    results = lm_eval.simple_evaluate(model=model, tasks=[made], bootstrap_iters=0, task_manager=manager)
    return results["results"][made.config.task], results["samples"][made.config.task]


def test_it_is_registered():
    assert get_model("pcg") is PCGLM


def test_tasks_have_the_results_of_lm_evals_own_model(models):
    choice = {"task": "choice", "output_type": "multiple_choice", "doc_to_target": "label"}
    several = {**choice, "task": "several", "doc_to_choice": ["w1", "w2 w3", "w4"]}
    until = {"task": "until", "output_type": "generate_until", "doc_to_target": "{{next}}"}
    for config in (
        {**choice, "doc_to_choice": ["w1", "w2", "w3"]},
        several,
        {**until, "generation_kwargs": {"until": ["w5", "w7 w"], "max_gen_toks": 12}},
        {"task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    ):
        (theirs, their_samples), (ours, our_samples) = (scores(model, task(**config)) for model in models)
        assert ours.keys() == theirs.keys() and len(our_samples) == 9
        for name, value in theirs.items():
            assert ours[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
        for our, their in zip(our_samples, their_samples, strict=True):
            if config["task"] == "until":
                assert our["resps"] == their["resps"] and our["resps"][0][0]
            else:
                flat = [[x for response in sample["filtered_resps"] for x in response] if config["task"] != "rolling"
                        else sample["filtered_resps"] for sample in (our, their)]  # fmt: skip
                assert flat[0] == pytest.approx(flat[1], rel=1e-4)
    stats = pcg.stats(models[1].forward)
    assert stats.replays and not stats.fallbacks


def test_requests_that_are_too_long_keep_their_ends(models):
    requests = [
        Instance("loglikelihood", {}, (sentence(i, 100), f" {sentence(i, n)}"), i) for i, n in enumerate((1, 3, 64))
    ]
    theirs, ours = (model.loglikelihood(requests, disable_tqdm=True) for model in models)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=1e-4)


def test_choices_of_one_token_are_scored_together(models):
    _, ours = models
    requests = [Instance("loglikelihood", {}, (sentence(0, 40), f" {word}"), i) for i, word in enumerate(WORDS)]
    with pcg.expect(ours.forward, steps=1):
        found = ours.loglikelihood(requests, disable_tqdm=True)
    assert sum(greedy for _, greedy in found) <= 1
    assert torch.tensor([score for score, _ in found]).exp().sum() <= 1


def test_temperature_is_sampled_with(models):
    _, ours = models
    torch.manual_seed(0)
    settings = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 3.0}
    requests = [Instance("generate_until", {}, (sentence(1, 4), dict(settings)), i) for i in range(4)]
    assert len(set(ours.generate_until(requests, disable_tqdm=True))) > 1
