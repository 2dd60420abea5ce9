"""Linear layers that read one input run as one product: query, key and value; gate and up.

At the few hundred rows of a decoding step a product of this size takes a GPU about as long whatever its width, so one
instead of three saves most of the other two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["MergedLayers"]

#: Layers of one module that read the same input, which nothing changes in between, in the models of transformers.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Products:
    """Products of one forward, with their inputs, by layer; one attribute, so a traced call changes one alone."""

    values: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None


class _Merged(nn.Module):
    """Several linear layers as one, on the same memory: their weights move to where they lie one below the other."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layers: Sequence[nn.Linear], products: _Products, place: int) -> None:
        super().__init__()
        self.layers, self.products, self.place = layers, products, place
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def join(self) -> None:
        """Moves weights that lie elsewhere, at first or since a cast; nothing else of them changes."""
        for name in ("weight", "bias"):
            parts = [getattr(layer, name) for layer in self.layers]
            if parts[0] is None:
                continue
            joined, rows = getattr(self, name), sum(map(len, parts))
            like = (parts[0].dtype, parts[0].device)
            if joined is None or (joined.dtype, joined.device) != like:
                joined = parts[0].new_empty(rows, *parts[0].shape[1:])
                setattr(self, name, joined)
            for part, place in zip(parts, joined.split([len(part) for part in parts]), strict=True):
                if part.data_ptr() != place.data_ptr():
                    part.data = place.copy_(part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.products.values
        if values is None:
            return functional.linear(x, self.weight, self.bias)
        known = values.get(self.place)
        if known is None or known[0] is not x:
            known = values[self.place] = x, functional.linear(x, self.weight, self.bias)
        return known[1]


class _Part(nn.Module):
    """Stands for one layer of a merged one."""

    def __init__(self, merged: _Merged, layer: nn.Linear, begin: int) -> None:
        super().__init__()
        self.merged, self.begin, self.end = merged, begin, begin + layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.merged(x)
        return result[..., self.begin : self.end]


class MergedLayers:
    """The merged layers of a model, which stand in for the layers between :meth:`install` and :meth:`remove`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._merged: dict[tuple[nn.Linear, ...], tuple[_Merged, list[_Part]]] = {}
        self._installed: list[tuple[nn.Module, str, nn.Linear]] = []
        self._products, self._places = _Products(), count()

    @torch.inference_mode(False)
    @torch.no_grad()
    def install(self) -> None:
        """Puts merged layers in place, wherever the model has plain ones."""
        known, self._merged = self._merged, {}
        for module, names in _groups(self.model):
            layers = tuple(getattr(module, name) for name in names)
            found = known.get(layers)
            if found is None:
                merged, begin, parts = _Merged(layers, self._products, next(self._places)), 0, []
                for layer in layers:
                    parts.append(_Part(merged, layer, begin))
                    begin += layer.out_features
                found = merged, parts
            self._merged[layers] = found
            found[0].join()
            for name, layer, part in zip(names, layers, found[1], strict=True):
                setattr(module, name, part)
                self._installed.append((module, name, layer))

    def remove(self) -> None:
        """Puts the layers back."""
        for module, name, layer in self._installed:
            setattr(module, name, layer)
        self._installed = []
        self._products.values = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model; each merged layer computes one product an input."""
        self._products.values = {}
        found = self.model(*args, **kwargs)
        self._products.values = None
        return found


def _groups(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    # What two layers have in common must stay so.
    shared = Counter(parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False))
    found = []
    for module in model.modules():
        if not type(module).__module__.startswith("transformers.models."):
            continue
        for names in _SIBLINGS:
            layers = [getattr(module, name, None) for name in names]
            if all(_is_plain(layer, shared) for layer in layers) and _fit(layers):
                found.append((module, names))
    yield from found


def _fit(layers: Sequence[Any]) -> bool:
    """Whether layers differ in their widths alone, each on memory of its own, or all on one that they share."""
    bytes_of_all = sum(layer.weight.nbytes for layer in layers)
    return len(
        {(one.in_features, one.weight.dtype, one.weight.device, one.bias is None) for one in layers}
    ) == 1 and all(one.weight.untyped_storage().nbytes() in (one.weight.nbytes, bytes_of_all) for one in layers)


def _is_plain(layer: Any, shared: Counter[int]) -> bool:
    """Whether a layer computes what its class does, on memory of its own."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and all(
            type(parameter) is nn.Parameter and parameter.is_contiguous() and shared[parameter.data_ptr()] == 1
            for parameter in layer.parameters()
        )
    )
