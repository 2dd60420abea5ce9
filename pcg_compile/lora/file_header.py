"""What can be said of an adapter's files before they are read: their JSON, and the shapes that safetensors declares."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from ..errors import AdapterError

__all__ = ["parse_json", "read_shapes", "shown"]

_MOST_HEADER = 16 << 20
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def parse_json(text: str | bytes) -> Any:
    """JSON, in which no name may stand twice: readers differ in which of the two they take.

    Raises:
        ValueError, RecursionError: it is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name stands twice in one object")
        return entries

    return json.loads(text, object_pairs_hook=unique)


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors by name, once all that its header says fits the file.

    Raises:
        AdapterError: the file is damaged, or has tensors that no adapter has.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _MOST_HEADER):
                raise AdapterError(
                    f"{file.name} has {size} bytes, and says that its header alone has {length}", str(file)
                )
            header = parse_json(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file.name} has no readable header", where=str(file), why=str(error)) from None
    if not isinstance(header, dict):
        raise AdapterError(f"the header of {file.name} is no object", where=str(file))
    header.pop("__metadata__", None)
    return {name: _shape(name, entry, size - 8 - length, file) for name, entry in header.items()}


def _shape(name: str, entry: Any, room: int, file: Path) -> tuple[int, ...]:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= room

    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise AdapterError(f"tensor {shown(name)} has dtype {shown(dtype)}, which no adapter has", str(file))
    if not isinstance(shape, list) or len(shape) != 2 or not all(is_size(n) and n > 0 for n in shape):
        raise AdapterError(f"tensor {shown(name)} has shape {shown(shape)}; factors are matrices", str(file))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise AdapterError(f"tensor {shown(name)} lies outside of the file", where=str(file))
    if offsets[1] - offsets[0] != shape[0] * shape[1] * _DTYPES[dtype]:
        raise AdapterError(f"tensor {shown(name)} has other bytes than its shape needs", where=str(file))
    return tuple(shape)


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
