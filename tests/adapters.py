"""Adapters on disk for tests, as PEFT saves them, and small models to put them on."""

from __future__ import annotations

import json
import zlib
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=60,
)  # fmt: skip


def llama(attention: str = "pcg") -> nn.Module:
    """The same random weights each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(deepcopy(CONFIG), attn_implementation=attention).eval()


def save_with_peft(folder: Path, model: nn.Module, **config: Any) -> Path:
    """An adapter with random weights in place of trained ones."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(zlib.crc32(folder.name.encode()))
    get_peft_model(model, LoraConfig(init_lora_weights=False, **config)).save_pretrained(folder)
    return folder


def save_plain(folder: Path, modules: dict[str, tuple[int, int]], rank: int = 2, **fields: Any) -> Path:
    """A folder written by hand: ``modules`` are (inputs, outputs) by path."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules), **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for path, (inputs, outputs) in modules.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, inputs)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(outputs, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
