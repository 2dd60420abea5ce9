"""The ways of serving adapters that ``lora`` compares: one set of weights, one cache, one set of folders."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pcg_compile as pcg

from .models import PAGE_SIZE, Shape, dtype_of

__all__ = [
    "TARGETS",
    "Mix",
    "Ours",
    "Theirs",
    "Way",
    "bare_copy",
    "history_of",
    "load_peft",
    "make_llama",
    "make_mix",
    "save_adapter",
    "targets_of",
]

#: Layers with adapters, in PEFT and in the pool.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_llama(shape: Shape, device: torch.device) -> Any:
    """transformers' Llama without a head, made on the device: random weights, bfloat16 on CUDA, float32 elsewhere."""
    from transformers import AutoModel, LlamaConfig

    import pcg_compile.integrations.transformers as integration

    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        max_position_embeddings=8192, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = AutoModel.from_config(config, attn_implementation=integration.NAME, dtype=dtype_of(device))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            # Scores of some spread: attention to the wrong keys then shows in the result.
            module.weight.data.normal_(std=module.in_features**-0.5)
    model.embed_tokens.weight.data.normal_()
    return model.requires_grad_(False).eval()


def bare_copy(model: Any) -> Any:
    """Another model with the same parameters in memory, and a config of its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def targets_of(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the layers with adapters, by path."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(TARGETS)
    }


def save_adapter(folder: Path, model: torch.nn.Module, rank: int, seed: int) -> int:
    """A folder as PEFT writes it, with random factors that add about as much as a layer gives; their bytes."""
    from safetensors.torch import save_file

    parameter = next(model.parameters())
    kind: dict[str, Any] = {"dtype": parameter.dtype, "device": parameter.device}
    kind["generator"] = torch.Generator(parameter.device).manual_seed(seed)
    tensors = {}
    for path, (inputs, outputs) in targets_of(model).items():
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = (torch.randn(rank, inputs, **kind) * inputs**-0.5).cpu()
        tensors[f"{key}.lora_B.weight"] = (torch.randn(outputs, rank, **kind) * 0.5 * rank**-0.5).cpu()
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(TARGETS), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


@dataclass(frozen=True)
class Mix:
    """Requests as a server has them: lists of lengths, pages and adapters' names, and ids ``[n]`` on the device."""

    kind: str
    qo_lens: list[int]
    kv_lens: list[int]
    page_table: list[list[int]]
    adapters: list[str | None]
    ids: torch.Tensor

    @property
    def last(self) -> torch.Tensor:
        """Index of each request's last token, int64."""
        return torch.tensor(self.qo_lens).cumsum(0) - 1


def make_mix(
    shape: Shape, cache: pcg.PagedKVCache, free: Sequence[int], kind: str, size: int, names: Sequence[str]
) -> Mix:
    """A batch in which one request in five is the base model's, and the others name adapters in turn.

    Args:
        free: pages for it. kind: "decode": ``size`` requests of one token, 64 to 512 cached; "prefill": about ``size``
            tokens in equal prompts, so nobody has to pad, four of them or as many as it takes to name all.
    """
    draw = random.Random(size)
    if kind == "decode":
        longest = 512 if shape.hidden >= 512 else 64
        qo_lens = [1] * size
        kv_lens = [1 + draw.randint(longest // 8, longest) for _ in qo_lens]
    else:
        requests = max(4, -(-5 * len(names) // 4))
        qo_lens = kv_lens = [max(1, size // requests)] * requests
    named = len(qo_lens) - max(1, len(qo_lens) // 5)
    adapters = [names[i % len(names)] if i < named else None for i in range(len(qo_lens))]
    # The same pages by kind and size, whatever the adapters: a decode's history is read off them once.
    left = list(free)
    draw.shuffle(left)
    table = [[left.pop() for _ in range(-(-kv // PAGE_SIZE))] for kv in kv_lens]
    draw.shuffle(adapters)
    generator = torch.Generator().manual_seed(size)
    ids = torch.randint(0, shape.vocab, (sum(qo_lens),), generator=generator).to(cache.device)
    return Mix(kind, qo_lens, kv_lens, table, adapters, ids)


Call = Callable[[], torch.Tensor]


@dataclass
class Way:
    """One way of running a mix's step. A call gives the hidden states ``[n, hidden]`` of all its tokens.

    Attributes:
        model: what is called. named: whether requests get their adapters, or all the base model.
    """

    model: Any
    named: bool

    @contextmanager
    def enter(self, mix: Mix) -> Iterator[Call]:
        """Prepares a step from host lists, and gives the call that runs the model."""
        raise NotImplementedError
        yield


@dataclass
class Ours(Way):
    """pcg, or the same model uncompiled. ``pooled``: whether the model has a pool that the batch is for."""

    cache: pcg.PagedKVCache
    pooled: bool = True

    @contextmanager
    def enter(self, mix: Mix) -> Iterator[Call]:
        adapters: list[str | None] | None = None
        if self.pooled:
            adapters = mix.adapters if self.named else [None] * len(mix.qo_lens)
        batch = pcg.Batch(mix.qo_lens, mix.kv_lens, mix.page_table, adapters=adapters)
        with pcg.step(batch, self.cache):
            ids, positions = mix.ids[None], batch.positions[None]
            yield lambda: self.model(input_ids=ids, position_ids=positions).last_hidden_state[0]


@dataclass
class Theirs(Way):
    """PEFT's mixed batches: requests in rows, decodes padded on the left to the longest history."""

    #: Keys and values of a decode's history, and its length, by requests; shared by all ways of PEFT's.
    histories: dict[int, tuple[Any, int]]

    @contextmanager
    def enter(self, mix: Mix) -> Iterator[Call]:
        """The call is for once: it appends to the history, which is cut when the context ends."""
        requests, device = len(mix.qo_lens), mix.ids.device
        names = [name if self.named and name is not None else "__base__" for name in mix.adapters]
        inputs: dict[str, Any] = {"input_ids": mix.ids.view(requests, -1), "use_cache": True, "adapter_names": names}
        call = lambda: self.model(**inputs).last_hidden_state.flatten(0, 1)
        if mix.kind == "prefill":
            yield call
            return
        longest = max(mix.kv_lens)
        rows = [[0] * (longest - kv) + [1] * kv for kv in mix.kv_lens]
        inputs["attention_mask"] = torch.tensor(rows).to(device)
        inputs["position_ids"] = torch.tensor([[kv - 1] for kv in mix.kv_lens]).to(device)
        cache, length = self.histories[requests]
        inputs["past_key_values"] = cache
        try:
            yield call
        finally:
            grown = cache.get_seq_length() - length
            if grown:
                cache.crop(-grown)


def history_of(mix: Mix, cache: pcg.PagedKVCache) -> tuple[Any, int]:
    """What a paged cache holds for a decode's requests, as transformers keeps it, and the longest's length."""
    from transformers import DynamicCache

    longest = max(mix.kv_lens) - 1
    slots = []
    for kv, pages in zip(mix.kv_lens, mix.page_table, strict=True):
        own = [pages[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(kv - 1)]
        slots.append([0] * (longest - len(own)) + own)
    where = torch.tensor(slots, device=cache.device)
    made: Any = DynamicCache()
    for layer, (keys, values) in enumerate(zip(cache.flat_k, cache.flat_v, strict=True)):
        made.update(keys[where].transpose(1, 2), values[where].transpose(1, 2), layer)
    return made, longest


def load_peft(model: Any, folders: dict[str, Path]) -> Any:
    """The model with PEFT's layers and all adapters, in their own dtype.

    PEFT brings up-cast factors by default; a step would then convert every input and output.
    """
    from peft import PeftModel

    model.set_attn_implementation("sdpa")
    model.config.use_cache = True
    options: dict[str, Any] = {
        "autocast_adapter_dtype": False,
        "low_cpu_mem_usage": True,
        "torch_device": str(next(model.parameters()).device),
    }
    (first, folder), *others = folders.items()
    wrapped = PeftModel.from_pretrained(model, folder, adapter_name=first, **options)
    for name, folder in others:
        wrapped.load_adapter(folder, adapter_name=name, **options)
    return wrapped.eval()
