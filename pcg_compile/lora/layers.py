"""LoRA on a model's linear layers: which layers, and what is added to each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError, message
from ..torch_internals import is_subclass
from .peft_folder import Factors

__all__ = ["LoRALayer", "find_layers"]

_BUFFERS = ("pcg_lora_a", "pcg_lora_b", "pcg_lora_scalings", "pcg_lora_ranks")


@dataclass
class LoRALayer:
    """One layer of the model, and the adapters' factors on it.

    The layer itself stays what it is, under its name and with its state dict: a forward hook adds to its output. The
    factors are buffers of the layer that no state dict holds, at addresses that stay:
    ``a [adapters, parts * rank, in]``, ``b [adapters, out, rank]``, ``scalings [adapters]`` float32,
    ``ranks [adapters]`` int32; rank is the pool's largest.

    Attributes:
        name: path in the model. module: the layer. parts: names and widths of the columns with factors of their own.
    """

    name: str
    module: nn.Module
    parts: Mapping[str, int]
    max_rank: int
    handle: Any = None

    def attach(self, adapters: int, router: Any, dtype: torch.dtype | None) -> None:
        """Makes room for adapters, and has the layer add them."""
        weight = self.module.weight
        if hasattr(self.module, _BUFFERS[0]):
            raise AdapterError(message(f"{self.name} belongs to another adapter pool", cure="Close it: pool.close()"))
        if is_subclass(weight):
            raise AdapterError(
                message(
                    f"the weight of {self.name} is a {type(weight).__name__}",
                    why="Adapters are not split over ranks, and not added to quantized weights.",
                    cure="Make the pool on a model whose weights are plain tensors.",
                )
            )
        inputs, outputs = features_of(self.module)
        dtype = dtype or weight.dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise AdapterError(
                message(
                    f"{self.name} has weights of {dtype}",
                    why="What it computes in, and so what its adapters do, is not known.",
                    cure="Say it: AdapterPool(model, ..., dtype=torch.bfloat16)",
                )
            )
        rows = len(self.parts) * self.max_rank
        shapes = ((adapters, rows, inputs), (adapters, outputs, self.max_rank), (adapters,), (adapters,))
        dtypes = (dtype, dtype, torch.float32, torch.int32)
        with torch.inference_mode(False), torch.no_grad():
            for name, shape, kind in zip(_BUFFERS, shapes, dtypes, strict=True):
                empty = torch.zeros(shape, dtype=kind, device=weight.device)
                self.module.register_buffer(name, empty, persistent=False)
        # The router lives as long as a layer that uses it.
        self.handle = self.module.register_forward_hook(_hook_of(router, list(self.parts.values())))

    def detach(self) -> None:
        """Leaves the layer as it was before :meth:`attach`."""
        if self.handle is not None:
            self.handle.remove()
            for name in _BUFFERS:
                delattr(self.module, name)
            self.handle = None

    @torch.no_grad()
    def put(self, slot: int, factors: Mapping[str, Factors]) -> None:
        """Writes an adapter's factors, by part, into a slot; no factors for what it leaves alone."""
        a, b, scalings, ranks = (getattr(self.module, name) for name in _BUFFERS)
        rank = max((f.rank for f in factors.values()), default=0)
        scaling = next((f.scaling for f in factors.values()), 0.0)
        first = 0
        for i, (part, width) in enumerate(self.parts.items()):
            given = factors.get(part)
            rows = a[slot, i * self.max_rank : i * self.max_rank + rank]
            columns = b[slot, first : first + width, :rank]
            have = given.rank if given is not None else 0
            if given is not None:
                rows[:have].copy_(given.a, non_blocking=True)
                columns[:, :have].copy_(given.b, non_blocking=True)
                if given.scaling != scaling:
                    columns[:, :have].mul_(given.scaling / scaling)
            # Parts of one layer share a rank: what a part does not use of it adds nothing.
            rows[have:].zero_()
            columns[:, have:].zero_()
            first += width
        scalings[slot : slot + 1].fill_(scaling)
        ranks[slot : slot + 1].fill_(rank)


def _hook_of(router: Any, widths: list[int]) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
    number = router.id

    def add_adapters(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:
            factors = (module.pcg_lora_a, module.pcg_lora_b, module.pcg_lora_scalings, module.pcg_lora_ranks)
            torch.ops.pcg.lora(output, args[0], *factors, widths, number)
        return output

    add_adapters.router = router  # type: ignore[attr-defined]
    return add_adapters


def features_of(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; transformers' Conv1D keeps its weight transposed."""
    rows, columns = module.weight.shape
    return (rows, columns) if _is_conv1d(module) else (columns, rows)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def find_layers(
    model: nn.Module,
    target_modules: Sequence[str] | str,
    fused: Mapping[str, Mapping[str, int]],
    max_rank: int,
) -> list[LoRALayer]:
    """The layers that ``target_modules`` name, as PEFT reads it: ends of paths, a regular expression, "all-linear".

    Raises:
        AdapterError: nothing matches; a module that is no linear layer; parts that do not add up to a fused layer.
    """
    layers: list[LoRALayer] = []
    seen: set[int] = set()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if not _matches(name, module, target_modules) or (target_modules == "all-linear" and module is head):
            continue
        if id(module) in seen:
            continue
        seen.add(id(module))
        if not isinstance(module, nn.Linear) and not _is_conv1d(module):
            raise AdapterError(
                message(
                    f"target_modules names {name}, which is {_article(type(module).__name__)}",
                    why="Adapters are added to linear layers; embeddings, convolutions and norms are not supported.",
                    cure=f"Name linear layers, such as: target_modules={_candidates(model)[:3]}",
                )
            )
        own = name.rsplit(".", 1)[-1]
        parts = dict(fused.get(own, {own: features_of(module)[1]}))
        if sum(parts.values()) != features_of(module)[1]:
            raise AdapterError(
                message(f"the parts of {name}, {parts}, do not add up to its {features_of(module)[1]} outputs")
            )
        layers.append(LoRALayer(name, module, parts, max_rank))
    if not layers:
        raise AdapterError(
            message(
                f"target_modules={target_modules!r} names no module of the model",
                why=f"Its linear layers are: {', '.join(_candidates(model)) or 'none'}.",
            )
        )
    return layers


def _matches(name: str, module: nn.Module, targets: Sequence[str] | str) -> bool:
    if targets == "all-linear":
        return isinstance(module, nn.Linear) or _is_conv1d(module)
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _candidates(model: nn.Module) -> list[str]:
    """The last parts of the paths of a model's linear layers."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or _is_conv1d(m)]
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
