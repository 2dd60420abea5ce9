"""The weights that a graph has as attributes, where they lie in the modules that are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .argument_form import NoFastCall
from .registry import RUNNING_CALL

__all__ = ["Weights", "WeightsChanged"]

_training = itemgetter("training")


class WeightsChanged(Exception):
    """The modules of a graph have other children now, or weights that were one tensor are several: trace again.

    Or, with the :class:`Weights` that ``moved``: those of a call without Dynamo, which has to go through it.
    """

    moved: Weights | None = None


class Weights:
    """Where the tensors lie that a graph has as attributes: in the module that is called, and in fixed ones.

    Of each module the tensors are looked up once. Later calls compare, without a loop in Python, the entries of all
    dicts of children, parameters and buffers with what they were. Another tensor in an entry is used from then on;
    other children, an entry that is there no more or was None, and ``requires_grad`` that differs where gradients are
    on, raise :class:`WeightsChanged`.
    Only modules that the graph has run for are known: whether it is right for another one is for Dynamo to say.

    Args:
        tensors: the graph's attributes. module: the module that was called, or None. others: modules that the
            function reaches otherwise.

    Raises:
        NoFastCall: a tensor lies in none of the modules.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], module: torch.nn.Module | None, others: Sequence[torch.nn.Module]
    ) -> None:
        self.others = tuple(others)
        found: dict[int, list[tuple[str, str, str]]] = {id(tensor): [] for tensor in tensors}
        for path, one in self._modules(module):
            for kind, entries in _entries(one):
                for name, value in entries.items():
                    if isinstance(value, torch.Tensor) and id(value) in found:
                        found[id(value)].append((path, kind, name))
        if not all(found.values()):
            raise NoFastCall("a weight lies in no module that the function is called with or refers to")
        self.places = [found[id(tensor)] for tensor in tensors]
        #: Training flags of the traced modules, by path: the graph is right for these.
        self.training = {path: one.training for path, one in self._modules(module)}
        self._of: WeakKeyDictionary[Any, _Snapshot] = WeakKeyDictionary()

    @classmethod
    def at(
        cls,
        places: Sequence[Sequence[Sequence[str]]],
        module: torch.nn.Module | None,
        others: Sequence[torch.nn.Module],
    ) -> Weights:
        """The same from known places: several (path, kind, name) of each tensor."""
        weights = cls([], module, others)
        weights.places = [[(path, kind, name) for path, kind, name in several] for several in places]
        return weights

    def _modules(self, module: torch.nn.Module | None) -> Iterable[tuple[str, torch.nn.Module]]:
        for i, root in enumerate(([module] if module is not None else []) + list(self.others)):
            for path, one in root.named_modules():
                yield f"{i}.{path}", one

    def known(self, module: torch.nn.Module | None) -> list[torch.Tensor] | None:
        """The tensors of the graph in a module if nothing has changed since they were looked up, else None."""
        snapshot = self._of.get(module if module is not None else self)
        if snapshot is None or not snapshot.holds() or not snapshot.same_flags() or not snapshot.same_gradients():
            return None
        return snapshot.tensors

    def of_call(self) -> list[torch.Tensor]:
        """The tensors of the graph for the running call.

        Raises:
            WeightsChanged: see :meth:`of`; in a call without Dynamo, anything has changed since they were looked up.
        """
        running = RUNNING_CALL.get()
        if running is None or not running.fast:
            return self.of(running.module if running is not None else None)
        tensors = self.known(running.module)
        if tensors is None:
            changed = WeightsChanged("weights, training flags or children of a module have changed")
            changed.moved = self
            raise changed
        return tensors

    def follow(self, module: torch.nn.Module | None) -> None:
        """Looks the tensors up again, of a module that is known, where they have changed.

        Raises:
            WeightsChanged: see :meth:`of`.
        """
        if self._of.get(module if module is not None else self) is not None:
            self.of(module)

    def of(self, module: torch.nn.Module | None) -> list[torch.Tensor]:
        """The tensors of the graph in a module; the list is kept.

        Raises:
            WeightsChanged: the module or one inside has other children now, or tensors in several places differ.
        """
        key = module if module is not None else self
        snapshot = self._of.get(key)
        if snapshot is not None and not snapshot.same_gradients():
            raise WeightsChanged("requires_grad of a weight has changed")
        if snapshot is None or not snapshot.holds():
            if snapshot is not None and not snapshot.same_children():
                raise WeightsChanged("a module has been replaced")
            if snapshot is not None and not snapshot.same_names():
                raise WeightsChanged("a module has other parameters or buffers")
            snapshot = self._of[key] = _Snapshot(dict(self._modules(module)), self)
        return snapshot.tensors


class _Snapshot:
    """The entries of one module's dicts at one time."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], weights: Weights) -> None:
        self.children = [one._modules for one in modules.values() if one._modules]
        self.old_children = [dict(entries) for entries in self.children]
        self.tensors: list[torch.Tensor] = []
        # Also those without a tensor of the graph: an entry that was None is a branch of the code.
        tables = [table for one in modules.values() for table in (one._parameters, one._buffers) if table]
        dicts: dict[int, dict[str, Any]] = {id(table): table for table in tables}
        alone: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        for several in weights.places:
            entries = []
            for path, kind, name in several:
                if path not in modules or name not in (holder := dict(_entries(modules[path]))[kind]):
                    raise WeightsChanged(f"{path}.{name} is gone")
                entries.append((kind, holder, name))
            tensor = entries[0][1][entries[0][2]]
            if not isinstance(tensor, torch.Tensor) or any(holder[name] is not tensor for _, holder, name in entries):
                raise WeightsChanged("weights that were one tensor are several now")
            self.tensors.append(tensor)
            for kind, holder, name in entries:
                if kind == "attribute":
                    alone.append((holder, name, tensor))
        self.dicts = list(dicts.values())
        self.old_dicts = [dict(entries) for entries in self.dicts]
        # Comparing tensors of one element gives an answer, and one that says nothing of their identity.
        for holder in self.dicts:
            alone += [(holder, n, t) for n, t in holder.items() if isinstance(t, torch.Tensor) and t.numel() < 2]
        self.alone = [(holder, name) for holder, name, _ in alone]
        self.old_alone = [tensor for *_, tensor in alone]
        self.trained = [tensor.requires_grad for tensor in self.tensors]
        self.flags = [vars(one) for one in modules.values()]
        self.traced_flags = [weights.training.get(path) for path in modules]

    def same_children(self) -> bool:
        return self.children == self.old_children

    def same_names(self) -> bool:
        """Whether the same entries are there, and the same ones None."""
        now, old = (
            [[(n, t is None) for n, t in one.items()] for one in tables] for tables in (self.dicts, self.old_dicts)
        )
        return now == old

    def holds(self) -> bool:
        """Whether all entries are the objects that they were."""
        try:
            # Dicts are compared in C, their values by identity first.
            if self.children != self.old_children or self.dicts != self.old_dicts:
                return False
        except (RuntimeError, TypeError, ValueError):
            return False  # tensors that are not the same object do not compare
        return not self.alone or all(map(is_, [holder.get(name) for holder, name in self.alone], self.old_alone))

    def same_gradients(self) -> bool:
        """Whether weights still require gradients, or do not, as far as it matters now."""
        return not torch.is_grad_enabled() or [tensor.requires_grad for tensor in self.tensors] == self.trained

    def same_flags(self) -> bool:
        return list(map(_training, self.flags)) == self.traced_flags


def _entries(module: torch.nn.Module) -> list[tuple[str, dict[str, Any]]]:
    return [("parameter", module._parameters), ("buffer", module._buffers), ("attribute", vars(module))]
