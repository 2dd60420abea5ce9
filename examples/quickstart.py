"""A Llama serves a few requests of different lengths: prefill, then decode, eager against captured pieces.

python examples/quickstart.py            # about 1B parameters in bf16 on a GPU, a small model in fp32 on a CPU
"""

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import pcg_compile as pcg
from pcg_compile.integrations.transformers import cache_for

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
PROMPTS, NEW_TOKENS, BUCKETS = (5, 33, 17, 2), 12, [4, 8, 16, 32, 64]
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPE = dict(zip(NAMES, (2048, 8192, 16, 32, 8) if GPU else (128, 256, 4, 4, 2)))


@torch.no_grad()
def serve(call, cache, prompts, given=None):
    """Greedy tokens of all requests, one ragged batch a step, going on from ``given`` answers; times and logits."""
    pages = [cache.allocate(-(-(len(p) + NEW_TOKENS) // cache.page_size)) for p in prompts]
    done, new, steps, answers = [0] * len(prompts), [list(p) for p in prompts], [], [[] for _ in prompts]
    for i in range(NEW_TOKENS):
        lens = [len(tokens) for tokens in new]
        done = [have + n for have, n in zip(done, lens)]
        batch = pcg.Batch(lens, done, pages)
        ids = torch.tensor([[token for tokens in new for token in tokens]], device=DEVICE)
        start = time.perf_counter()
        with pcg.step(batch, cache):
            logits = call(input_ids=ids, position_ids=batch.positions[None]).logits[0]
        last = logits[torch.tensor(lens, device=DEVICE).cumsum(0) - 1].float()
        chosen = last.argmax(-1).tolist()
        steps.append((batch.num_tokens, time.perf_counter() - start, last))
        answers = [[*answer, token] for answer, token in zip(answers, chosen)]
        new = [[answer[i]] for answer in (given or answers)]
    cache.free([page for taken in pages for page in taken])
    return answers, steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", default="inductor" if GPU else "eager", help="inductor or eager")
    compiler = parser.parse_args().compiler
    torch.manual_seed(0)
    print(f"    making a Llama with random weights: {SHAPE['num_hidden_layers']} layers, {DTYPE}, on {DEVICE}")
    config, plain = (LlamaConfig(vocab_size=32000 if GPU else 1000, **SHAPE) for _ in range(2))
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="pcg", dtype=DTYPE).eval()
        reference = AutoModelForCausalLM.from_config(plain, attn_implementation="sdpa", dtype=DTYPE).eval()
    compiled = torch.compile(model, backend="pcg", options={"buckets": BUCKETS, "compiler": compiler})
    prompts = [torch.randint(3, config.vocab_size, (n,)).tolist() for n in PROMPTS]
    cache = cache_for(model, num_pages=64)
    runs: dict[str, list] = {"eager": [], "pcg": []}
    for i in range(4):
        print("    serving 4 requests,", "compiling and capturing (the longest phase)" if not i else f"round {i} of 3")
        runs["eager"].append(serve(model, cache, prompts))
        runs["pcg"].append(serve(compiled, cache, prompts, given=runs["eager"][-1][0]))
    times_of = ["eager ms", "pcg ms", "speed-up"] if GPU else []
    table = Table("step", "tokens", "bucket", *times_of, "largest difference")
    for slow, fast in zip(*(zip(*(steps for _, steps in rounds[1:])) for rounds in runs.values())):
        times, tokens = [min(t for _, t, _ in runs_of) * 1e3 for runs_of in (slow, fast)], slow[0][0]
        bucket, difference = next(b for b in BUCKETS if b >= tokens), (slow[0][2] - fast[0][2]).abs().max().item()
        row = [*(f"{t:.2f}" for t in times), f"{times[0] / times[1]:.1f}x"][: len(times_of)]
        table.add_row("decode" if table.rows else "prefill", str(tokens), str(bucket), *row, f"{difference:.1e}")
    Console().print(table)
    if not GPU:
        print("No times: a captured graph saves a GPU's kernel launches, and a CPU has none to save.")
    stats = pcg.stats(compiled)
    print(f"{stats.steps} steps; {stats.captured} captured graphs, replayed {stats.replays} times;", end=" ")
    print("no fallback" if not stats.fallbacks else "\n".join(f"not replayed: {f.reason}" for f in stats.fallbacks))
    reference.load_state_dict(model.state_dict())
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt, answer in zip(prompts, runs["pcg"][-1][0]):
        wanted = reference.generate(torch.tensor([prompt], device=DEVICE), **greedy)
        same = sum(a == b for a, b in zip(answer, wanted[0, len(prompt) :].tolist()))
        print(f"request of {len(prompt):2d} tokens: {same} of {NEW_TOKENS} tokens equal generate()'s")
        assert GPU or same == NEW_TOKENS  # bf16 rounds differently by kernel, and random weights leave near ties
    print("Next: docs/quickstart.md; pcg-compile doctor; python examples/continuous_batching.py")


if __name__ == "__main__":
    main()
