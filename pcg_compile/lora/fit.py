"""What an adapter adds to which layer of a pool, ready to be copied to the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import AdapterError, message
from .layers import LoRALayer, features_of
from .peft_folder import Factors, read_adapter


@dataclass(frozen=True)
class Stored:
    """An adapter on the host, in one piece of memory for each dtype, so bringing it to a device is one copy.

    Attributes:
        layers: by layer, its factors by part; views of ``flat``. flat: 1-D, pinned where it goes to a GPU: matrices of
            one kind (first or second factor, and width) lie below each other.
    """

    layers: list[dict[str, Factors]]
    flat: dict[torch.dtype, torch.Tensor]

    def to(self, device: torch.device, max_rank: int | None = None) -> Iterator[dict[str, Factors]]:
        """``layers`` on a device, copied without waiting for it; with ``max_rank``, b gets so many columns: zeros."""
        pieces = {}
        rest = {dtype: flat.to(device, non_blocking=True) for dtype, flat in self.flat.items()}
        for kind, matrices in _by_kind(self.layers).items():
            name, dtype, width = kind
            rows = [matrix.shape[0] for matrix in matrices]
            block = rest[dtype][: sum(rows) * width].view(-1, width)
            rest[dtype] = rest[dtype][block.numel() :]
            if max_rank is not None and name == "b":
                block = nn.functional.pad(block, (0, max_rank - width))
            pieces[kind] = iter(block.split(rows))
        for parts in self.layers:
            yield {
                part: Factors(next(pieces[_kind("a", f.a)]), next(pieces[_kind("b", f.b)]), f.scaling)
                for part, f in parts.items()
            }


_Kind = tuple[str, torch.dtype, int]


def _kind(name: str, matrix: torch.Tensor) -> _Kind:
    return name, matrix.dtype, matrix.shape[1]


def _by_kind(layers: Sequence[dict[str, Factors]]) -> dict[_Kind, list[torch.Tensor]]:
    found: dict[_Kind, list[torch.Tensor]] = {}
    for parts in layers:
        for factors in parts.values():
            found.setdefault(_kind("a", factors.a), []).append(factors.a)
            found.setdefault(_kind("b", factors.b), []).append(factors.b)
    return found


def _stored(layers: list[dict[str, Factors]], device: torch.device) -> Stored:
    flat = {}
    kinds = _by_kind(layers)
    for dtype in dict.fromkeys(dtype for _, dtype, _ in kinds):
        # Not the file's own memory, which would change with the file.
        found = [m.reshape(-1) for kind, matrices in kinds.items() if kind[1] == dtype for m in matrices]
        joined = torch.cat(found)
        flat[dtype] = joined.pin_memory() if device.type == "cuda" else joined
    return Stored(list(Stored(layers, flat).to(torch.device("cpu"))), flat)


def read_fitting(folder: str | Path, layers: Sequence[LoRALayer], max_rank: int, device: torch.device) -> Stored:
    """Reads an adapter and brings this rank's part of its factors to the layers' dtypes, pinned where they go to a GPU.

    Raises:
        AdapterError: see :func:`pcg_compile.lora.peft_folder.read_adapter`; a module that no layer is, other sizes
            than the layer's, a rank above ``max_rank``, a number that the layer's dtype cannot hold.
    """
    #: By a part's path: layer and part; by the path of a layer with several parts: layer and None.
    places: dict[str, tuple[int, str | None]] = {}
    for i, layer in enumerate(layers):
        parent = layer.name.rpartition(".")[0]
        for part in layer.parts:
            places[f"{parent}.{part}" if parent else part] = (i, part)
        places.setdefault(layer.name, (i, None))
    found: dict[str, tuple[int, str | None]] = {}

    taken: set[tuple[int, str]] = set()

    def check(module: str, inputs: int, outputs: int, rank: int) -> None:
        name = _own_name(module, places)
        if name is None:
            raise AdapterError(
                message(
                    f"the adapter changes {module}, which the pool does not cover",
                    where=str(folder),
                    cure=f"Name it too: AdapterPool(..., target_modules=[..., {module.rsplit('.', 1)[-1]!r}])",
                )
            )
        i, part = found[module] = places[name]
        changed = {(i, one) for one in (layers[i].parts if part is None else [part])}
        if changed & taken:
            raise AdapterError(message(f"the adapter changes {name} twice", where=str(folder)))
        taken.update(changed)
        sizes = features_of(layers[i].module)
        expected = (sizes[0], sizes[1] if part is None else layers[i].parts[part])
        if (inputs, outputs) != expected:
            raise AdapterError(
                message(
                    f"the adapter's {module} is {inputs} -> {outputs}, the model's {expected[0]} -> {expected[1]}",
                    where=str(folder),
                )
            )
        if rank > max_rank:
            raise AdapterError(
                message(
                    f"the adapter's {module} has rank {rank}, the pool max_rank={max_rank}",
                    where=str(folder),
                    cure=f"Make the pool with AdapterPool(..., max_rank={rank})",
                )
            )

    adapter = read_adapter(folder, check)
    # Whole factors are checked, so all ranks find the same.
    changes: list[dict[str, Factors]] = [{} for _ in layers]
    for module, read in adapter.modules.items():
        i, only = found[module]
        layer = layers[i]
        dtype = layer.layout.dtype
        factors = Factors(read.a.to(dtype), read.b.to(dtype), read.scaling)
        if not (torch.isfinite(factors.a).all() and torch.isfinite(factors.b).all()):
            raise AdapterError(
                message(f"the weights for {module} are too large for {dtype}, the layer's dtype", str(folder))
            )
        if only is not None:
            changes[i][only] = factors
        else:
            # Trained on the fused layer as one: every part has the same first factor.
            rows = factors.b.split(list(layer.parts.values()))
            changes[i] = {p: Factors(factors.a, b, read.scaling) for p, b in zip(layer.parts, rows, strict=True)}
    own = [layer.share.cut(layer.rows, parts) for layer, parts in zip(layers, changes, strict=True)]
    return _stored(own, device)


def _own_name(module: str, names: dict[str, tuple[int, str | None]]) -> str | None:
    """The pool's name for an adapter's module: the same path, or the one that either is the end of."""
    if module in names:
        return module
    ends = [name for name in names if module.endswith(f".{name}") or name.endswith(f".{module}")]
    return ends[0] if len(ends) == 1 else None
