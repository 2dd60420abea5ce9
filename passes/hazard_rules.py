"""What single ops do that no CUDA graph can capture: copies from host memory, and waits for the device.

Each rule looks at one dispatched op and returns a :class:`Finding` or None. The graph pass applies the rules to fake
tensors, :func:`pcg_compile.capture_guard` to real ones. A :class:`Memory` says where tensors lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pcg_compile.errors import Hazard
from pcg_compile.fx.facts import OpCall, tensors_in
from pcg_compile.fx.places import Place


@dataclass(frozen=True)
class Finding:
    """What a CUDA graph cannot hold: ``kind`` as in :class:`pcg_compile.errors.Hazard`, the reason, and the cure."""

    kind: str
    reason: str
    cure: str


def hazard_at(place: Place, finding: Finding, op: str) -> Hazard:
    """A finding at a line of the user's; where that called a library, the reason names the library's line too."""
    reason = f"{finding.reason} (in the library, {place.library})" if place.library else finding.reason
    return Hazard(finding.kind, op, place.file, place.line, reason, finding.cure)


class Memory(Protocol):
    """Where tensors lie, seen from the capture device."""

    #: The capture device.
    device: torch.device

    def on_host(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in host memory, beside the capture device."""

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor is known to be page-locked."""


def tensor_arguments(call: OpCall) -> list[torch.Tensor]:
    """The tensors among an op's arguments."""
    return list(tensors_in((call.args, dict(call.kwargs))))


Rule = Callable[[OpCall, Memory], "Finding | None"]


def _waits(why: str, cure: str) -> Finding:
    return Finding("sync", f"it waits for the device{why}", cure)


_ON_DEVICE = "Keep the value on the device"
MADE_FROM_DATA = Finding(
    "host copy",
    "it makes a tensor of Python numbers, which are copied from the host",
    "Make it once, as a buffer: self.register_buffer(name, torch.tensor(...)); or fill it on the device: "
    "torch.full((1,), 5, device=x.device)",
)
_TO_HOST = Finding("sync", "it copies to the host, and waits for the device", f"{_ON_DEVICE} until after the step")
_STAGE = "Pass the tensor on the device; or stage it in pinned memory: t.copy_(source.pin_memory(), non_blocking=True)"
_HOST_INDEX = Finding(
    "host copy",
    "its index is a list, or lies on the host, and is copied to the device",
    "Index with a slice, or with a tensor on the device: self.register_buffer(name, torch.tensor(...))",
)
_HOST_VALUE = Finding(
    "host copy",
    "it writes a host scalar through index tensors, which is copied to the device",
    "Write a value of the device: t[index] = torch.full((), value, dtype=t.dtype, device=t.device); "
    "or along one dimension: t.index_fill_(0, index, value)",
)
_MASK = "Keep the shape: torch.where(mask, value, t); or t[mask] = 0 with a Python number, which is a masked fill"
_READS_VALUE = _waits(", to read a value", f"{_ON_DEVICE}: torch.where(condition, a, b)")
_DYNAMIC_SHAPE = Finding(
    "dynamic shape",
    "the size of its result depends on the data, so it waits for the device",
    "Keep the shape: a mask with torch.where, or output_size= where the op takes it",
)
_UNSAFE = Finding("unsafe op", "it is tagged cudagraph_unsafe", "Call it outside the compiled function")
_FILL_VALUE = _waits(", to read the value", "Write: torch.where(mask, value, t)")
_HOST_SCALAR = Finding(
    "host copy", "it copies a scalar tensor from the host", "Pass a Python number: torch.where(mask, 0.0, t)"
)
_STD = _waits(", to check that std >= 0", "Write: mean + std * torch.randn_like(std)")
_RANGE = _waits(", to find the range", "Give it: torch.histc(x, bins, min=a, max=b)")
_GENERATOR = Finding(
    "rng",
    "it draws from a generator of its own, which no captured graph advances",
    "Use the default generator: leave generator= out, and seed with torch.manual_seed",
)
_GROUPED = Finding("unsafe op", "it cannot be captured on GPUs older than sm_100", "Use a batched matmul: torch.bmm")
# Observed while capturing on torch 2.11; torch tags none of these ops.
_WAITING_OPS = {
    "aten::_linalg_check_errors": "use the _ex variant (torch.linalg.inv_ex, cholesky_ex, solve_ex, ...)",
    "aten::linalg_lstsq": "solve with torch.linalg.solve_ex on the normal equations, or outside",
    "aten::segment_reduce": "use index_add_ or scatter_reduce_ with a segment index",
    "aten::is_nonzero": f"{_ON_DEVICE}: torch.where(condition, a, b)",
    **dict.fromkeys(
        (f"aten::{name}" for name in ("_linalg_svd", "_linalg_eigh", "linalg_eig", "linalg_eigvals", "_linalg_eigvals",
                                      "linalg_matrix_exp")), "compute it outside the compiled function"),
}  # fmt: skip
_MASKS = (torch.bool, torch.uint8)
_UNSAFE_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_INDEXING = tuple(
    f"aten::{name}"
    for name in ("index", "index_fill", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put")
)


def finding_of(call: OpCall, memory: Memory) -> Finding | None:
    """The first rule's finding for an op that touches the capture device; ops on the host alone have none.

    An op of a higher order has none either: its body is another graph.
    """
    rules = _rules_of(call.op) if isinstance(call.op, torch._ops.OpOverload) else ()
    if not rules:
        return None
    tensors = tensor_arguments(call)
    if tensors and all(memory.on_host(t) for t in tensors) and not _goes_to_device(call, memory):
        return None
    return next((found for rule in rules if (found := rule(call, memory)) is not None), None)


def reads_host_scalars(call: OpCall) -> bool:
    """Whether an op takes a host scalar tensor as a number, so its kernels need no copy of it."""
    name, _, overload = call.op.name().partition(".")
    plain = name.removesuffix("_")
    if plain in ("aten::fill", "aten::masked_fill", "aten::lift_fresh"):
        return True
    if plain == "aten::index_fill":
        return bool(overload == "int_Tensor")
    return torch.Tag.pointwise in call.op.tags and name != "aten::where"


def _name(call: OpCall) -> str:
    return str(call.op.name().partition(".")[0])


def _argument(call: OpCall, name: str) -> Any:
    if name in call.kwargs:
        return call.kwargs[name]
    for position, argument in enumerate(call.op._schema.arguments):
        if argument.name == name:
            return call.args[position] if position < len(call.args) else argument.default_value
    return None


def _goes_to_device(call: OpCall, memory: Memory) -> bool:
    target = _argument(call, "device")
    return isinstance(target, torch.device) and target.type == memory.device.type and _name(call) == "aten::_to_copy"


def _is_empty(tensor: torch.Tensor) -> bool:
    return any(isinstance(size, int) and size == 0 for size in tensor.shape)


def _copies_between_memories(call: OpCall, memory: Memory) -> Finding | None:
    """``copy_``, ``.to(device)``, ``.cpu()`` from one memory to the other."""
    if _name(call) != "aten::_to_copy":
        target, source = call.args[0], call.args[1]
        to_host = memory.on_host(target)
    elif _argument(call, "device") is not None:
        source = target = call.args[0]
        # On a CPU run ".to(device)" names the capture device.
        to_host = memory.device.type != "cpu" and _argument(call, "device").type == "cpu"
    else:
        return None
    if memory.on_host(source) is to_host or _is_empty(source):
        return None
    non_blocking, pinned = bool(_argument(call, "non_blocking")), memory.is_pinned(source)
    if to_host:
        return None if non_blocking and (target is source or memory.is_pinned(target)) else _TO_HOST
    if non_blocking and pinned:
        return None
    what = "without non_blocking=True" if pinned else "from pageable memory"
    return Finding("host copy", f"it copies from the host, {what}", _STAGE)


def _lifts_data(call: OpCall, memory: Memory) -> Finding | None:
    """``torch.tensor([5], device="cuda")``: PyTorch marks every tensor made from Python data by ``lift_fresh``."""
    return None if memory.on_host(call.args[0]) or _is_empty(call.args[0]) else MADE_FROM_DATA


def _indexes(call: OpCall, memory: Memory) -> Finding | None:
    """An index list or an index on the host; a host scalar written through index tensors; a boolean mask."""
    given = _argument(call, "indices")
    indices = list(tensors_in(given if given is not None else _argument(call, "index")))
    if any(memory.on_host(i) and not _is_empty(i) for i in indices):
        return _HOST_INDEX
    value = _argument(call, "values") if "index_put" in _name(call) else None
    masks = any(i.dtype in _MASKS for i in indices)
    # One mask and one value known to the host are carried out as a masked fill.
    fills = (
        value is not None
        and masks
        and len(indices) == 1
        and not memory.on_host(indices[0])
        and memory.on_host(value)
        and all(isinstance(size, int) and size == 1 for size in value.shape)
        and not _argument(call, "accumulate")
    )
    if fills:
        return None
    if value is not None and memory.on_host(value):
        return _HOST_VALUE
    if masks:
        # How many elements it selects is known on the device only.
        return Finding(
            "dynamic shape" if value is None else "sync",
            "it waits for the device, to count what the mask selects",
            _MASK,
        )
    return None


def _reads_fill_value(call: OpCall, memory: Memory) -> Finding | None:
    """``masked_fill_`` and ``index_fill_`` with a value on the device."""
    value = _argument(call, "value")
    return None if not isinstance(value, torch.Tensor) or memory.on_host(value) else _FILL_VALUE


def _selects_host_scalar(call: OpCall, memory: Memory) -> Finding | None:
    """``torch.where`` with a scalar tensor on the host."""
    return _HOST_SCALAR if any(memory.on_host(t) for t in tensor_arguments(call)) else None


def _has_unsafe_tag(call: OpCall, memory: Memory) -> Finding | None:
    """Ops that PyTorch itself marks."""
    if torch.Tag.cudagraph_unsafe in call.op.tags:
        return _UNSAFE
    if torch.Tag.data_dependent_output in call.op.tags:
        return _READS_VALUE
    known = _name(call) == "aten::repeat_interleave" and _argument(call, "output_size") is not None
    return None if known else _DYNAMIC_SHAPE


def _waits_for_device(call: OpCall, memory: Memory) -> Finding | None:
    """Ops that wait without being tagged."""
    name = _name(call)
    if name in _WAITING_OPS:
        return _waits("", f"Instead, {_WAITING_OPS[name]}")
    if name == "aten::normal":
        return _STD if isinstance(_argument(call, "std"), torch.Tensor) else None
    return _RANGE if _argument(call, "min") == _argument(call, "max") else None


def _uses_generator(call: OpCall, memory: Memory) -> Finding | None:
    """Random numbers from a generator that a captured graph does not advance."""
    generator = _argument(call, "generator")
    defaults = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        defaults += torch.cuda.default_generators
    if generator is None or any(generator is default for default in defaults):
        return None
    other = isinstance(generator, torch.Generator) and generator.device.type != memory.device.type
    return None if other else _GENERATOR


def _groups_on_host(call: OpCall, memory: Memory) -> Finding | None:
    """Grouped matrix products, whose kernels for older GPUs read the group sizes on the host."""
    if memory.device.type != "cuda" or not torch.cuda.is_available():
        return None
    return None if torch.cuda.get_device_capability(memory.device) >= (10, 0) else _GROUPED


@functools.cache
def _rules_of(op: torch._ops.OpOverload) -> tuple[Rule, ...]:
    """The rules that can have a finding for an op: none for most ops, which then cost one look-up."""
    name, _, overload = op.name().partition(".")
    plain = name.removesuffix("_")
    applies: tuple[tuple[bool, Rule], ...] = (
        (plain in ("aten::copy", "aten::_to_copy"), _copies_between_memories),
        (name == "aten::lift_fresh", _lifts_data),
        (plain in _INDEXING, _indexes),
        (plain in ("aten::masked_fill", "aten::index_fill") and overload.endswith("Tensor"), _reads_fill_value),
        (name == "aten::where", _selects_host_scalar),
        (plain not in _INDEXING and any(tag in op.tags for tag in _UNSAFE_TAGS), _has_unsafe_tag),
        (name in (*_WAITING_OPS, "aten::normal", "aten::histc"), _waits_for_device),
        (any(argument.name == "generator" for argument in op._schema.arguments), _uses_generator),
        (name in ("aten::_grouped_mm", "aten::_scaled_grouped_mm"), _groups_on_host),
    )
    return tuple(rule for applied, rule in applies if applied)
