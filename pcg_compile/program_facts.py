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
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, ModuleType
from typing import Any

import torch

from .errors import ProgramError, message
from .fx.graph_data import CannotSave
from .version import __version__

__all__ = ["check_sources", "compare", "device_data", "different", "model_data", "sources_data", "versions"]

_TORCH, _OWN = (os.path.dirname(str(file)) + os.sep for file in (torch.__file__, __file__))
_PYTHON = sysconfig.get_path("stdlib") + os.sep
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


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
    """Of modules: class, plain attributes, and the form of parameters and buffers; of a function: its plain closure.

    Attributes are constants of the program: a model with another epsilon or window is another model.
    """
    found: dict[str, Any] = {}
    for i, root in enumerate(roots):
        for path, one in root.named_modules():
            name = ".".join(filter(None, (f"[{i}]" if i else "", path))) or "the model"
            found[name] = [type(one).__qualname__, *_attributes(vars(one))]
            for key, value in (*one._parameters.items(), *one._buffers.items()):
                form = None if value is None else [list(value.shape), str(value.dtype), value.device.type]
                found[f"{name}.{key}".removeprefix("the model.")] = form
    plain = getattr(function, "__func__", function)
    for key, cell in zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True):
        value = cell.cell_contents
        if isinstance(value, _PLAIN):
            found[f"{key} in the function's closure"] = repr(value)
    return found


def _attributes(values: Mapping[str, Any], inside: bool = False) -> list[str]:
    found = []
    for name, value in values.items():
        if isinstance(value, _PLAIN) or (
            isinstance(value, (list, tuple)) and all(isinstance(entry, _PLAIN) for entry in value)
        ):
            found.append(f"{name}={value!r}")
        elif isinstance(value, (torch.Tensor, torch.nn.Module, dict)) or name.startswith("_"):
            continue
        elif hasattr(value, "__qualname__"):
            found.append(f"{name}={value.__qualname__}")
        elif hasattr(value, "__dict__") and not inside:
            # A configuration, as models of transformers have.
            found += [f"{name}.{entry}" for entry in _attributes(vars(value), inside=True)]
    return found


def different(what: str, saved: Any, here: Any, path: Any) -> ProgramError:
    """The error for a program that was made for something else."""
    if isinstance(saved, list) and isinstance(here, list):
        # What differs, of long lists of attributes.
        saved, here = [s for s in saved if s not in here] or saved, [h for h in here if h not in saved] or here
    return ProgramError(
        message(
            f"{os.fspath(path)} does not fit: {what} is {here} here, and was {saved} when it was saved",
            why="A program is right only for what it was made for.",
            cure="Compile the model as usual, and save it again: pcg.save(compiled, path)",
        )
    )


def compare(what: str, saved: Any, here: Any, path: Any) -> None:
    """Raises the error where two facts differ."""
    if saved != here:
        raise different(what, saved, here, path)
