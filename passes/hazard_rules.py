"""What single ops do that no CUDA graph can capture: copies from host memory, and waits for the device.

Each rule looks at one dispatched op and returns a :class:`~pcg_compile.passes.findings.Finding` or None. The graph pass
applies them to fake tensors, :func:`pcg_compile.capture_guard` to real ones; both say through a
:class:`~pcg_compile.passes.findings.Memory` what lies where.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pcg_compile.fx.facts import OpCall

from .padding_safety.findings import Finding, Memory, made_from_data, tensor_arguments

__all__ = ["finding_of", "reads_host_scalars"]


Rule = Callable[[OpCall, Memory], "Finding | None"]

_MASKS = (torch.bool, torch.uint8)
_UNSAFE_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_INDEXING = (
    "aten::index",
    "aten::index_fill",
    "aten::index_put",
    "aten::_index_put_impl",
    "aten::_unsafe_index",
    "aten::_unsafe_index_put",
)
_ON_DEVICE = "Keep the value on the device"
# Read from what a capture does on torch 2.11; none of them is tagged.
_WAITING_OPS = {
    "aten::_linalg_check_errors": "use the _ex variant (torch.linalg.inv_ex, cholesky_ex, solve_ex, ...)",
    "aten::_linalg_svd": "compute it outside the compiled function",
    "aten::_linalg_eigh": "compute it outside the compiled function",
    "aten::linalg_eig": "compute it outside the compiled function",
    "aten::linalg_eigvals": "compute it outside the compiled function",
    "aten::_linalg_eigvals": "compute it outside the compiled function",
    "aten::linalg_lstsq": "solve with torch.linalg.solve_ex on the normal equations, or outside",
    "aten::linalg_matrix_exp": "compute it outside the compiled function",
    "aten::segment_reduce": "use index_add_ or scatter_reduce_ with a segment index",
    "aten::is_nonzero": f"{_ON_DEVICE}: torch.where(condition, a, b)",
}


def finding_of(call: OpCall, memory: Memory) -> Finding | None:
    """The first rule's finding for an op that touches the capture device; ops on the host alone have none.

    An op of a higher order has none either: its body is another graph.
    """
    if not isinstance(call.op, torch._ops.OpOverload):
        return None
    rules = _rules_of(call.op)
    if not rules:
        return None
    tensors = tensor_arguments(call)
    if tensors and all(memory.on_host(t) for t in tensors) and not _goes_to_device(call, memory):
        return None
    for rule in rules:
        found = rule(call, memory)
        if found is not None:
            return found
    return None


def reads_host_scalars(call: OpCall) -> bool:
    """Whether an op takes a host scalar tensor as a number, so that its kernels need no copy of it."""
    name, overload = _names(call)
    if name in ("aten::fill_", "aten::fill", "aten::masked_fill_", "aten::masked_fill", "aten::lift_fresh"):
        return True
    if name in ("aten::index_fill_", "aten::index_fill"):
        return overload == "int_Tensor"
    return torch.Tag.pointwise in call.op.tags and name != "aten::where"


def _names(call: OpCall) -> tuple[str, str]:
    name, _, overload = call.op.name().partition(".")
    return name, overload


def _argument(call: OpCall, name: str) -> Any:
    if name in call.kwargs:
        return call.kwargs[name]
    for position, argument in enumerate(call.op._schema.arguments):
        if argument.name == name:
            return call.args[position] if position < len(call.args) else argument.default_value
    return None


def _goes_to_device(call: OpCall, memory: Memory) -> bool:
    target = _argument(call, "device")
    return (
        isinstance(target, torch.device) and target.type == memory.device.type and _names(call)[0] == "aten::_to_copy"
    )


def _is_empty(tensor: torch.Tensor) -> bool:
    return any(isinstance(size, int) and size == 0 for size in tensor.shape)


def _one_element(tensor: torch.Tensor) -> bool:
    return all(isinstance(size, int) and size == 1 for size in tensor.shape)


def copies_between_memories(call: OpCall, memory: Memory) -> Finding | None:
    """``copy_``, ``.to(device)``, ``.cpu()`` from one memory to the other."""
    name, _ = _names(call)
    if name != "aten::_to_copy":
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
    non_blocking = bool(_argument(call, "non_blocking"))
    if to_host:
        if non_blocking and (target is source or memory.is_pinned(target)):
            return None
        return Finding("sync", "it copies to the host, and waits for the device", f"{_ON_DEVICE} until after the step")
    if non_blocking and memory.is_pinned(source):
        return None
    what = "without non_blocking=True" if memory.is_pinned(source) else "from pageable memory"
    return Finding(
        "host copy",
        f"it copies from the host, {what}",
        "Pass the tensor on the device; or stage it in pinned memory: t.copy_(source.pin_memory(), non_blocking=True)",
    )


def lifts_data(call: OpCall, memory: Memory) -> Finding | None:
    """``torch.tensor([5], device="cuda")``: PyTorch marks every tensor made from Python data by ``lift_fresh``."""
    return None if memory.on_host(call.args[0]) or _is_empty(call.args[0]) else made_from_data()


def indexes_with_host(call: OpCall, memory: Memory) -> Finding | None:
    """An index list, an index tensor on the host, or a host scalar written through index tensors."""
    indices = _indices(call)
    if any(memory.on_host(i) and not _is_empty(i) for i in indices):
        return Finding(
            "host copy",
            "its index is a list, or lies on the host, and is copied to the device",
            "Index with a slice, or with a tensor on the device: self.register_buffer(name, torch.tensor(...))",
        )
    value = _written_value(call)
    if value is None or not memory.on_host(value) or (any(i.dtype in _MASKS for i in indices) and _fills(call, memory)):
        return None
    return Finding(
        "host copy",
        "it writes a host scalar through index tensors, which is copied to the device",
        "Write a value of the device: t[index] = torch.full((), value, dtype=t.dtype, device=t.device); "
        "or along one dimension: t.index_fill_(0, index, value)",
    )


def indexes_with_mask(call: OpCall, memory: Memory) -> Finding | None:
    """A boolean mask as an index: how many elements it selects is known on the device only."""
    if not any(i.dtype in _MASKS for i in _indices(call)) or _fills(call, memory):
        return None
    return Finding(
        "dynamic shape" if _written_value(call) is None else "sync",
        "it waits for the device, to count what the mask selects",
        "Keep the shape: torch.where(mask, value, t); or t[mask] = 0 with a Python number, which is a masked fill",
    )


def _indices(call: OpCall) -> list[torch.Tensor]:
    given = _argument(call, "indices")
    return [i for i in (given if given is not None else [_argument(call, "index")]) if isinstance(i, torch.Tensor)]


def _written_value(call: OpCall) -> torch.Tensor | None:
    return _argument(call, "values") if "index_put" in call.op.name() else None


def _fills(call: OpCall, memory: Memory) -> bool:
    """Whether an ``index_put_`` is carried out as a masked fill: one mask, one value known to the host."""
    value, indices = _written_value(call), _indices(call)
    return (
        value is not None
        and len(indices) == 1
        and indices[0].dtype in _MASKS
        and not memory.on_host(indices[0])
        and _one_element(value)
        and memory.on_host(value)
        and not _argument(call, "accumulate")
    )


def reads_fill_value(call: OpCall, memory: Memory) -> Finding | None:
    """``masked_fill_`` and ``index_fill_`` with a value on the device."""
    value = _argument(call, "value")
    if not isinstance(value, torch.Tensor) or memory.on_host(value):
        return None
    return Finding("sync", "it waits for the device, to read the value", "Write: torch.where(mask, value, t)")


def selects_host_scalar(call: OpCall, memory: Memory) -> Finding | None:
    """``torch.where`` with a scalar tensor on the host."""
    if not any(memory.on_host(t) for t in tensor_arguments(call)):
        return None
    return Finding(
        "host copy", "it copies a scalar tensor from the host", "Pass a Python number: torch.where(mask, 0.0, t)"
    )


def has_unsafe_tag(call: OpCall, memory: Memory) -> Finding | None:
    """Ops that PyTorch itself marks."""
    name, _ = _names(call)
    tags = call.op.tags
    if torch.Tag.cudagraph_unsafe in tags:
        return Finding("unsafe op", "it is tagged cudagraph_unsafe", "Call it outside the compiled function")
    if torch.Tag.data_dependent_output in tags:
        return Finding(
            "sync", "it waits for the device, to read a value", f"{_ON_DEVICE}: torch.where(condition, a, b)"
        )
    if name == "aten::repeat_interleave" and _argument(call, "output_size") is not None:
        return None
    return Finding(
        "dynamic shape",
        "the size of its result depends on the data, so it waits for the device",
        "Keep the shape: a mask with torch.where, or output_size= where the op takes it",
    )


def waits_for_device(call: OpCall, memory: Memory) -> Finding | None:
    """Ops that wait without being tagged."""
    name, _ = _names(call)
    if name in _WAITING_OPS:
        return Finding("sync", "it waits for the device", f"Instead, {_WAITING_OPS[name]}")
    if name == "aten::normal" and isinstance(_argument(call, "std"), torch.Tensor):
        return Finding(
            "sync", "it waits for the device, to check that std >= 0", "Write: mean + std * torch.randn_like(std)"
        )
    if name == "aten::histc" and _argument(call, "min") == _argument(call, "max"):
        return Finding(
            "sync", "it waits for the device, to find the range", "Give it: torch.histc(x, bins, min=a, max=b)"
        )
    return None


def uses_generator(call: OpCall, memory: Memory) -> Finding | None:
    """Random numbers from a generator that a captured graph does not advance."""
    generator = call.kwargs.get("generator") if "generator" in call.kwargs else _argument(call, "generator")
    if generator is None or any(generator is default for default in _default_generators()):
        return None
    if isinstance(generator, torch.Generator) and generator.device.type != memory.device.type:
        return None
    return Finding(
        "rng",
        "it draws from a generator of its own, which no captured graph advances",
        "Use the default generator: leave generator= out, and seed with torch.manual_seed",
    )


def _default_generators() -> Iterable[Any]:
    yield torch.default_generator
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        yield from torch.cuda.default_generators


def groups_on_host(call: OpCall, memory: Memory) -> Finding | None:
    """Grouped matrix products, whose kernels for older GPUs read the group sizes on the host."""
    if memory.device.type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.cuda.get_device_capability(memory.device) >= (10, 0):
        return None
    return Finding("unsafe op", "it cannot be captured on GPUs older than sm_100", "Use a batched matmul: torch.bmm")


@functools.cache
def _rules_of(op: torch._ops.OpOverload) -> tuple[Rule, ...]:
    """The rules that can have a finding for an op: none for most ops, which then cost one look-up."""
    name, _, overload = op.name().partition(".")
    plain = name.removesuffix("_")
    rules: list[Rule] = []
    if plain in ("aten::copy", "aten::_to_copy"):
        rules.append(copies_between_memories)
    if name == "aten::lift_fresh":
        rules.append(lifts_data)
    if plain in _INDEXING:
        rules += [indexes_with_host, indexes_with_mask]
    if plain in ("aten::masked_fill", "aten::index_fill") and overload.endswith("Tensor"):
        rules.append(reads_fill_value)
    if name == "aten::where":
        rules.append(selects_host_scalar)
    if plain not in _INDEXING and any(tag in op.tags for tag in _UNSAFE_TAGS):
        rules.append(has_unsafe_tag)
    if name in (*_WAITING_OPS, "aten::normal", "aten::histc"):
        rules.append(waits_for_device)
    if any(argument.name == "generator" for argument in op._schema.arguments):
        rules.append(uses_generator)
    if name in ("aten::_grouped_mm", "aten::_scaled_grouped_mm"):
        rules.append(groups_on_host)
    return tuple(rules)
