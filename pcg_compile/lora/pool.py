"""A pool of LoRA adapters for one model: on the host all that were loaded, on the device as many as there are slots."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError, BatchError, message
from .layers import LoRALayer, features_of, find_layers
from .peft_folder import Adapter, Factors, read_adapter
from .routing import Router

__all__ = ["AdapterPool"]

#: An adapter on the host: by layer, its factors by part.
_Stored = list[dict[str, Factors]]


class AdapterPool:
    """Adapters that the requests of one batch choose from: ``Batch(..., adapters=["fr", None, "sql"])``.

    Loading while serving writes into slots that nobody uses: no address changes, so that nothing is recorded or
    compiled again, and copies are ordered behind the steps before them. Where slots run out, the adapter that was used
    least recently leaves the device; it stays on the host, and comes back by a copy when a batch names it. Methods may
    be called from any thread.
    """

    def __init__(
        self,
        model: nn.Module,
        max_adapters: int = 8,
        max_rank: int = 64,
        target_modules: Sequence[str] | str = ("q_proj", "v_proj"),
        *,
        fused: Mapping[str, Mapping[str, int]] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            model: any module; its linear layers stay in place. Make the pool before the model is compiled.
            max_adapters: adapters on the device at once. max_rank: the largest rank, 1 to 256.
            target_modules: as in PEFT: ends of module paths, a regular expression for whole paths, or "all-linear".
            fused: for layers fused of several, the widths of their parts by the names that adapters have for them:
                ``{"qkv_proj": {"q_proj": 2048, "k_proj": 512, "v_proj": 512}}``.
            dtype: of the factors, for layers whose weights are not floating point; else each has its weight's.

        Raises:
            AdapterError: a bad size, modules that are not linear or do not exist, layers on several devices, a model
                that has a pool.
        """
        for name, size, most in (("max_adapters", max_adapters, 1024), ("max_rank", max_rank, 256)):
            if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most:
                raise AdapterError(f"AdapterPool({name}={size!r}): it is a whole number from 1 to {most}")
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self._layers = find_layers(model, target_modules, fused or {}, max_rank)
        devices = {layer.module.weight.device for layer in self._layers}
        if len(devices) > 1:
            raise AdapterError(f"the layers lie on several devices: {', '.join(sorted(map(str, devices)))}")
        self.device: torch.device = next(iter(devices))
        self._router = Router(self, max_adapters, self.device)
        attached: list[LoRALayer] = []
        try:
            for layer in self._layers:
                layer.attach(max_adapters, self._router, dtype)
                attached.append(layer)
        except BaseException:
            for layer in attached:
                layer.detach()
            raise
        self._lock = threading.RLock()
        self._stored: dict[str, _Stored] = {}
        #: Slots by name, the least recently used first.
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(max_adapters - 1, -1, -1))
        self._pinned: set[str] = set()
        self._running: Counter[int] = Counter()
        self._step_stream: Any = None
        self._copied: Any = None

    def __repr__(self) -> str:
        return (
            f"AdapterPool({len(self._layers)} layers, {len(self._stored)} adapters, {len(self._slots)} of "
            f"{self.max_adapters} slots used, ranks to {self.max_rank})"
        )

    @property
    def id(self) -> int:
        """What a graph names the pool by."""
        return self._router.id

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters that were loaded."""
        return tuple(self._stored)

    @property
    def resident(self) -> tuple[str, ...]:
        """The adapters on the device, the least recently used first."""
        return tuple(self._slots)

    def load(self, name: str, folder: str | Path) -> None:
        """Reads an adapter that PEFT saved, and brings it to the device if a slot is free or can be freed.

        Raises:
            AdapterError: see :func:`pcg_compile.lora.peft_folder.read_adapter`; an adapter that does not fit the model
                or the pool; a name that a running batch uses.
        """
        if not isinstance(name, str) or not name:
            raise AdapterError(f"{name!r} is no name for an adapter")
        stored = self._fit(read_adapter(folder))
        with self._lock:
            if self._running[self._slots.get(name, -1)]:
                raise AdapterError(
                    message(f"adapter {name!r} is in a running batch", cure="Load it under another name, or later.")
                )
            self._stored[name] = stored
            slot = self._slots.get(name)
            if slot is None:
                slot = self._take_slot(frozenset())
            if slot is not None:
                self._put(name, slot)

    def unload(self, name: str) -> None:
        """Forgets an adapter.

        Raises:
            AdapterError: unknown, or in a running batch.
        """
        with self._lock:
            self._known(name)
            if self._running[self._slots.get(name, -1)]:
                raise AdapterError(message(f"adapter {name!r} is in a running batch", cure="Unload it after the step."))
            del self._stored[name]
            self._pinned.discard(name)
            slot = self._slots.pop(name, None)
            if slot is not None:
                self._free.append(slot)

    def pin(self, name: str) -> None:
        """Keeps an adapter on the device.

        Raises:
            AdapterError: unknown; all slots are pinned or in use.
        """
        with self._lock:
            self._known(name)
            if name not in self._slots:
                slot = self._take_slot(frozenset())
                if slot is None:
                    raise AdapterError(message(f"no slot for adapter {name!r}", why="All are pinned or in use."))
                self._put(name, slot)
            self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Lets an adapter leave the device again.

        Raises:
            AdapterError: unknown.
        """
        with self._lock:
            self._known(name)
            self._pinned.discard(name)

    def close(self) -> None:
        """Takes the adapters off the model, which is the base model from then on."""
        with self._lock:
            for layer in self._layers:
                layer.detach()
            self._stored.clear()
            self._slots.clear()

    def nbytes(self) -> int:
        """Bytes of device memory for all slots."""
        return sum(
            buffer.numel() * buffer.element_size()
            for layer in self._layers
            for name, buffer in layer.module.named_buffers(recurse=False)
            if name.startswith("pcg_lora_")
        )

    # -- for the router: what a step needs ---------------------------------------------------------------------

    def slots_of(self, names: Sequence[str | None]) -> list[int]:
        """The slot of each adapter, -1 for None; those that left the device are copied there again.

        Also for a caller that keeps slots on the device: pin the adapters, then ask.

        Raises:
            BatchError: an unknown adapter; more distinct ones than there are slots.
        """
        with self._lock:
            wanted = dict.fromkeys(name for name in names if name is not None)
            for name in wanted:
                if name not in self._stored:
                    request = list(names).index(name)
                    raise BatchError(
                        message(
                            f"request {request} names the adapter {name!r}, which is not loaded",
                            why=f"Loaded are: {', '.join(map(repr, self._stored)) or 'none'}.",
                            cure=f"Load it first: pool.load({name!r}, folder)",
                        )
                    )
            if len(wanted) > self.max_adapters:
                raise BatchError(
                    message(
                        f"the batch names {len(wanted)} adapters, and the pool has {self.max_adapters} slots",
                        cure=f"Make it with AdapterPool(..., max_adapters={len(wanted)}), or split the batch.",
                    )
                )
            for name in wanted:
                if name not in self._slots:
                    slot = self._take_slot(frozenset(wanted))
                    if slot is None:
                        raise BatchError(
                            message(
                                f"no slot for adapter {name!r}",
                                why="All are pinned, or used by batches that are running.",
                                cure="Unpin adapters, or make the pool with more slots.",
                            )
                        )
                    self._put(name, slot)
                self._slots.move_to_end(name)
            return [-1 if name is None else self._slots[name] for name in names]

    def begin_step(self, slots: Sequence[int]) -> None:
        """Keeps slots as they are until :meth:`end_step`, and orders the step behind copies on other streams."""
        with self._lock:
            self._running.update(slots)
            if self.device.type == "cuda":
                self._step_stream = torch.cuda.current_stream(self.device)
                if self._copied is not None:
                    self._step_stream.wait_event(self._copied)
                    self._copied = None

    def end_step(self, slots: Sequence[int]) -> None:
        """Ends what :meth:`begin_step` began."""
        with self._lock:
            self._running.subtract(slots)

    # -- slots -------------------------------------------------------------------------------------------------

    def _known(self, name: str) -> None:
        if name not in self._stored:
            loaded = ", ".join(map(repr, self._stored)) or "none"
            raise AdapterError(message(f"no adapter is named {name!r}", why=f"Loaded are: {loaded}."))

    def _take_slot(self, wanted: frozenset[str]) -> int | None:
        """A slot that nobody uses, the least recently used adapter's where none is free."""
        if self._free:
            return self._free.pop()
        for name, slot in self._slots.items():
            if name not in wanted and name not in self._pinned and not self._running[slot]:
                del self._slots[name]
                return slot
        return None

    def _put(self, name: str, slot: int) -> None:
        """Copies an adapter into a slot, behind the steps that may still read what was there."""
        cuda = self.device.type == "cuda"
        if cuda:
            stream = torch.cuda.current_stream(self.device)
            if self._step_stream is not None and self._step_stream != stream:
                stream.wait_stream(self._step_stream)
        for layer, factors in zip(self._layers, self._stored[name], strict=True):
            layer.put(slot, factors)
        if cuda:
            self._copied = stream.record_event()
        self._slots[name] = slot

    # -- adapters ----------------------------------------------------------------------------------------------

    def _fit(self, adapter: Adapter) -> _Stored:
        """The adapter's factors by layer, in the layers' dtypes, in pinned memory where they go to a GPU.

        Raises:
            AdapterError: something in it that no layer of the pool takes.
        """
        places = {
            f"{layer.name.rsplit('.', 1)[0]}.{part}" if "." in layer.name else part: (i, part)
            for i, layer in enumerate(self._layers)
            for part in layer.parts
        }
        whole = {layer.name: i for i, layer in enumerate(self._layers) if len(layer.parts) > 1}
        stored: _Stored = [{} for _ in self._layers]
        for module, factors in adapter.modules.items():
            name = _own_name(module, [*places, *whole])
            if name is None:
                raise AdapterError(
                    message(
                        f"the adapter changes {module}, which the pool does not cover",
                        where=str(adapter.folder),
                        cure=f"Name it too: AdapterPool(..., target_modules=[..., {module.rsplit('.', 1)[-1]!r}])",
                    )
                )
            if name in whole:
                # Trained on the fused layer as one: every part has the same first factor.
                layer, first = self._layers[whole[name]], 0
                self._check(layer, module, factors, features_of(layer.module)[1], adapter)
                for part, width in layer.parts.items():
                    rows = factors.b[first : first + width]
                    stored[whole[name]][part] = self._host(layer, Factors(factors.a, rows, factors.scaling))
                    first += width
            else:
                index, part = places[name]
                layer = self._layers[index]
                self._check(layer, module, factors, layer.parts[part], adapter)
                stored[index][part] = self._host(layer, factors)
        return stored

    def _check(self, layer: LoRALayer, module: str, factors: Factors, outputs: int, adapter: Adapter) -> None:
        inputs = features_of(layer.module)[0]
        if factors.a.shape[1] != inputs or factors.b.shape[0] != outputs:
            raise AdapterError(
                message(
                    f"the adapter's {module} is {factors.a.shape[1]} -> {factors.b.shape[0]}, "
                    f"the model's {inputs} -> {outputs}",
                    where=str(adapter.folder),
                )
            )
        if factors.rank > self.max_rank:
            raise AdapterError(
                message(
                    f"the adapter's {module} has rank {factors.rank}, the pool max_rank={self.max_rank}",
                    where=str(adapter.folder),
                    cure=f"Make the pool with AdapterPool(..., max_rank={factors.rank})",
                )
            )

    def _host(self, layer: LoRALayer, factors: Factors) -> Factors:
        dtype = layer.module.pcg_lora_a.dtype

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.to(dtype).contiguous()
            return tensor.pin_memory() if self.device.type == "cuda" else tensor

        return Factors(kept(factors.a), kept(factors.b), factors.scaling)


def _own_name(module: str, names: Sequence[str]) -> str | None:
    """The pool's name for an adapter's module: the same path, or the one that either is the end of."""
    if module in names:
        return module
    ends = [name for name in names if module.endswith(f".{name}") or name.endswith(f".{module}")]
    return ends[0] if len(ends) == 1 else None
