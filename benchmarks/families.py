"""Every causal language model of the installed transformers: right in packed steps, or refused with a reason.

``python -m benchmarks.families`` makes a tiny model of each entry of transformers' mapping, runs eight steps of ragged
requests (prefill, chunks, decode, mixed), compares every token with transformers' own attention on each request alone,
and writes ``docs/families.md``. With ``--compiled``, the last six steps run compiled, which takes ten times as long.
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import pcg_compile as pcg
from pcg_compile.integrations.transformers import cache_for

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
#: New tokens of three requests, step by step.
STEPS = ((4, 13, 7), (5, 1, 1), (1, 1, 2), (1, 2, 5), (1, 1, 1), (1, 1, 1), (3, 1, 2), (1, 1, 1))
LENGTH = 24
#: With --compiled, beyond this many steps the compiled model runs.
PLAIN_STEPS = 2
RIGHT = ("right", "right, compiled too")

#: Small values of the fields that configs share; a field that a config does not have is left out.
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "is_decoder": True, "is_encoder_decoder": False,
    # Other names of the same.
    "n_embd": 32, "n_layer": 2, "n_layers": 2, "n_head": 4, "n_heads": 4, "n_positions": 64, "n_ctx": 64, "n_inner": 48,
    "d_model": 32, "d_ff": 48, "ffn_dim": 48, "num_layers": 2, "num_heads": 4, "decoder_layers": 2, "encoder_layers": 2,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "word_embed_proj_dim": 32, "embedding_size": 32, "rotary_dim": 4, "attention_heads": 4, "embed_dim": 32,
    "emb_dim": 32, "d_embed": 32, "d_inner": 48, "max_seq_len": 64, "ffn_hidden_size": 48, "ff_dim": 48,
    "input_embedding_size": 32, "output_embedding_size": 32, "d_head": 8, "d_kv": 8, "dim_model": 32, "dff": 48,
    "dim_head": 8, "dim_ff": 48,
    # Windows.
    "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1, "attention_chunk_size": 5,
    "sliding_window_size": 5, "window_size": 5, "local_attention": 10, "attention_window_size": 5,
    # Experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "top_k": 2, "moe_k": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "first_k_dense_replace": 1, "activation_hidden_size": 16, "expert_dim": 16, "moe_layer_start_index": 1,
    "mlp_hidden_size": 48,
    # Latent attention.
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "kv_channels": 8,
    # States.
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "state_size": 8, "time_step_rank": 4, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "n_mamba_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "lru_width": 32, "mamba_ngroups": 1, "mamba_d_ssm": 64, "conv_dim": 32, "conv_L_cache": 3,
    # Others.
    "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 0, "query_pre_attn_scalar": 8, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16),
    "projection_dim": 32, "num_codebooks": 2, "image_size": 32, "patch_size": 16, "laurel_rank": 4,
    "altup_num_inputs": 2, "depth": 2, "out_hidden_size": 32, "mm_tokens_per_image": 4, "num_channels": 3,
    "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
#: Fields of single models, where the small ones alone make none.
OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE),
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 32}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 2, "use_double_wide_mlp": False, "enable_moe_block": False,
        },
    },
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 32, "patch_size": 4}},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    # The fourth layer is one without rotary embeddings.
    "llama4_text": {"num_hidden_layers": 4, "floor_scale": 3},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "roc_bert": {
        "shape_vocab_size": 32, "shape_embed_dim": 16, "pronunciation_vocab_size": 32, "pronunciation_embed_dim": 16,
    },
    "zamba": {"num_hidden_layers": 12},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def small_config(model_type: str) -> Any:
    """A config of a model type with small sizes, or its text part where the model takes that alone."""
    kind, takes = CONFIG_MAPPING[model_type], class_of(model_type).config_class
    if takes is not None and not issubclass(kind, takes):
        kind = takes
    return _small(kind, OWN.get(kind.model_type, OWN.get(model_type, {})))


def _small(kind: Any, own: dict[str, Any]) -> Any:
    names = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "attribute_map", {}))
    names |= set(getattr(kind, "__dataclass_fields__", {}))
    fields = {name: value for name, value in SMALL.items() if name in names}
    if {"kv_lora_rank", "qk_rope_head_dim", "num_key_value_heads"} <= names:
        # Latent attention has a key for each query head.
        fields["num_key_value_heads"] = SMALL["num_attention_heads"]
    parts = getattr(kind, "sub_configs", None) or {}
    for name, part in parts.items():
        # Where any config may stand, the default says which.
        named = own.get(name, {}).get("model_type") or getattr(part, "model_type", "")
        inner = CONFIG_MAPPING[named] if named in CONFIG_MAPPING else part if named else type(getattr(kind(), name))
        if hasattr(inner, "model_type"):
            made = _small(inner, {key: value for key, value in own.get(name, {}).items() if key != "model_type"})
            fields[name] = made if named != getattr(part, "model_type", "") else made.to_dict()
    return kind(**fields | {name: value for name, value in own.items() if name not in parts})


def class_of(model_type: str) -> Any:
    """The causal language model of a model type."""
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def both(config: Any, kind: Any) -> tuple[Any, Any]:
    """A model with transformers' attention, and one with pcg's and the same weights."""
    torch.manual_seed(0)
    eager = kind._from_config(copy.deepcopy(config), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model = kind._from_config(copy.deepcopy(config), attn_implementation="pcg").float().eval()
    model.load_state_dict(eager.state_dict())
    return eager, model


def worst_of_steps(eager: Any, model: Any, plain: int, steps: Sequence[Sequence[int]] = STEPS) -> float:
    """The largest difference to each request alone, relative to its largest logit.

    Args:
        plain: how many steps run uncompiled; those after them run compiled.
    """
    torch._dynamo.reset()
    cache = cache_for(model, num_pages=32, page_size=4)
    size = eager.config.get_text_config().vocab_size
    ids = torch.randint(3, size - 1, (len(steps[0]), LENGTH), generator=torch.Generator().manual_seed(1))
    names = inspect.signature(type(eager).forward).parameters
    without = {"use_cache": False} if "use_cache" in names else {}
    with torch.no_grad():
        alone = [eager(input_ids=row[None], **without)[0][0] for row in ids]
    compiled = torch.compile(model, backend="pcg", dynamic=True, options={"buckets": [8, 32], "compiler": "eager"})
    pages, done, worst = [cache.allocate(LENGTH // 4) for _ in ids], [0] * len(ids), 0.0
    for number, new in enumerate(steps):
        have = [a + b for a, b in zip(done, new, strict=True)]
        batch = pcg.Batch(new, have, pages)
        packed = torch.cat([row[a:b] for row, a, b in zip(ids, done, have, strict=True)])
        with pcg.step(batch, cache):
            run = model if number < plain else compiled
            logits = run(input_ids=packed[None], position_ids=batch.positions[None])[0][0]
        wanted = torch.cat([rows[a:b] for rows, a, b in zip(alone, done, have, strict=True)])
        worst = max(worst, float((logits - wanted).abs().max() / wanted.abs().max()))
        if not worst < float("inf"):
            return float("inf")
        done = have
    return worst


def outcome(model_type: str, compiled: bool = False) -> str:
    """``right``, ``refused: REASON``, or what went wrong instead."""
    try:
        config, kind = small_config(model_type), class_of(model_type)
        with torch.device("meta"):
            tried = kind._from_config(copy.deepcopy(config), attn_implementation="eager")
        size = sum(parameter.numel() for parameter in tried.parameters())
        if size > 10_000_000:
            raise ValueError(f"{size} parameters")
    except ImportError as error:
        return f"not run here: {_text(error)}"
    except Exception as error:  # Whatever a family's constructor says of these sizes: the table then lacks it.
        return f"NO TINY MODEL: {_text(error)}"
    try:
        eager, model = both(config, kind)
        worst = worst_of_steps(eager, model, PLAIN_STEPS if compiled else len(STEPS))
    except pcg.errors.PCGError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[1] if lines[0].startswith("attn_implementation") else lines[0]
        return f"refused: {reason}"
    except Exception as error:  # Any other error is the outcome that the table must not have.
        return f"ERROR: {_text(error)}"
    return RIGHT[compiled] if worst < 1e-3 else f"WRONG: {worst:.1e}"


def _text(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:150]}"


def rows(names: Sequence[str], compiled: bool) -> Iterator[tuple[str, str, str]]:
    """Model type, class and outcome of each name."""
    for name in names:
        before = time.perf_counter()
        result = outcome(name, compiled)
        print(f"{name}: {result} ({time.perf_counter() - before:.1f} s)", flush=True)
        yield name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name], result
        gc.collect()


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; returns how many families are neither right nor refused."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("names", nargs="*", help="model types whose rows of the page are brought up to date")
    parser.add_argument("--compiled", action="store_true", help="six of eight steps compiled")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    bad = 0
    for row in rows(arguments.names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), arguments.compiled):
        bad += not (row[2] in RIGHT or row[2].startswith(("refused: ", "not run here: ")))
        PAGE.write_text(page(sorted({**read_page(), row[0]: row}.values())))
    return bad


def read_page() -> dict[str, tuple[str, str, str]]:
    """The rows of the page as it is, by model type."""
    text = PAGE.read_text() if PAGE.exists() else ""
    found = re.findall(r"^\| `(.*?)` \| `(.*?)` \| (.*) \|$", text, re.M)
    return {row[0]: row for row in found}


def page(table: Sequence[tuple[str, str, str]]) -> str:
    """The page as Markdown."""
    right, compiled = (sum(result in results for _, _, result in table) for results in (RIGHT, RIGHT[1:]))
    refused = sum(result.startswith("refused: ") for _, _, result in table)
    head = f"""# Families of transformers

`python -m benchmarks.families` makes a tiny model of every causal language model that transformers
{transformers.__version__} maps, with `attn_implementation="pcg"`, and runs eight steps of three ragged requests:
prefill, chunked prefill, decode and mixed. With `--compiled` six of the steps run compiled.

* *Right*: every token's logits equal those of transformers' own attention on its request alone.
* *Refused*: an `OptionsError` or a `BatchError` says why, before any number is computed.
* *Not run here*: the model needs a package that is not installed.

```python
import transformers

import pcg_compile as pcg
import pcg_compile.integrations.transformers

config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
try:
    transformers.BloomForCausalLM._from_config(config, attn_implementation="pcg")
except pcg.errors.OptionsError as error:
    print(error)
# prints: would give wrong numbers with BloomModel
```

{right} of {len(table)} are right, {compiled} of them were run compiled too, and {refused} are refused.

| model type | class | outcome |
|---|---|---|
"""
    return head + "".join(f"| `{name}` | `{kind}` | {result.replace('|', '/')} |\n" for name, kind, result in table)


if __name__ == "__main__":
    sys.exit(main())
