"""What to do about a fallback: the same advice in logs, ``explain`` and ``explain-trace``."""

from __future__ import annotations

import re

__all__ = ["cure_of"]

#: By what a reason, or its place, holds; the first pattern that is found counts. Some reasons say it themselves.
_CURES = (
    (r"model\.eval\(\)|inference_mode|pass (it as )?a tensor|memory_budget=\d", None),
    (r"transformers/(cache_utils|models)", "for generation: pcg.accelerate(model), then model.generate_batch(prompts)"),
    (r"beyond the largest bucket", "add a larger bucket, or raise max_tokens"),
    (r"exceed max_tokens", "raise max_tokens"),
    (r"max_padding", "add a bucket in between: pcg.stats(model).suggest_buckets(8) fits them to the steps so far"),
    (r"memory_budget", "raise memory_budget, or use fewer buckets"),
    (r"RNN, GRU, or LSTM", "set torch._dynamo.config.allow_rnn = True, or leave that module out of what is compiled"),
    (r"\b(mixing|opaque):", "make that op a split op (@pcg.split_op): it then gets the real rows only"),
    (
        r"Dynamo breaks the graph|no graph of it",
        "change that line, or keep it out of the graph: @torch.compiler.disable",
    ),
    (r"a piece runs eagerly", "pcg-compile doctor says what the compiler lacks; else report the error"),
    (r"has reached Dynamo's", "pass what changes as a tensor, or name its sizes: @pcg.piecewise(dynamic={...})"),
    (r"cannot trace this call", "keep the op out of the graph: @torch.compiler.disable"),
    (r"overlaps another", "pass tensors that do not share memory"),
)


def cure_of(fallback: str) -> str | None:
    """What to do about a fallback, by its reason and place; None where the reason says so, or nothing is to be done."""
    return next((cure for pattern, cure in _CURES if re.search(pattern, fallback)), None)
