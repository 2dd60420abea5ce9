"""Declarations of torch's private names: the versions each was read in, and whether this torch has it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Private:
    """One private name of torch that pcg uses.

    Attributes:
        name: its dotted path.
        versions: the versions of torch in which its meaning was read.
        find: returns the object; raises ImportError or AttributeError in a torch that lacks it.
        needed: whether something stops working in a torch that lacks it.
    """

    name: str
    versions: str
    find: Callable[[], Any]
    needed: bool = True


#: Registry, filled while the package's files are imported.
_DECLARED: dict[str, Private] = {}


class _Absent:
    """Stands for a private name that this torch lacks: importing pcg works, using the name raises."""

    def __init__(self, name: str, versions: str) -> None:
        self._message = (
            f"torch {torch.__version__} has no {name}\n"
            f"  pcg reads this private part of torch as it is in {versions}.\n"
            "  See what else is missing: pcg-compile doctor"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(self._message)

    def __getattr__(self, name: str) -> Any:
        raise ImportError(self._message)


def _find(name: str) -> Any:
    """The object of a dotted path, whose longest importable part is a module."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module_name = ".".join(parts[:end])
        try:
            found = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # The path goes on inside a module; what that module itself fails to import is another matter.
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(f"no module named {parts[0]}")


def _declare(name: str, versions: str, find: Callable[[], Any], needed: bool = True) -> None:
    _DECLARED[name] = Private(name, versions, find, needed)


def private(name: str, versions: str, *, cuda: bool = False, optional: bool = False) -> Any:
    """Looks a private name of torch up, at import.

    Args:
        name: its dotted path.
        versions: the versions of torch that it was read in.
        cuda: only CUDA builds have it; others are not reported to lack it.
        optional: the caller does without it.

    Returns:
        The object. Where this torch lacks it: None if ``optional``, else a stand-in that raises ImportError when it is
        used.
    """
    needed = not optional and (not cuda or torch.backends.cuda.is_built())
    _declare(name, versions, functools.partial(_find, name), needed)
    try:
        return _find(name)
    except (ImportError, AttributeError):
        return None if optional else _Absent(name, versions)


def deferred(name: str, versions: str) -> Callable[[], Any]:
    """The same for a name whose module is slow to import: the returned function looks it up when called."""
    _declare(name, versions, functools.partial(_find, name))

    @functools.cache
    def look_up() -> Any:
        try:
            return _find(name)
        except (ImportError, AttributeError):
            return _Absent(name, versions)

    return look_up


def exceptions(module: str, versions: str, names: str) -> tuple[type[BaseException], ...]:
    """The exception types of a module with these names, separated by spaces; those that this torch lacks left out."""
    found = (private(f"{module}.{name}", versions) for name in names.split())
    return tuple(one for one in found if isinstance(one, type))


def attributes(owner: str, versions: str, names: str, make: Callable[[], Any] | None = None) -> None:
    """Declares attributes that are read where nothing can be looked up ahead, such as those of an instance.

    Args:
        owner: dotted path of the object that has them.
        versions: the versions of torch that they were read in.
        names: separated by spaces.
        make: returns an object that has them; left out, ``owner`` itself has.
    """

    def find(attribute: str) -> Any:
        return getattr(make() if make is not None else _find(owner), attribute)

    for name in names.split():
        _declare(f"{owner}.{name}", versions, functools.partial(find, name))


def declared() -> tuple[Private, ...]:
    """All declarations, in the order of import."""
    return tuple(_DECLARED.values())


def missing() -> list[str]:
    """The needed names that this torch lacks; looks each one up, which imports Inductor."""
    found = []
    for name, entry in _DECLARED.items():
        try:
            entry.find()
        except (ImportError, AttributeError):
            if entry.needed:
                found.append(f"{name} (read in {entry.versions})")
    return found
