"""TRL's GRPO trainer on an accelerated model: it trains, and log probabilities are the training forward's."""

from __future__ import annotations

import pytest
import torch
from adapters import llama

from pcg_compile.integrations.generation import accelerate

trl = pytest.importorskip("trl")


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(57))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@torch.no_grad()
def distance_to_training_forward(model, output):
    """The largest difference of log probabilities to one dense forward of the same model."""
    training = model.training
    model.eval()
    ids = torch.tensor([output.prompt_ids + output.generated_tokens])
    logprobs = model(ids).logits[0, len(output.prompt_ids) - 1 : -1].log_softmax(-1)
    model.train(training)
    want = logprobs.gather(-1, ids[0, len(output.prompt_ids) :, None])[:, 0]
    return (want - torch.tensor(output.logprobs)).abs().max().item()


@pytest.mark.filterwarnings("ignore")
def test_grpo(tmp_path):
    from datasets import Dataset

    torch._dynamo.reset()
    model = llama("sdpa")
    model.config.pad_token_id, model.config.eos_token_id = 0, 1
    before = model.lm_head.weight.detach().clone()
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=8,
        use_transformers_continuous_batching=True, use_cpu=True, bf16=False, report_to=[], learning_rate=1e-2,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **others: [float(text.count("w7")) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2 w3 w4", "w5 w6", "w9 w10 w11", "w3"] * 4}),
        processing_class=word_tokenizer(),
    )
    accelerate(model, max_batch_tokens=64)
    generate, distances = model.generate_batch, []

    def generate_and_compare(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        distances.extend(distance_to_training_forward(model, output) for output in outputs.values())
        return outputs

    model.generate_batch = generate_and_compare
    trainer.train()
    assert len(distances) == 3 * 8 and max(distances) < 1e-4
    assert not torch.equal(before, model.lm_head.weight)
