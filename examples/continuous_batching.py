"""Continuous batching: prompts of all lengths at once, tokens as they come, an adapter for each request.

    python examples/continuous_batching.py                  # tokens stream to the terminal
    python examples/continuous_batching.py --check          # and each answer equals the request's generated alone

``generate_batch`` does the scheduling; a server would add requests to a ``Session`` as they arrive.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pcg_compile as pcg
from pcg_compile.integrations.transformers import generate_batch

VOCABULARY = 1000
TARGETS = ["q_proj", "v_proj"]


def make_model(device: str) -> Any:
    """A Llama with random weights, of about 1B parameters on a GPU."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = (2048, 8192, 16, 32, 8) if device == "cuda" else (64, 128, 2, 4, 2)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, **dict(zip(names, sizes, strict=True)))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None
    return model


def add_adapters(model: Any, folder: Path) -> list[str]:
    """Two adapters with random weights, as PEFT saves them."""
    from peft import LoraConfig, get_peft_model

    pool = pcg.lora.AdapterPool(model, max_adapters=4, max_rank=16, target_modules=TARGETS)
    for name, rank in (("french", 8), ("sql", 16)):
        config = LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)
        get_peft_model(make_model(model.device.type), config).save_pretrained(folder / name)
        pool.load(name, folder / name)
    return ["french", "sql"]


def main() -> None:
    """Generates for random prompts and prints each token when the host has read it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--no-adapters", action="store_true", help="the base model alone")
    parser.add_argument("--check", action="store_true", help="generate for every request alone as well, and compare")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(device)
    with tempfile.TemporaryDirectory() as folder:
        names = [] if options.no_adapters else add_adapters(model, Path(folder))
    chance = random.Random(0)
    prompts = [[chance.randrange(VOCABULARY) for _ in range(chance.randint(3, 60))] for _ in range(options.requests)]
    adapters = [chance.choice([None, *names]) for _ in prompts] if names else None

    answers: dict[str, list[int]] = {}

    def show(request: str, token: int | None) -> None:
        if token is not None:
            answers.setdefault(request, []).append(token)
        else:
            print(f"{request}: {' '.join(map(str, answers[request]))}")

    started = time.perf_counter()
    outputs = generate_batch(model, prompts, max_new_tokens=16, adapters=adapters, streamer=show, max_batch_tokens=64)
    seconds, tokens = time.perf_counter() - started, sum(len(o.generated_tokens) for o in outputs.values())
    print(f"{tokens} new tokens in {seconds:.1f} s, compiling and capturing included")
    if options.check:
        same = 0
        for i, output in enumerate(outputs.values()):
            alone = generate_batch(
                model, [prompts[i]], max_new_tokens=16, adapters=adapters and [adapters[i]], max_batch_tokens=64
            )
            same += next(iter(alone.values())).generated_tokens == output.generated_tokens
        # In 16 bits, kernels for other numbers of rows round otherwise, which can decide between two tokens.
        assert device == "cuda" or same == len(prompts)
        print(f"{same} of {len(prompts)} answers equal those of requests generated alone")


if __name__ == "__main__":
    main()
