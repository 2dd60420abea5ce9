"""What a saved program was made for, as plain data: versions, device, source code, the model; and what is here."""

from __future__ import annotations

import hashlib
import inspect
import linecache
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from .errors import ProgramError, message
from .fx.graph_data import CannotSave
from .lora.adapted import routers_of
from .lora.packed import renumbered
from .version import __version__

__all__ = ["check_sources", "compare", "device_data", "different", "model_data", "sources_data", "unfit", "versions"]

_TORCH, _OWN = (os.path.dirname(str(file)) + os.sep for file in (torch.__file__, __file__))
_PYTHON = sysconfig.get_path("stdlib") + os.sep
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_CONTAINERS = (list, tuple, set, frozenset, dict)
#: What torch.compile leaves at a module.
_OF_TORCH = frozenset({"_is_torch_compile"})
#: How many objects and containers deep attributes are compared.
_DEEPEST = 5


def versions() -> dict[str, str]:
    """The versions that decide what a program's code means."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    python = platform.python_version()
    return {"torch": torch.__version__, "triton": of("triton"), "pcg": __version__, "Python": python}


def device_data(device: torch.device) -> dict[str, Any]:
    """The kind of a device; a GPU's model and capability."""
    if device.type != "cuda":
        return {"type": device.type}
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return {"type": "cuda", "name": name, "capability": list(capability)}


def sources_data(codes: Iterable[CodeType]) -> list[list[Any]]:
    """Of functions: their file and line, a hash of their source, and the plain globals that they use.

    What the versions of Python, torch and pcg tell is left out, and generated code, which has no source.

    Raises:
        CannotSave: the source of one cannot be read.
    """
    files = {_file_of(module): name for name, module in list(sys.modules.items()) if _file_of(module)}
    found = []
    for code in codes:
        file, first = code.co_filename, code.co_firstlineno
        library = file.startswith(_PYTHON) and "-packages" + os.sep not in file
        text = _source_text(file, first)
        if library or file.startswith((_TORCH, _OWN)) or (text is None and file.startswith("<")):
            continue
        if text is None:
            raise CannotSave(f"the source of {code.co_name} cannot be read, at {file}:{first}")
        used = _plain_globals(files.get(file), code.co_names)
        found.append([files.get(file), file, first, code.co_name, _hash(text), used])
    return found


def check_sources(sources: Sequence[Sequence[Any]], path: Any) -> None:
    """Compares the source of functions with what was saved.

    Raises:
        ProgramError: one has changed.
    """
    by_file = {_file_of(module): name for name, module in list(sys.modules.items())}
    for module, file, first, name, saved, used in sources:
        # The script that runs has another name than when it is imported.
        module = module if module in sys.modules and module != "__main__" else by_file.get(file)
        here = (_file_of(sys.modules[module]) if module is not None else None) or file
        linecache.checkcache(here)
        text = _source_text(here, first)
        compare(f"the code of {name} ({here}:{first})", saved, None if text is None else _hash(text), path)
        values = _plain_globals(module, used)
        for key, value in used.items():
            compare(f"the global {key} that {name} uses", value, values.get(key, "missing"), path)


def _file_of(module: ModuleType | None) -> str | None:
    return getattr(module, "__file__", None)


def _source_text(path: str, first: int) -> str | None:
    """The lines of the function that begins at a line."""
    lines = linecache.getlines(path)[first - 1 :]
    try:
        return "".join(inspect.getblock(lines)) if lines else None
    except (IndentationError, SyntaxError):
        return None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain_globals(module: str | None, names: Iterable[str]) -> dict[str, str]:
    scope = vars(sys.modules[module]) if module is not None else {}
    return {name: repr(scope[name]) for name in names if name in scope and isinstance(scope[name], _PLAIN)}


def model_data(roots: Sequence[torch.nn.Module], function: Any) -> dict[str, Any]:
    """Of modules: class, attributes, hooks, and the form of parameters and buffers; of a function: its plain closure.

    Attributes are constants of the program: a model with another epsilon or window is another model. Adapter pools,
    which have other numbers in each process, are numbered here as the model's layers have them.
    """
    found: dict[str, Any] = {}
    pools = {router.id: i for i, router in enumerate(routers_of(*roots))}
    classes: dict[type, list[str]] = {}
    for i, root in enumerate(roots):
        for path, one in root.named_modules():
            name = ".".join(filter(None, (f"[{i}]" if i else "", path))) or "the model"
            kind = type(one)
            if kind not in classes:
                classes[kind] = _class_data(kind)
            # A forward is traced without the hooks of its own module, but with those of the modules inside.
            hooks = [*one._forward_pre_hooks.values(), *one._forward_hooks.values()] if path else []
            shown = [f"hook {_described(hook)}" for hook in hooks]
            own = dict(vars(one))
            if own.get("pcg_lora_layout") is not None:
                own["pcg_lora_layout"] = renumbered(own["pcg_lora_layout"], pools)
            found[name] = [kind.__qualname__, *_attributes(own), *classes[kind], *shown]
            for key, value in (*one._parameters.items(), *one._buffers.items()):
                found[f"{name}.{key}".removeprefix("the model.")] = None if value is None else _form(value)
    for key, value in _closure(getattr(function, "__func__", function)):
        if isinstance(value, _PLAIN):
            found[f"{key} in the function's closure"] = repr(value)
    return found


def _form(tensor: torch.Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype), tensor.device.type]


def _closure(function: Any) -> list[tuple[str, Any]]:
    found = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell
            found.append((name, cell.cell_contents))
    return found


def _class_data(kind: type) -> list[str]:
    """Plain attributes of a class, but for those of torch, and its functions that have a closure."""
    found = []
    for cls in kind.__mro__:
        if cls is object or cls.__module__.partition(".")[0] == "torch":
            continue
        for name, value in vars(cls).items():
            plain = not name.startswith("__") and (isinstance(value, _PLAIN) or type(value) in _CONTAINERS)
            if plain or (isinstance(value, FunctionType) and value.__closure__):
                found.append(f"{cls.__qualname__}.{name}={_described(value)}")
    return found


def _attributes(values: Mapping[str, Any]) -> list[str]:
    return sorted(
        f"{name}={_described(value)}"
        for name, value in values.items()
        if name not in _OF_TORCH
        and (isinstance(value, _PLAIN) or not (name.startswith("_") or isinstance(value, torch.nn.Module)))
    )


def _described(value: Any, depth: int = 0) -> str:
    """A value as text, the same in every process: numbers and strings, also inside others; of objects the class.

    Args:
        depth: how many objects it lies in.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"tensor{_form(value)}"
    if isinstance(value, MethodType):
        return _described(value.__func__, depth)
    if isinstance(value, FunctionType):
        code = value.__code__
        constants = [one for one in code.co_consts if isinstance(one, _PLAIN)]
        text = f"{code.co_code.hex()} {code.co_names} {constants}"
        inside = [f"{name}={one!r}" for name, one in _closure(value) if isinstance(one, _PLAIN)]
        return f"{value.__qualname__}({', '.join([_hash(text)[:8], *inside])})"
    if hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    name = type(value).__qualname__
    if depth >= _DEEPEST or isinstance(value, torch.nn.Module) or getattr(type(value), "changes_in_calls", False):
        return name
    if isinstance(value, partial):
        return f"{name}{_described((value.func, value.args, value.keywords), depth + 1)}"
    if isinstance(value, (list, tuple, set, frozenset)):
        entries = [_described(one, depth + 1) for one in value]
        entries = sorted(entries) if isinstance(value, (set, frozenset)) else entries
    elif isinstance(value, Mapping):
        entries = [f"{_described(key, depth + 1)}: {_described(one, depth + 1)}" for key, one in value.items()]
    else:
        # A configuration, as models of transformers have.
        own = getattr(value, "__dict__", {}).items()
        entries = [f"{n}={_described(v, depth + 1)}" for n, v in own if isinstance(v, _PLAIN) or not n.startswith("_")]
    return f"{name}({', '.join(entries)})"


def different(what: str, saved: Any, here: Any, path: Any) -> ProgramError:
    """The error for a program that was made for something else."""
    if isinstance(saved, list) and isinstance(here, list):
        # What differs, of long lists of attributes.
        saved, here = [s for s in saved if s not in here] or saved, [h for h in here if h not in saved] or here
    return unfit(f"{what} is {here} here, and was {saved} when it was saved", path)


def unfit(text: str, path: Any) -> ProgramError:
    """The error for a program that means nothing here."""
    return ProgramError(
        message(
            f"{os.fspath(path)} does not fit: {text}",
            why="A program is right only for what it was made for.",
            cure="Compile the model as usual, and save it again: pcg.save(compiled, path)",
        )
    )


def compare(what: str, saved: Any, here: Any, path: Any) -> None:
    """Raises the error where two facts differ."""
    if saved != here:
        raise different(what, saved, here, path)
