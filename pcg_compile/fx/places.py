"""Where in the user's code a node, or the code that runs, comes from."""

from __future__ import annotations

import linecache
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

import torch
from torch import fx

from ..torch_compat.dynamo_graphs import traced_function

_FRAME = re.compile(r'^\s*File "(?P<file>.*)", line (?P<line>\d+)(?:, in (?P<function>.*))?$')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OWN = tuple(
    {os.path.dirname(os.path.dirname(path(__file__))) + os.sep for path in (os.path.abspath, os.path.realpath)}
)
_STDLIB = tuple(p + os.sep for p in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")} if p)


@dataclass(frozen=True)
class Place:
    """A line of source code; ``library`` is a second place, where the user's line called a library.

    Attributes:
        file: as Python names it: a path, ``<string>`` for ``exec``, IPython's own name of a notebook cell; None where
            nothing is known.
        line: counted from 1; 0 where it is not known.
        function: ``<lambda>`` and ``<module>`` are possible.
        source: the text of the line, stripped; "" where it cannot be read.
        library: file, line and function of the library's line that the user's line led to, or None.
    """

    file: str | None
    line: int
    function: str
    source: str
    library: str | None = None

    def __str__(self) -> str:
        if self.file is None:
            return self.source or "an unknown line"
        own = _describe(self.file, self.line, self.function)
        # A file on disk can be opened at the line; for all else its text is the only way to find it.
        if self.source and not os.path.exists(self.file):
            own += f": `{self.source}`"
        return f"{own} (in the library, {self.library})" if self.library else own


_ROOT = re.compile(r"[LG]\['(?P<name>[^']*)'\](?P<rest>.*)")
_MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")


def name_of_input(node: fx.Node) -> str:
    """What the user calls an input of Dynamo's graph: ``blocks.0.weight`` of a module, ``ids`` or ``kwargs['ids']``."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", None)
    found = _ROOT.fullmatch(str(name() if callable(name) else name)) if name is not None else None
    if found is None:
        # Without a source: Dynamo names the attribute first.weight of self l__self___first_weight, the input x l_x_.
        if node.name.lower().startswith("l__self___"):
            return node.name[len("l__self___") :]
        return node.name[2:-1] if node.name[:2] in ("l_", "L_") and node.name.endswith("_") else node.name
    rest = _MEMBER.sub(r".\1", found["rest"])
    # The module itself has many names: self, fn, that of a variable.
    return rest.lstrip(".") if rest != found["rest"] else found["name"] + rest


def place_of(node: fx.Node) -> Place:
    """The user's line for a node; where a library was called, its line too.

    A notebook cell, ``exec`` or a lambda may have no source text: the place then still has the name that Python gave
    the file, the line and the function.
    """
    frames = _parse(node.stack_trace or "")
    if not frames:
        # Dynamo keeps no lines of code that exec compiled under its default name.
        traced = traced_function(node.graph.owning_module)
        if traced is not None:
            return Place(traced[0], 0, traced[1], "")
        return Place(None, 0, "", f"node {node.name} ({node.op} {_plain(node.target)})")
    return _choose(frames)


def module_of(node: fx.Node) -> str:
    """The path of the innermost module that a node stands in, such as ``layers.0.attention``; "" for the outermost."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("",))[0]
    found = _ROOT.fullmatch(path)
    path = _MEMBER.sub(r".\1", found["rest"] if found is not None else path)
    # The outermost module may itself be an element of what Dynamo traces: args[0].
    return re.sub(r"^(?:\[\d+\])?\.?", "", path)


def place_of_frame(frame: FrameType | None) -> Place:
    """The user's line that led to a running frame."""
    return place_of_stack(traceback.extract_stack(frame))


def place_of_stack(stack: Sequence[traceback.FrameSummary]) -> Place:
    """The user's line of a stack, its outermost frame first."""
    frames = [Place(f.filename, f.lineno or 0, f.name, (f.line or "").strip()) for f in stack]
    return _choose(frames) if frames else Place(None, 0, "", "an unknown line")


def _parse(trace: str) -> list[Place]:
    """The frames of a formatted traceback, outermost first; a frame may or may not be followed by its source."""
    lines = trace.splitlines()
    frames: list[Place] = []
    for i, text in enumerate(lines):
        match = _FRAME.match(text)
        if match is None:
            continue
        file, line = match["file"], int(match["line"])
        following = lines[i + 1] if i + 1 < len(lines) else ""
        source = "" if _FRAME.match(following) else following.strip()
        frames.append(
            Place(file, line, (match["function"] or "").strip(), source or linecache.getline(file, line).strip())
        )
    return frames


def _choose(frames: Sequence[Place]) -> Place:
    """The innermost line of the user, and the innermost of a library that it led to."""
    seen = [f for f in frames if not str(f.file).startswith((_TORCH, *_OWN))] or list(frames)
    own = [f for f in seen if not _is_library(str(f.file))]
    last, user = seen[-1], (own or seen)[-1]
    library = None if last is user else _describe(str(last.file), last.line, last.function)
    return Place(user.file, user.line, user.function, user.source, library)


def _is_library(file: str) -> bool:
    return "site-packages" in file or "dist-packages" in file or file.startswith((*_STDLIB, "<frozen "))


def _describe(file: str, line: int, function: str) -> str:
    cell = _notebook_cell(file)
    if not line:
        place = cell or file
    else:
        place = f"{cell}, line {line}" if cell else f"{file}:{line}"
    return f"{place} in {function}" if function and function != "<module>" else place


def _notebook_cell(file: str) -> str | None:
    """What IPython calls the cell that it compiled under this file name, or None where it is no cell."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    name_of = getattr(getattr(shell, "compile", None), "format_code_name", None)
    named = name_of(file) if name_of is not None else None
    if named is not None:
        return " ".join(named)
    return "a notebook cell" if "ipykernel_" in file or file.startswith("<ipython-input-") else None


def _plain(target: object) -> str:
    return str(getattr(target, "__name__", target))


def place_parts(where: str) -> tuple[str | None, int]:
    """File and line of a place that was turned into text, None and 0 where it names none."""
    match = re.match(r"(?P<file>.+?)(?::|, line )(?P<line>\d+)(?=[: ]|$)", where)
    return (match["file"], int(match["line"])) if match else (None, 0)
