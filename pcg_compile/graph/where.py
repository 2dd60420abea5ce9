"""Where in the user's code a node comes from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch
from torch import fx

__all__ = ["Place", "place_of"]

_FRAME = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+), in (?P<function>[^\n]*)\n?(?P<source>[^\n]*)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass(frozen=True)
class Place:
    """A line of source code; ``library`` is a second place, where the user's line called a library."""

    file: str | None
    line: int
    function: str
    source: str
    library: str | None = None

    def __str__(self) -> str:
        if self.file is None:
            return self.source or "an unknown line"
        own = f"{self.file}:{self.line} in {self.function}"
        return f"{own} (in the library, {self.library})" if self.library else own


def place_of(node: fx.Node) -> Place:
    """The user's line for a node; where a library was called, its line too.

    A notebook cell or ``exec`` has no source text: the place then still has the file name that Python
    gave it, the line and the function.
    """
    frames = [m.groupdict() for m in _FRAME.finditer(node.stack_trace or "")]
    frames = [f for f in frames if not f["file"].startswith((_TORCH, _OWN))] or frames
    if not frames:
        return Place(None, 0, "", f"node {node.name} ({node.op} {node.target})")
    own = [f for f in frames if "site-packages" not in f["file"] and "dist-packages" not in f["file"]]
    last, user = frames[-1], (own or frames)[-1]
    library = None if last is user else f"{last['file']}:{last['line']} in {last['function'].strip()}"
    source = user["source"].strip()
    return Place(user["file"], int(user["line"]), user["function"].strip(), "" if set(source) <= {"^", "~"} else source, library)
