"""Generation on two ranks, for tests/test_generate_ranks.py: one model in parts by transformers' own plan."""

from __future__ import annotations

import torch
import torch.distributed as dist
from adapters import llama
from transformers import AutoModelForCausalLM

import pcg_compile as pcg
from pcg_compile.integrations.generation import Session, generate_batch

RANK = dist.get_rank()
# All prompts in one step, so no step has one token: DTensor makes a graph of its own for that.
SMALL = {"max_batch_tokens": 64, "options": {"buckets": [4, 64]}, "max_new_tokens": 6, "num_pages": 16, "page_size": 8}


def generated(outputs):
    return [output.generated_tokens for output in outputs.values()]


def generation(folder):
    """Answers of the whole model and of its parts; what becomes of errors and cancellations on one rank."""
    prompts = [torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 20, 3, 9)]
    whole = llama("sdpa")
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
    for one in (whole, model):
        one.generation_config.eos_token_id, one.generation_config.pad_token_id = None, 0
    ids = [torch.tensor([prompt]) for prompt in prompts]
    with torch.no_grad():
        alone = [whole.generate(one, max_new_tokens=6, do_sample=False)[0, one.shape[1] :].tolist() for one in ids]
    found = {"want": alone, "got": generated(generate_batch(model, prompts, **SMALL))}

    def streamer(name, token):
        if RANK == 1 and token is not None:
            counts[name] = counts.get(name, 0) + 1
            if name == "req_0" and counts[name] == 2:
                raise RuntimeError("broken pipe")
            return not (name == "req_2" and counts[name] == 3)

    counts = {}
    try:
        generate_batch(model, prompts, streamer=streamer, **SMALL)
    except pcg.errors.GenerationError as error:
        found["error"] = str(error).splitlines()[0]
        found["after_error"] = generated(error.outputs)
    launch, launches = Session._launch, []

    def launching(self, step):
        launched = launch(self, step)
        launches.append(step)
        if RANK == 1 and len(launches) == 3:
            raise RuntimeError("no memory")
        return launched

    Session._launch = launching
    try:
        generate_batch(model, prompts, **SMALL)
    except pcg.errors.GenerationError as error:
        found["step"] = str(error).splitlines()[0]
        found["after_step"] = [output.error is None for output in error.outputs.values()]
    Session._launch = launch
    # Every rank would draw seeds of its own; all use those of the first.
    torch.manual_seed(RANK)
    found["sampled"] = generated(generate_batch(model, prompts, do_sample=True, **SMALL))
    cache = model._pcg_generation.engine.cache
    return found | {"free": cache.free_pages, "pages": cache.num_pages - 1}
