"""A pool of LoRA adapters for one model: on the host all that were loaded, on the device as many as there are slots."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError, BatchError, message
from ..torch_compat.cuda import foreach_copy
from .fit import Stored, read_fitting
from .layers import LoRALayer, find_layers
from .routing import Router


class AdapterPool:
    """Adapters that the requests of one batch choose from: ``Batch(..., adapters=["fr", None, "sql"])``.

    Loading while serving writes into slots that nobody uses: no address changes, so nothing is captured or
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
        fused: Mapping[str, Mapping[str, int] | Sequence[str]] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            model: any module; its linear layers stay in place, as instances of a subclass that adds adapters; hooks see
                what was added. Move it to its device first, and split it over ranks; a model that was compiled before
                is compiled again.
            max_adapters: adapters on the device at once. max_rank: the largest rank, 1 to 256.
            target_modules: as in PEFT: ends of module paths, a regular expression for whole paths, or "all-linear".
            fused: for layers fused of several, up to 4, the widths of their parts by the names that adapters have for
                them: ``{"qkv_proj": {"q_proj": 2048, "k_proj": 512, "v_proj": 512}}``; names alone where all parts have
                one width: ``{"gate_up_proj": ["gate_proj", "up_proj"]}``.
            dtype: of the factors, for layers whose weights are not floating point; else each has its weight's.

        Raises:
            AdapterError: a bad size, modules that are not linear or do not exist, layers on several devices, a model
                that has a pool, weights that lie over ranks so no part of an adapter fits.
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
        self._lock = self._router.lock
        self._stored: dict[str, Stored] = {}
        #: Slots by name, the least recently used first.
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(max_adapters - 1, -1, -1))
        self._pinned: set[str] = set()
        self._running: Counter[int] = Counter()
        #: Streams that steps ran on: few, and none is forgotten.
        self._step_streams: dict[Any, None] = {}
        self._copied: Any = None
        self._closed = False

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
        self._usable()
        stored = read_fitting(folder, self._layers, self.max_rank, self.device)
        with self._lock:
            # Closed meanwhile, perhaps.
            self._usable()
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
        """Takes the adapters off the model, which is the base model from then on.

        Raises:
            AdapterError: a running batch uses them.
        """
        with self._lock:
            if any(self._running.values()):
                raise AdapterError(message("a running batch uses the pool", cure="Close it after the step."))
            for layer in self._layers:
                layer.detach()
            self._closed = True
            self._stored.clear()
            self._slots.clear()
            self._pinned.clear()

    def nbytes(self) -> int:
        """Bytes of device memory for all slots."""
        attached = [layer.factors for layer in self._layers if layer.attached]
        return sum(factors.numel() * factors.element_size() for factors in attached)

    # -- for the router: what a step needs ---------------------------------------------------------------------

    def slots_of(self, names: Sequence[str | None]) -> list[int]:
        """The slot of each adapter, -1 for None; those that left the device are copied there again.

        Also for a caller that keeps slots on the device: pin the adapters, then ask.

        Raises:
            BatchError: an unknown adapter; more distinct ones than there are slots.
        """
        with self._lock:
            wanted = dict.fromkeys(name for name in names if name is not None)
            if wanted:
                self._usable()
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
                stream = torch.cuda.current_stream(self.device)
                self._step_streams[stream] = None
                if self._copied is not None:
                    stream.wait_event(self._copied)

    def end_step(self, slots: Sequence[int]) -> None:
        """Ends what :meth:`begin_step` began."""
        with self._lock:
            self._running.subtract(slots)

    # -- slots -------------------------------------------------------------------------------------------------

    def _usable(self) -> None:
        if self._closed:
            raise AdapterError(message("the adapter pool is closed", cure="Make another: AdapterPool(model, ...)"))
        device = self._layers[0].factors.device
        if device != self.device:
            raise AdapterError(
                message(
                    f"the model is on {device}, and its adapter pool was made on {self.device}",
                    cure="Make the pool after model.to(...).",
                )
            )
        first = self._layers[0]
        if first.dtype is None and first.module.weight.dtype != first.layout.dtype:
            with self._lock:
                for layer in self._layers:
                    layer.follow()

    def _known(self, name: str) -> None:
        if name not in self._stored:
            loaded = ", ".join(map(repr, self._stored)) or "none"
            raise AdapterError(message(f"no adapter is named {name!r}", why=f"Loaded are: {loaded}."))

    def _take_slot(self, wanted: frozenset[str]) -> int | None:
        """A free slot, or the least recently used adapter's if it is not in use; None if there is neither."""
        if self._free:
            return self._free.pop()
        for name, slot in self._slots.items():
            if name not in wanted and name not in self._pinned and not self._running[slot]:
                del self._slots[name]
                return slot
        return None

    def _put(self, name: str, slot: int) -> None:
        """Copies an adapter into an unused slot, after the steps that may still read its old contents."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            if stream is not None:
                for other in self._step_streams:
                    if other != stream:
                        stream.wait_stream(other)
                if self._copied is not None:
                    # Whoever waits for this copy has then waited for those on other streams before it.
                    stream.wait_event(self._copied)
            with torch.no_grad():
                brought = self._stored[name].to(self.device, self.max_rank)
                found = [layer.put(slot, factors) for layer, factors in zip(self._layers, brought, strict=True)]
                copies = [pair for pairs in found for pair in pairs]
                if copies:
                    foreach_copy([target for target, _ in copies], [source for _, source in copies])
        except BaseException:
            self._slots.pop(name, None)
            self._free.append(slot)
            raise
        finally:
            if stream is not None:
                self._copied = stream.record_event()
        self._slots[name] = slot
