"""LoRA adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors.

A folder may come from anywhere, so nothing in it is trusted: sizes are checked before anything is read, names and
shapes before anything is allocated, and no pickle is ever opened.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import AdapterError, message

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_MOST_CONFIG = 1 << 20
_MOST_RANK = 1 << 14
_MOST_HEADER = 16 << 20
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_KEY = re.compile(r"base_model\.model\.(?P<module>\w+(?:\.\w+)*)\.lora_(?P<factor>[AB])\.weight", re.ASCII)
#: Fields of a configuration that change what an adapter computes, and the only values that are computed here.
_PLAIN: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "bias": ("none", None),
        "use_dora": (False, None),
        "lora_bias": (False, None),
        "use_qalora": (False, None),
        "use_bdlora": (False, None),
        "modules_to_save": (None, []),
        "layer_replication": (None, []),
        "trainable_token_indices": (None, [], {}),
        "target_parameters": (None, []),
        "alora_invocation_tokens": (None, []),
        "megatron_config": (None,),
        # Others change the base model's weights as well.
        "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
    }
)
#: Fields that say how an adapter was trained, or that are read elsewhere here.
_HARMLESS = frozenset(
    {
        "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "rank_pattern",
        "alpha_pattern", "runtime_config", "target_modules", "use_rslora", "velora_config",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one module: ``scaling * (x @ a.T) @ b.T``; ``a [rank, in]``, ``b [out, rank]``."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Its rank."""
        return int(self.a.shape[0])


@dataclass(frozen=True)
class Adapter:
    """One adapter: its folder, and by module path what it adds there."""

    folder: Path
    modules: Mapping[str, Factors]


def read_adapter(folder: str | Path, check: Callable[[str, int, int, int], None] | None = None) -> Adapter:
    """Reads a folder that PEFT's ``save_pretrained`` wrote; tensors stay on the CPU in the dtype they have there.

    Args:
        check: called as ``check(module, inputs, outputs, rank)`` for each module, before any weight is read; raises
            for what must not be read.

    Raises:
        AdapterError: no such folder, a damaged or hostile file, or something that is not computed here, such as DoRA;
            the message names the field.
    """
    path = Path(folder)
    config = _read_config(_file(path, _CONFIG, _MOST_CONFIG))
    _refuse_unsupported(config, path)
    file = _file(path, _WEIGHTS, None)
    shapes = _read_shapes(file)
    pairs = sorted(_pairs(shapes, file).items())
    scalings = {module: _scaling(config, module, shapes[a][0], path) for module, (a, _) in pairs}
    if check is not None:
        for module, (a, b) in pairs:
            check(module, shapes[a][1], shapes[b][0], shapes[a][0])
    tensors = _load(file)
    modules = {module: Factors(tensors[a], tensors[b], scalings[module]) for module, (a, b) in pairs}
    for module, factors in modules.items():
        if not (torch.isfinite(factors.a).all() and torch.isfinite(factors.b).all()):
            raise AdapterError(message(f"the weights for {module} hold NaN or infinity", where=str(file)))
    return Adapter(path, MappingProxyType(modules))


def _file(folder: Path, name: str, most: int | None) -> Path:
    """A regular file of the folder, not larger than ``most`` bytes."""
    try:
        if not folder.is_dir():
            raise AdapterError(
                message(f"{str(folder)!r} is no folder", cure="Pass a folder that PEFT's save_pretrained() wrote.")
            )
        file = folder / name
        if not file.is_file():
            pickled = name == _WEIGHTS and (folder / _PICKLE).is_file()
            raise AdapterError(
                message(
                    f"{str(folder)!r} has no {name}",
                    why=f"{_PICKLE} is a pickle, which can run any code when it is read." if pickled else None,
                    cure="Save it again with PEFT: model.save_pretrained(folder, safe_serialization=True)",
                )
            )
        size = file.stat().st_size
        inside = _is_inside(file, folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterError(message(f"{str(folder)!r} cannot be read", why=str(error))) from None
    if not inside:
        raise AdapterError(
            message(
                f"{name} is a link to a file outside of the folder",
                where=str(file),
                why="A folder from somebody else could have any file read.",
                cure="Copy the file into the folder.",
            )
        )
    if most is not None and size > most:
        raise AdapterError(message(f"{name} has {size} bytes; at most {most} are read", where=str(file)))
    return file


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether the file lies in the folder once links are followed, or in the hub cache that the folder belongs to."""
    root = folder.resolve()
    # The Hugging Face cache: models--x/snapshots/<commit>/file links to models--x/blobs/<hash>.
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return any(file.resolve().is_relative_to(one) for one in roots)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = _parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(message(f"{_CONFIG} is no JSON", where=str(file), why=str(error))) from None
    if not isinstance(config, dict):
        raise AdapterError(message(f"{_CONFIG} holds a {type(config).__name__}, not an object", where=str(file)))
    return config


def _refuse_unsupported(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(message(f"peft_type is {_shown(kind)}; only LORA is computed here", where=str(folder)))
    for name in [*_PLAIN, *(config.keys() - _PLAIN.keys() - _HARMLESS)]:
        value = config.get(name)
        if name in _PLAIN:
            # 1 equals True, but PEFT never writes it.
            supported = any(value == one and type(value) is type(one) for one in _PLAIN[name])
        else:
            # A field of a later PEFT: variants of LoRA are switched on, or have settings of their own.
            supported = value is not True and not (isinstance(value, (dict, list)) and value)
        if not supported:
            raise AdapterError(
                message(
                    f"{_shown(name)[1:-1]}={_shown(value)} is not supported",
                    where=str(folder),
                    why="What the adapter adds would be computed otherwise than PEFT computes it.",
                    cure="Merge the adapter into a model of its own with PEFT: model.merge_and_unload()",
                )
            )


def _scaling(config: Mapping[str, Any], module: str, rank: int, folder: Path) -> float:
    """``alpha / rank``, or over its root for rsLoRA; a pattern's alpha and rank come before the general ones."""
    declared = _by_pattern(config.get("rank_pattern"), module, config.get("r"), folder, "rank_pattern")
    if isinstance(declared, bool) or not isinstance(declared, int) or declared != rank:
        raise AdapterError(
            message(
                f"the weights for {module} have rank {rank}, the configuration says {_shown(declared)}", str(folder)
            )
        )
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"), folder, "alpha_pattern")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
        raise AdapterError(message(f"lora_alpha of {module} is {_shown(alpha)}, which is no number", where=str(folder)))
    rooted = config.get("use_rslora", False)
    if not isinstance(rooted, bool):
        raise AdapterError(message(f"use_rslora is {_shown(rooted)}, not true or false", where=str(folder)))
    return float(alpha) / (math.sqrt(rank) if rooted else rank)


def _by_pattern(patterns: Any, module: str, general: Any, folder: Path, field: str) -> Any:
    """PEFT's rule: a pattern matches the end of a module's path, from a dot or from the beginning."""
    if patterns is None:
        return general
    if not isinstance(patterns, dict):
        raise AdapterError(message(f"{field} is {_shown(patterns)}, not an object", where=str(folder)))
    for pattern, value in patterns.items():
        # A name, as PEFT writes it, its dots escaped or not; a general expression could take forever to match.
        if not re.fullmatch(r"\^?(?:\w|\\?\.)+\$?", pattern, re.ASCII):
            raise AdapterError(message(f"{field} has the pattern {_shown(pattern)}; names are read", str(folder)))
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            return value
    return general


def _pairs(shapes: Mapping[str, tuple[int, ...]], file: Path) -> dict[str, tuple[str, str]]:
    """The names of both factors, by module."""
    found: dict[str, dict[str, str]] = {}
    for name in shapes:
        match = _KEY.fullmatch(name)
        if match is None:
            raise AdapterError(
                message(
                    f"tensor {_shown(name)} is no factor of a linear layer",
                    where=str(file),
                    why="Only lora_A and lora_B weights of linear layers are computed here.",
                )
            )
        found.setdefault(match["module"], {})[match["factor"]] = name
    if not found:
        raise AdapterError(message(f"{_WEIGHTS} has no tensors", where=str(file)))
    for module, names in found.items():
        if len(names) != 2:
            raise AdapterError(message(f"{module} has lora_{next(iter(names))} alone", where=str(file)))
        a, b = shapes[names["A"]], shapes[names["B"]]
        if a[0] != b[1] or a[0] > _MOST_RANK:
            raise AdapterError(message(f"the factors of {module}, {a} and {b}, do not fit each other", str(file)))
    return {module: (names["A"], names["B"]) for module, names in found.items()}


def _load(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file, device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(message(f"{_WEIGHTS} cannot be read", where=str(file), why=str(error))) from None


# -- what can be said of files before they are read ----------------------------------------------------------------


def _parse_json(text: str | bytes) -> Any:
    """JSON, in which no name may stand twice: readers differ in which of the two they take.

    Raises:
        ValueError, RecursionError: invalid JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name stands twice in one object")
        return entries

    return json.loads(text, object_pairs_hook=unique)


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
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
                    message(f"{file.name} has {size} bytes, and says that its header alone has {length}", str(file))
                )
            header = _parse_json(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(message(f"{file.name} has no readable header", where=str(file), why=str(error))) from None
    if not isinstance(header, dict):
        raise AdapterError(message(f"the header of {file.name} is no object", where=str(file)))
    header.pop("__metadata__", None)
    return {name: _shape(name, entry, size - 8 - length, file) for name, entry in header.items()}


def _shape(name: str, entry: Any, room: int, file: Path) -> tuple[int, ...]:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= room

    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise AdapterError(message(f"tensor {_shown(name)} has dtype {_shown(dtype)}, which no adapter has", str(file)))
    if not isinstance(shape, list) or len(shape) != 2 or not all(is_size(n) and n > 0 for n in shape):
        raise AdapterError(message(f"tensor {_shown(name)} has shape {_shown(shape)}; factors are matrices", str(file)))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise AdapterError(message(f"tensor {_shown(name)} lies outside of the file", where=str(file)))
    if offsets[1] - offsets[0] != shape[0] * shape[1] * _DTYPES[dtype]:
        raise AdapterError(message(f"tensor {_shown(name)} has other bytes than its shape needs", where=str(file)))
    return tuple(shape)


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
