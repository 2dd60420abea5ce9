"""LoRA on a model's linear layers: which layers, and what is added to each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError, message
from .adapted import FACTORS, adapt, has_forward_of_class, opened_forward, unadapt
from .packed import MOST_SLICES, PackedFactors
from .peft_folder import Factors
from .shards import WHOLE, Share, refuse_plain_part, share_of


@dataclass
class LoRALayer:
    """One layer of the model, and the adapters' factors on it.

    The layer stays in its place, under its name and with its state dict, and gets another class, which adds to its
    result (see Note [the class of a layer]). The factors are one buffer of the layer that no state dict holds, at an
    address that stays, packed as :class:`~pcg_compile.lora.packed.PackedFactors` says. On several ranks in and out are
    this rank's, and parts those that it has a row of (see Note [adapters over ranks]).

    Attributes:
        name: path in the model. module: the layer. parts: names and widths of the columns with factors of their own,
            of all ranks together. share: what this rank has of the layer.
    """

    name: str
    module: Any
    parts: Mapping[str, int]
    max_rank: int
    share: Share = WHOLE
    #: By part, which of its rows this rank has.
    rows: dict[str, torch.Tensor | None] = field(default_factory=dict)
    #: Whether its owner computes without calling it, as long as it has no hook.
    bypassed: bool = False
    handle: Any = None
    #: The forward of its own that the module had, where it has another now.
    forward_before: Any = None
    attached: bool = False
    layout: PackedFactors = field(init=False)
    #: What the user said that the factors are; None: what the weight is.
    dtype: torch.dtype | None = None
    #: The packed tensor and its parts.
    views: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
    #: Scaling and rank that the device has, by slot.
    held: dict[int, tuple[float, int]] = field(default_factory=dict)

    def attach(self, adapters: int, router: Any, dtype: torch.dtype | None) -> None:
        """Makes room for adapters, and has the layer add them."""
        weight = self.module.weight
        if hasattr(self.module, FACTORS):
            raise AdapterError(message(f"{self.name} belongs to another adapter pool", cure="Close it: pool.close()"))
        self.share = share_of(self.name, weight, 1 if _is_conv1d(self.module) else 0)
        if self.share is WHOLE:
            refuse_plain_part(self.name, self.module, features_of(self.module))
        self.rows = self.share.rows_of(self.parts)
        self.dtype = dtype
        computed: torch.dtype = dtype or weight.dtype
        if not computed.is_floating_point or computed.itemsize < 2:
            raise AdapterError(
                message(
                    f"{self.name} has weights of {computed}",
                    why="What it computes in, and so what its adapters do, is not known.",
                    cure="Say it: AdapterPool(model, ..., dtype=torch.bfloat16)",
                )
            )
        self.attached = True
        try:
            self._change_class()
            self._make_factors(adapters, router.id, computed, weight.device)
        except BaseException:
            self.detach()
            raise
        # The router lives as long as a layer that uses it.
        self.module.pcg_lora_name, self.module.pcg_lora_router = self.name, router

    def _change_class(self) -> None:
        own, opened = vars(self.module), None
        if has_forward_of_class(self.module):
            self.forward_before = own.pop("forward", None)
        elif self.share is not WHOLE:
            opened, self.forward_before = opened_forward(self.name, self.module), own["forward"]
        adapt(self.module, around=opened is None and "forward" in own)
        if self.bypassed:
            self.handle = self.module.register_forward_hook(_called)
        if opened is not None:
            own["forward"] = opened(self.module)

    def _make_factors(self, adapters: int, pool: int, dtype: torch.dtype, device: torch.device) -> None:
        sizes = self.share.sizes(*features_of(self.module))
        self.layout = PackedFactors(adapters, self.max_rank, tuple(self.widths.values()), dtype, pool)
        with torch.inference_mode(False), torch.no_grad():
            self.module.register_buffer(FACTORS, self.layout.empty(sizes[0], device), persistent=False)
        self.module.pcg_lora_layout, self.module.pcg_lora_kinds = self.layout.encode(), self.share.kinds
        self.module.pcg_lora_sizes = sizes

    @torch.no_grad()
    def follow(self) -> None:
        """Casts the factors of a model that was cast to another dtype, to a new buffer: graphs are captured again."""
        dtype = self.module.weight.dtype
        if self.dtype is not None or dtype == self.layout.dtype:
            return
        inputs, before = self.module.pcg_lora_sizes[0], self.layout
        parts = before.views(self.factors, inputs)
        self._make_factors(before.adapters, before.pool, dtype, self.factors.device)
        for new, old in zip(self.layout.views(self.factors, inputs), parts, strict=True):
            new.copy_(old)

    @property
    def factors(self) -> torch.Tensor:
        """The packed tensor."""
        factors: torch.Tensor = getattr(self.module, FACTORS)
        return factors

    @property
    def widths(self) -> dict[str, int]:
        """Number of columns that this rank has of each part, without empty parts."""
        return {part: self.parts[part] if rows is None else len(rows) for part, rows in self.rows.items()}

    def detach(self) -> None:
        """Leaves the layer as it was before :meth:`attach`."""
        if not self.attached:
            return
        unadapt(self.module)
        if self.handle is not None:
            self.handle.remove()
        if self.forward_before is not None:
            vars(self.module)["forward"] = self.forward_before
        self.handle, self.forward_before, self.views, self.attached = None, None, None, False

    def put(self, slot: int, factors: Mapping[str, Factors]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Prepares a slot for an adapter; the caller makes the copies, all layers' at once.

        Without gradients, which is the caller's business as well.

        Args:
            factors: this rank's, on this device, by part, b ``[out, max_rank]``; none for a part that the adapter
                leaves alone.

        Returns:
            Targets and sources of the copies.
        """
        packed = self.factors
        if self.views is None or self.views[0] is not packed:
            # A model with hundreds of layers: making them takes longer than the copies do.
            self.views = packed, self.layout.views(packed, self.module.pcg_lora_sizes[0])
        a, b, scalings, ranks = self.views[1]
        rank = max((f.rank for f in factors.values()), default=0)
        # The parts' common one; b makes up for the difference, and by a factor of at most 1.
        scaling = max((f.scaling for f in factors.values()), key=abs, default=0.0)
        first = 0
        copies = []
        for i, (part, width) in enumerate(self.widths.items()):
            given = factors.get(part)
            top, have = i * self.max_rank, given.rank if given is not None else 0
            rows = b[slot, first : first + width]
            if given is not None:
                copies.append((a[slot, top : top + have], given.a))
                copies.append((rows, given.b if given.scaling == scaling else given.b * (given.scaling / scaling)))
            if have < rank:
                # Parts of one layer share a rank: what a part does not use of it adds nothing.
                a[slot, top + have : top + rank].zero_()
                if given is None:
                    rows.zero_()
            first += width
        # Most adapters agree on these: a load is mostly copies.
        if self.held.get(slot) != (scaling, rank):
            self.held.pop(slot, None)
            scalings[slot : slot + 1].fill_(scaling)
            ranks[slot : slot + 1].fill_(rank)
            self.held[slot] = (scaling, rank)
        return copies


def _called(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    """A hook that does nothing: nn.TransformerEncoderLayer calls its layers where they have hooks."""


def features_of(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; transformers' Conv1D keeps its weight transposed."""
    if _is_conv1d(module):
        rows, columns = module.weight.shape
        return rows, columns
    # A quantized weight has a shape of its own.
    return int(module.in_features), int(module.out_features)


def is_linear(module: nn.Module) -> bool:
    """Whether adapters can be added to it: nn.Linear, Conv1D, and classes that look like nn.Linear."""
    if isinstance(module, nn.Linear) or _is_conv1d(module):
        return True
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and tuple(weight.shape) == sizes


def _is_conv1d(module: nn.Module) -> bool:
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and hasattr(module, "nf")


def find_layers(
    model: nn.Module,
    target_modules: Sequence[str] | str,
    fused: Mapping[str, Mapping[str, int] | Sequence[str]],
    max_rank: int,
) -> list[LoRALayer]:
    """The layers that ``target_modules`` name, as PEFT reads it: ends of paths, a regular expression, "all-linear".

    Raises:
        AdapterError: a name that matches nothing; a module that is no linear layer; parts that do not add up to a
            fused layer.
    """
    _check_targets(model, target_modules, fused)
    layers: list[LoRALayer] = []
    seen: set[int] = set()
    products = _products_of_attention(model)
    bypassed = {id(m) for one in model.modules() if isinstance(one, nn.TransformerEncoderLayer) for m in one.modules()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if not _matches(name, module, target_modules) or (target_modules == "all-linear" and module is head):
            continue
        if id(module) in seen:
            continue
        seen.add(id(module))
        if not is_linear(module):
            raise AdapterError(
                message(
                    f"target_modules names {name}, which is {_article(type(module).__name__)}",
                    why="Adapters are added to linear layers; embeddings, convolutions and norms are not supported.",
                    cure=f"Name linear layers, such as: target_modules={_candidates(model)[:3]}",
                )
            )
        if id(module) in products:
            if target_modules == "all-linear":
                continue
            raise AdapterError(
                message(
                    f"target_modules names {name}, whose weight nn.MultiheadAttention reads without calling the layer",
                    why="An adapter on it would have no effect.",
                    cure="Leave it out of target_modules, and train the adapters without it.",
                )
            )
        parts = _parts(name, module, fused)
        layers.append(LoRALayer(name, module, parts, max_rank, bypassed=id(module) in bypassed))
    return layers


def _products_of_attention(model: nn.Module) -> set[int]:
    """The output layers of nn.MultiheadAttention, which are nothing but places for a weight."""
    return {id(one.out_proj) for one in model.modules() if isinstance(one, nn.MultiheadAttention)}


def _check_targets(model: nn.Module, target_modules: Sequence[str] | str, fused: Mapping[str, Any]) -> None:
    """Raises for names that match nothing, and for invalid regular expressions."""
    modules = list(model.named_modules())
    why = f"Its linear layers are: {', '.join(_candidates(model)) or 'none'}."
    alone: list[Sequence[str] | str] = (
        [target_modules] if isinstance(target_modules, str) else [[n] for n in target_modules]
    )
    for targets in alone or [[]]:
        try:
            found = any(_matches(name, module, targets) for name, module in modules)
        except re.error as error:
            raise AdapterError(f"target_modules={targets!r} is no regular expression: {error}") from None
        if not found:
            shown = targets if isinstance(targets, str) else "".join(targets)
            raise AdapterError(
                message(f"target_modules names {shown!r}, which no module of the model is called", why=why)
            )
    for name in fused:
        if not any(_matches(path, module, [name]) for path, module in modules):
            raise AdapterError(message(f"fused names {name!r}, which no module of the model is called", why=why))


def _parts(name: str, module: nn.Module, fused: Mapping[str, Mapping[str, int] | Sequence[str]]) -> dict[str, int]:
    """Names and widths of a layer's parts; it is its own only part where it is not fused."""
    own, outputs = name.rsplit(".", 1)[-1], features_of(module)[1]
    given = fused.get(own, {own: outputs})
    parts = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, outputs // max(1, len(given)))
    if sum(parts.values()) != outputs or len(parts) > MOST_SLICES:
        raise AdapterError(
            message(
                f"the parts of {name}, {parts}, do not add up to its {outputs} outputs"
                if len(parts) <= MOST_SLICES
                else f"{name} has {len(parts)} parts; {MOST_SLICES} at most can be added to at once",
                cure=f'Give their widths: fused={{"{own}": {{"q_proj": 2048, "k_proj": 512, "v_proj": 512}}}}',
            )
        )
    return parts


def _matches(name: str, module: nn.Module, targets: Sequence[str] | str) -> bool:
    if targets == "all-linear":
        return is_linear(module)
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _candidates(model: nn.Module) -> list[str]:
    """The last parts of the paths of a model's linear layers."""
    names = [n for n, m in model.named_modules() if is_linear(m)]
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
