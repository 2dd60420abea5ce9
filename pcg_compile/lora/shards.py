"""What one rank has of a linear layer whose weight is a DTensor, and so which part of an adapter's factors it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError, message
from ..torch_compat.subclasses import is_subclass
from .peft_folder import Factors


@dataclass(frozen=True)
class Share:
    """The outputs and inputs of a linear layer that a rank computes with.

    Note [adapters over ranks]
    A rank adds to its own part of the layer's result, right behind the product with its own part of the weight:

    ======== ========= ========= ==================== ==========================
    kind     x         y         factors              reason
    ======== ========= ========= ==================== ==========================
    rows     whole     its share its rows of b        nothing is added twice
    columns  its share a summand its columns of a     the layer's own sum of the ranks' results sums up these as well
    whole    whole     whole     all                  each rank does the same
    ======== ========= ========= ==================== ==========================

    So no collective is added, and what is added are plain ops on plain tensors, which can be captured.

    Attributes:
        rows, columns: which, ascending, int64 on the CPU; None for all.
        kinds: by dimension of the device mesh, as in the table; None where the weight is a plain tensor.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    kinds: tuple[str, ...] | None = None

    def sizes(self, inputs: int, outputs: int) -> tuple[int, int]:
        """How many inputs and outputs of a whole layer's this rank has."""
        return (
            inputs if self.columns is None else len(self.columns),
            outputs if self.rows is None else len(self.rows),
        )

    def rows_of(self, parts: Mapping[str, int]) -> dict[str, torch.Tensor | None]:
        """This rank's rows of each part of a fused layer, counted within the part, without empty parts.

        None for all rows.
        """
        if self.rows is None:
            return dict.fromkeys(parts)
        found: dict[str, torch.Tensor | None] = {}
        first = 0
        for part, width in parts.items():
            mine = self.rows[(self.rows >= first) & (self.rows < first + width)] - first
            if len(mine):
                found[part] = mine
            first += width
        return found

    def cut(self, rows: Mapping[str, torch.Tensor | None], factors: Mapping[str, Factors]) -> dict[str, Factors]:
        """The rank's part of whole factors, by part; ``rows`` are what :meth:`rows_of` gave."""
        return {
            part: Factors(_take(one.a, 1, self.columns), _take(one.b, 0, rows[part]), one.scaling)
            for part, one in factors.items()
            if part in rows
        }


WHOLE = Share()


def _take(matrix: torch.Tensor, dim: int, indices: torch.Tensor | None) -> torch.Tensor:
    return matrix if indices is None else matrix.index_select(dim, indices)


def is_distributed(value: Any) -> bool:
    """Whether a tensor is a DTensor."""
    if not isinstance(value, torch.Tensor) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def share_of(name: str, weight: torch.Tensor, out_dim: int) -> Share:
    """What this rank has of a layer; no rank asks another one.

    Args:
        name: of the layer. weight: its weight, of two dimensions. out_dim: the one of the layer's outputs.

    Raises:
        AdapterError: a weight that is made of other tensors and no DTensor, one whose parts are summands, one whose
            rows lie in another order than the whole weight's, one with fewer rows than ranks. All ranks
            raise alike.
    """
    if not is_distributed(weight):
        if not is_subclass(weight):
            return WHOLE
        raise _refused_weight(name, type(weight).__name__, "Adapters are not added to quantized weights.")
    own = weight.to_local()  # type: ignore[attr-defined]
    if is_subclass(own):
        raise _refused_weight(name, f"DTensor of {type(own).__name__}", "Adapters are not added to quantized weights.")
    placements = weight.placements  # type: ignore[attr-defined]
    dims = [getattr(placement, "dim", None) for placement in placements]
    if any(dim is None and not one.is_replicate() for dim, one in zip(dims, placements, strict=True)):
        raise _refused_weight(name, f"DTensor {placements}", "Each rank has a summand of it, not a part.")
    # A dimension may be counted from the end.
    kinds = tuple("whole" if dim is None else "rows" if dim % 2 == out_dim else "columns" for dim in dims)
    rows, columns = (_indices(name, weight, *which) for which in ((out_dim, "outputs"), (1 - out_dim, "inputs")))
    return Share(rows, columns, kinds)


def refuse_plain_part(name: str, module: nn.Module, sizes: tuple[int, int]) -> None:
    """Raises for a plain weight that is one rank's part, whose place in the whole nothing tells.

    Args:
        sizes: inputs and outputs that the layer says it has.

    Raises:
        AdapterError: as said; transformers up to 5.17 splits weights so.
    """
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    # A quantized weight may be packed into any shape.
    packed = not weight.is_floating_point() or weight.dtype.itemsize < 2
    other = not packed and tuple(weight.shape) not in (sizes, sizes[::-1])
    if other or getattr(module, "_hf_tp_plan", None) is not None:
        shape = " x ".join(map(str, weight.shape))
        raise AdapterError(
            message(
                f"the weight of {name}, {shape}, is a rank's part, and a plain tensor",
                why="Which part of an adapter belongs to it is not known.",
                cure="Split the model by parallelize_module(model, ...), or with transformers 5.18 or later.",
            )
        )


def _indices(name: str, weight: Any, dim: int, what: str) -> torch.Tensor | None:
    """Which of a weight's outputs or inputs (``what``) this rank has: a tensor of their numbers, split as it is."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [p if getattr(p, "dim", dim - 1) % 2 == dim % 2 else Replicate() for p in weight.placements]
    if all(p.is_replicate() for p in placements):
        return None
    size = weight.shape[dim]
    ranks = [n for n, one in zip(weight.device_mesh.shape, placements, strict=True) if not one.is_replicate()]
    if _smallest(size, ranks) < 1:
        # DTensor gathers such a weight for the product.
        few = f"{name} has {size} {what}, too few for each rank to have a part of them"
        raise AdapterError(message(few, cure="Leave it out of target_modules, or whole on each rank."))
    numbers = torch.arange(size).view((size, 1) if dim == 0 else (1, size))
    # Each rank splits its own copy, without communication.
    mine = distribute_tensor(numbers, weight.device_mesh, placements, src_data_rank=None).to_local().flatten().cpu()
    if len(mine) != weight.to_local().shape[dim] or bool((mine.diff() <= 0).any()):
        raise _refused_weight(name, f"DTensor {tuple(weight.placements)}", "Its rows lie in an order of their own.")
    return mine


def _smallest(size: int, ranks: Sequence[int]) -> int:
    """The smallest part when ``size`` is split over dimensions of a mesh, one after the other."""
    for n in ranks:
        # As torch.chunk does: all parts have one size, until nothing is left.
        size -= (n - 1) * -(-size // n)
    return size


def _refused_weight(name: str, what: str, why: str) -> AdapterError:
    cure = "Make the pool on a model with plain weights, or DTensors of them as parallelize_module makes them."
    return AdapterError(message(f"the weight of {name} is a {what}", why=why, cure=cure))


def own_tensors(module: nn.Module, y: Any, x: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's parts of what a layer gave and was given, as plain tensors; the first shares ``y``'s memory.

    Raises:
        AdapterError: parts that the rank's part of an adapter does not fit.
    """
    kinds: tuple[str, ...] | None = module.pcg_lora_kinds  # type: ignore[assignment]
    if kinds is None and type(y) is torch.Tensor:
        return y, x
    if not is_distributed(y) and not is_distributed(x):
        # A plain weight, or one that was made plain for this product.
        if kinds is not None and (x.shape[-1], y.shape[-1]) != module.pcg_lora_sizes:
            raise _other_sizes(module, y.shape[-1], x.shape[-1])
        return y, x
    if kinds is None:
        what = f"the weight of {module.pcg_lora_name} was split over ranks after its adapter pool was made"
        raise AdapterError(message(what, cure="Make the pool after parallelize_module(model, ...)."))
    if not is_distributed(y) or not is_distributed(x) or not _fit(kinds, y, x):
        raise _other_placements(module, y, x)
    return y.to_local(), x.to_local()


def _fit(kinds: Sequence[str], y: Any, x: Any) -> bool:
    """Whether a layer's result and input lie over the ranks as Note [adapters over ranks] has it."""
    if len(kinds) != len(y.placements) or len(kinds) != len(x.placements):
        return False
    for kind, of_y, of_x in zip(kinds, y.placements, x.placements, strict=True):
        if kind == "columns":
            fits = of_x.is_shard(x.ndim - 1) and of_y.is_partial("sum")
        else:
            fits = of_x.is_replicate() and (of_y.is_replicate() if kind == "whole" else of_y.is_shard(y.ndim - 1))
        if not fits:
            return False
    return True


def _other_sizes(module: nn.Module, outputs: int, inputs: int) -> AdapterError:
    mine: tuple[int, int] = module.pcg_lora_sizes  # type: ignore[assignment]
    return AdapterError(
        message(
            f"{module.pcg_lora_name} computed {inputs} -> {outputs}, and this rank's part of its weight is "
            f"{mine[0]} -> {mine[1]}",
            why="Weights that are gathered for the product, as FSDP does, have no part of an adapter of their own.",
            cure="Split the model by parallelize_module(model, ...), or leave the layer out of target_modules.",
        )
    )


def _other_placements(module: nn.Module, y: Any, x: Any) -> AdapterError:
    of_y, of_x = (getattr(one, "placements", "a plain tensor") for one in (y, x))
    kinds: tuple[str, ...] = module.pcg_lora_kinds  # type: ignore[assignment]
    return AdapterError(
        message(
            f"{module.pcg_lora_name} was given x {of_x} and gave y {of_y}; its weight lies over the ranks by {kinds}",
            why="A rank adds its part of an adapter to its part of the product, for all tokens of the step.",
            cure="Give the layer all tokens: ColwiseParallel(input_layouts=Shard(0)) gathers them ahead of it, and "
            "RowwiseParallel(output_layouts=Shard(0)) splits them behind it.",
        )
    )
