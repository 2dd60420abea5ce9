"""Three LoRA adapters and base traffic in one batch, in the same captured graphs; PEFT, one request at a time, agrees.

python examples/many_adapters.py
"""

from __future__ import annotations

import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import pcg_compile as pcg
from pcg_compile.integrations.transformers import cache_for

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = LlamaConfig(**(SIZES if CUDA else SMALL), num_key_value_heads=4, vocab_size=1000)
TARGETS = ["q_proj", "v_proj", "down_proj"]
RANKS = {"french": 8, "sql": 16, "poetry": 4}


def make_model(attention: str) -> torch.nn.Module:
    """The same random weights each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIG), attn_implementation=attention, dtype=DTYPE)
    return model.to(DEVICE).eval()


def make_adapters(folder: Path) -> None:
    """Adapters as PEFT saves them, with random weights in place of training."""
    for name, rank in RANKS.items():
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, init_lora_weights=False)
        get_peft_model(make_model("sdpa"), config).save_pretrained(folder / name)


def main() -> None:
    """Serves one mixed batch, and compares each request's next token with PEFT's."""
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        make_adapters(folder)
        model = make_model("pcg")
        pool = pcg.lora.AdapterPool(model, max_adapters=4, max_rank=16, target_modules=TARGETS)
        for name in RANKS:
            pool.load(name, folder / name)
        compiled = torch.compile(model, backend="pcg", options={"compiler": "inductor" if CUDA else "eager"})
        cache = cache_for(model, num_pages=64)

        requests = ["french", None, "sql", "french", "poetry", None]
        prompts = [torch.randint(0, 1000, (n,), device=DEVICE) for n in (5, 9, 3, 12, 7, 1)]
        lengths = [len(prompt) for prompt in prompts]
        pages = [cache.allocate(1) for _ in prompts]
        batch = pcg.Batch(lengths, lengths, pages, adapters=requests)
        for _ in range(2):  # the first call compiles for one size, the second for all
            with pcg.step(batch, cache):
                ids = torch.cat(prompts)[None]
                logits = compiled(input_ids=ids, position_ids=batch.positions[None]).logits[0]
        last = logits[torch.tensor(lengths, device=DEVICE).cumsum(0) - 1].float()

        table = Table("request", "adapter", "tokens", "next token", "next token, PEFT", "largest difference")
        for i, (name, prompt) in enumerate(zip(requests, prompts, strict=True)):
            reference = make_model("sdpa")
            if name is not None:
                reference = PeftModel.from_pretrained(reference, folder / name).eval()
            with torch.inference_mode():
                want = reference(prompt[None]).logits[0, -1].float()
            difference = (last[i] - want).abs().max().item()
            table.add_row(
                str(i), name or "base", str(len(prompt)), str(last[i].argmax().item()), str(want.argmax().item()),
                f"{difference:.1e}",
            )  # fmt: skip
            assert difference < (0.5 if CUDA else 1e-4), f"request {i} differs by {difference}"
        console.print(table)

        before = pcg.stats(compiled)
        mixes = [["sql"] * 6, [None] * 6, ["poetry", "french", "sql", None, "french", "sql"]]
        for mix in mixes:
            batch = pcg.Batch(lengths, lengths, pages, adapters=mix)
            with pcg.step(batch, cache):
                compiled(input_ids=ids, position_ids=batch.positions[None])
        after = pcg.stats(compiled)
        new = after.captured - before.captured
        console.print(f"{len(mixes)} other mixes: {new} new captured graphs, {after.replays - before.replays} replays")
        assert new == 0


if __name__ == "__main__":
    main()
