"""Fake tensors: their mode, copies of them, and what they know of values (torch 2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .probe import attributes, exceptions, private

__all__ = [
    "NEEDS_DATA",
    "FakeTensor",
    "FakeTensorMode",
    "TracingContext",
    "empty_fake",
    "fake_inputs",
    "fake_like",
    "fake_mode_of",
    "holds_data",
    "is_real",
    "isolated_tracing",
    "modes_of_trace",
    "python_dispatcher",
    "unbacked_symbols_may_stay",
    "without_transforms",
]

_READ = "2.11 to 2.13"
attributes("torch._subclasses.fake_tensor", _READ, "FakeTensor FakeTensorMode")
attributes("torch._subclasses.fake_tensor.FakeTensorMode", _READ, "from_tensor")
attributes("torch._guards.TracingContext", _READ, "try_get")
TracingContext: Any = private("torch._guards.TracingContext", _READ)
_detect_fake_mode = private("torch._guards.detect_fake_mode", _READ)
_tracing = private("torch._guards.tracing", _READ)
_enable_python_dispatcher = private("torch._dispatch.python.enable_python_dispatcher", _READ)
_is_functional_tensor = private("torch._is_functional_tensor", _READ)
_disable_torch_dispatch = private("torch._C._DisableTorchDispatch", _READ)
_make_subclass = private("torch.Tensor._make_subclass", _READ)
_is_wrapped = private("torch._C._functorch.is_functorch_wrapped_tensor", _READ)
_unwrapped = private("torch._C._functorch.get_unwrapped", _READ)


#: What a fake tensor raises where only its data tell what comes next (2.11 to 2.13).
NEEDS_DATA = exceptions(
    "torch._subclasses.fake_tensor", _READ, "DataDependentOutputException DynamicOutputShapeException"
)


def fake_mode_of(inputs: Sequence[Any]) -> FakeTensorMode:
    """The fake mode of Dynamo's trace (2.11 to 2.13), or a fresh one that allows real tensors."""
    mode: FakeTensorMode | None = _detect_fake_mode(list(inputs))
    return mode if mode is not None else FakeTensorMode(allow_non_fake_inputs=True)


def fake_inputs(inputs: Sequence[Any]) -> list[Any]:
    """Fake values of a backend's real inputs, with the symbols that Dynamo gave their sizes (2.11 to 2.13).

    Dynamo's own fake values are not used: in-place changes of shape during the trace have reached them.
    """
    mode = fake_mode_of(inputs)
    context = TracingContext.try_get()
    fakes: list[Any] = []
    for value in inputs:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            fakes.append(value)
            continue
        symbolic = context.tensor_to_context.get(value) if context is not None else None
        if symbolic is None:
            fakes.append(mode.from_tensor(value, static_shapes=True))
        else:
            source = getattr(symbolic, "tensor_source", None)
            fakes.append(mode.from_tensor(value, symbolic_context=symbolic, source=source, trace=False))
    return fakes


def is_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values, unlike those of a trace (2.11 to 2.13)."""
    return not isinstance(tensor, FakeTensor) and not _is_functional_tensor(tensor)


def fake_like(tensor: FakeTensor) -> FakeTensor:
    """A fake tensor of the same sizes, over the same storage, made without arithmetic on sizes (2.11 to 2.13)."""
    with _disable_torch_dispatch():
        plain = _make_subclass(torch.Tensor, tensor)
        return FakeTensor(tensor.fake_mode, plain, tensor.fake_device)


def empty_fake(like: FakeTensor, *, whole: bool = False, inside: torch.Tensor | None = None) -> torch.Tensor:
    """A fake tensor of the sizes of ``like`` over memory of its own, or ``inside`` that of another one (2.11 to 2.13).

    ``whole``: instead, all of the memory that ``like`` is a part of, in one dimension.
    """
    kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    with like.fake_mode, python_dispatcher(), torch.no_grad():
        if whole:
            return torch.empty((like.untyped_storage().nbytes() // like.element_size(),), **kind)
        if inside is None and isinstance(like.storage_offset(), int) and like.storage_offset() == 0:
            return torch.empty_strided(like.shape, like.stride(), **kind)
        base = inside if inside is not None else empty_fake(like, whole=True)
        return base.view(like.dtype).as_strided(like.shape, like.stride(), like.storage_offset())


def holds_data(tensor: FakeTensor) -> bool:
    """Whether a fake tensor knows its values, so ops on it compute with them (2.11 to 2.13)."""
    return tensor.constant is not None or tensor.real_tensor is not None


def modes_of_trace() -> tuple[Any, ...]:
    """The modes that decide, beside its arguments, what an op does in a trace (2.11 to 2.13)."""
    autocast = [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), *autocast)


def python_dispatcher() -> AbstractContextManager[Any]:
    """Makes symbolic shapes pass through ops that decompose in C++ (2.11 to 2.13)."""
    context: AbstractContextManager[Any] = _enable_python_dispatcher()
    return context


@contextmanager
def isolated_tracing(fake_mode: FakeTensorMode) -> Iterator[None]:
    """A tracing context of our own, so compiling a piece leaves Dynamo's alone (2.11 to 2.13)."""
    with _tracing(TracingContext(fake_mode)):
        yield


def unbacked_symbols_may_stay(fake_mode: FakeTensorMode) -> AbstractContextManager[Any]:
    """Sizes that only data tell come up again when a graph is interpreted again (2.11 to 2.13)."""
    env = fake_mode.shape_env
    return env.ignore_fresh_unbacked_symbols() if env is not None else nullcontext()


def without_transforms(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor under function transforms such as vmap, whose own tensors have no storage (2.11 to 2.13)."""
    while _is_wrapped(tensor):
        tensor = _unwrapped(tensor)
    return tensor
