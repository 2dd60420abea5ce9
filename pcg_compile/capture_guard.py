"""A guard for eager metadata code: raises at the line that no CUDA graph could hold, or that waits for the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import CaptureHazard, GraphBreakingScalarWrite, Hazard, OptionsError, message
from .fx.facts import OpCall, tensors_in
from .fx.places import Place, place_of_frame
from .passes.hazard_rules import MADE_FROM_DATA, Finding, finding_of, hazard_at, tensor_arguments
from .passes.host_tensors import FROM_DATA
from .passes.statements import assignment_at

__all__ = ["capture_guard"]

_READS = {"tolist", "numpy", "__array__", "cpu", "__repr__", "__format__"}
_NUMBER = (bool, int, float, complex)


@contextmanager
def capture_guard(
    mode: Literal["raise", "warn"] = "raise", *, device: torch.device | str | None = None
) -> Iterator[list[Hazard]]:
    """Checks all PyTorch calls of this thread inside the block, as the safety passes check graphs.

    It is for eager code that prepares a batch, such as ``compute_routing(slots)``, and may run on tensors of any
    device. Tensors on ``device`` are checked; those on the host may be read and written as one likes. On a machine
    without a GPU the device is the CPU: every tensor counts as one on the device, except for what is made of Python or
    numpy data without naming a device (``torch.tensor([1, 2])``, ``torch.from_numpy(a)``) and what is computed from
    nothing else. What bypasses PyTorch's dispatcher (``torch.cuda.synchronize()``, a C extension) is not seen.

    It costs about 10 us a PyTorch call (``t.add_(1)``: 2.6 us alone, 12.7 us guarded; a CPU machine, torch 2.13) and
    7 us to enter: for tests and debugging, not for serving.

    Args:
        mode: "raise" stops at the first finding; "warn" collects them in the list that ``as`` names.
        device: the capture device; None: CUDA where there is one, else the CPU.

    Raises:
        GraphBreakingScalarWrite: ``t[0] = 0``, where this torch copies the scalar from the host.
        CaptureHazard: a copy from or to pageable memory, a wait for the device, a result whose size depends on data.
        OptionsError: ``mode`` is neither of the two.
    """
    if mode not in ("raise", "warn"):
        raise OptionsError(
            message(f"bad mode: {mode!r}", why='Allowed: "raise" or "warn".', cure='Write: pcg.capture_guard("warn")')
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    guard = _Guard(torch.device(device), mode == "raise")
    with _Ops(guard), _Calls(guard):
        yield guard.found


class _Guard:
    """What both modes share; a :class:`pcg_compile.passes.hazard_rules.Memory` of real tensors."""

    def __init__(self, device: torch.device, raises: bool) -> None:
        self.device = device
        self.raises = raises
        self.found: list[Hazard] = []
        #: On a CPU run: the tensors that would lie on the host beside a GPU.
        self.host = WeakTensorKeyDictionary()
        #: Whether a call runs that only computes on the host, or whose checks of values only a CPU makes.
        self.quiet = False
        #: (index, value) of the assignment that is running.
        self.assignment: tuple[Any, Any] | None = None

    def on_host(self, tensor: torch.Tensor) -> bool:
        if self.device.type != "cpu":
            return tensor.device.type != self.device.type
        return tensor in self.host

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and torch.cuda.is_available() and tensor.is_pinned()

    def report(self, finding: Finding, op: str) -> None:
        place = place_of_frame(inspect.currentframe())
        if self.assignment is not None and op == "aten::copy_" and isinstance(self.assignment[1], _NUMBER):
            what, why, cure = assignment_at(place, *self.assignment).refusal(self.device)
            self._report("scalar write", GraphBreakingScalarWrite, place, "setitem", what, why, cure)
            return
        statement = f"`{place.source}`" if place.source else op
        what = f"{statement} cannot be captured: {op} {finding.reason.removeprefix('it ')}"
        self._report(finding.kind, CaptureHazard, place, op, what, None, finding.cure)

    def _report(
        self, kind: str, error: type[Exception], place: Place, op: str, what: str, why: str | None, cure: str
    ) -> None:
        if self.raises:
            raise error(message(what, str(place), why, cure))
        hazard = hazard_at(place, Finding(kind, what, cure), op)
        # One statement can be seen twice: as it is called, and as what it dispatches.
        if not self.found or (self.found[-1].kind, self.found[-1].file, self.found[-1].line) != (
            kind,
            place.file,
            place.line,
        ):
            self.found.append(hazard)


class _Ops(TorchDispatchMode):
    """Sees every op that is dispatched, whatever called it."""

    def __init__(self, guard: _Guard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.guard = guard

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        guard, call = self.guard, OpCall(func, args, kwargs or {})
        if guard.quiet:
            return func(*args, **call.kwargs)
        name = func.name().partition(".")[0] if isinstance(func, torch._ops.OpOverload) else str(func)
        if guard.device.type != "cpu":
            _check(guard, call, name)
            return func(*args, **call.kwargs)
        # Only data of Python and numpy are lifted: on a GPU machine they would stay on the host.
        made_of_data = name == "aten::lift_fresh"
        if not made_of_data:
            _check(guard, call, name)
        result = func(*args, **call.kwargs)
        if made_of_data or (guard.host and _all_on_host(guard, call)):
            for tensor in tensors_in(result):
                guard.host[tensor] = True
        return result


def _check(guard: _Guard, call: OpCall, name: str) -> None:
    finding = finding_of(call, guard)
    if finding is not None:
        guard.report(finding, name)


def _all_on_host(guard: _Guard, call: OpCall) -> bool:
    tensors = tensor_arguments(call)
    return bool(tensors) and all(guard.on_host(t) for t in tensors)


class _Calls(TorchFunctionMode):
    """Sees the calls as they were written: what they assign, and what no op is dispatched for."""

    def __init__(self, guard: _Guard) -> None:
        super().__init__()
        self.guard = guard

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        guard, kwargs = self.guard, kwargs or {}
        name = getattr(func, "__name__", "")
        if _made_of_tensors(guard, func, args, kwargs):
            guard.report(
                Finding("sync", "it waits for the device, to read each element", "Write: torch.stack([...])"), name
            )
        if guard.device.type == "cpu" and (guard.host or name == "one_hot"):
            on_host = _stays_on_host(guard, args, kwargs)
            if on_host or _knows_classes(name, args, kwargs):
                return _quietly(guard, func, args, kwargs, on_host)
        if name == "__setitem__":
            guard.assignment = (args[1], args[2])
            try:
                return func(*args, **kwargs)
            finally:
                guard.assignment = None
        if name in _READS and isinstance(args[0], torch.Tensor) and not guard.on_host(args[0]):
            guard.report(
                Finding("sync", "it waits for the device", "Keep the value on the device until after the step"), name
            )
        if guard.device.type != "cpu" or not _puts_on_device(guard, func, args, kwargs):
            return func(*args, **kwargs)
        guard.report(MADE_FROM_DATA, name)
        result = func(*args, **kwargs)
        guard.host.pop(result, None)
        return result


def _quietly(
    guard: _Guard, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], on_host: bool
) -> Any:
    guard.quiet = True
    try:
        result = func(*args, **kwargs)
    finally:
        guard.quiet = False
    for tensor in tensors_in(result) if on_host else ():
        guard.host[tensor] = True
    return result


def _stays_on_host(guard: _Guard, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is given tensors of the host alone, and names no device."""
    tensors = list(tensors_in((args, dict(kwargs))))
    if not tensors or not all(guard.on_host(t) for t in tensors):
        return False
    return not any(isinstance(leaf, (torch.device, str)) for leaf in tree_leaves((args, dict(kwargs))))


def _knows_classes(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """``one_hot(t, 8)``, which reads its values on a CPU alone, to check them."""
    return name == "one_hot" and kwargs.get("num_classes", args[1] if len(args) > 1 else -1) != -1


def _made_of_tensors(guard: _Guard, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """``torch.tensor([t[0], t[1]])``, which reads each element below all that a dispatch mode sees."""
    if func not in FROM_DATA and getattr(func, "__name__", "") != "new_tensor":
        return False
    given = (*args[getattr(func, "__name__", "") == "new_tensor" :], *kwargs.values())
    return any(not guard.on_host(t) for data in given if isinstance(data, (list, tuple)) for t in tensors_in(data))


def _puts_on_device(guard: _Guard, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """On a CPU run: whether a call names the device for data of the host, which the dispatched ops do not tell."""
    name = getattr(func, "__name__", "")
    if func in FROM_DATA:
        return kwargs.get("device") is not None and not any(isinstance(a, torch.Tensor) for a in args[:1])
    if name == "new_tensor":
        return not guard.on_host(args[0])
    return name in ("to", "cuda") and guard.on_host(args[0]) and _names_device(args, kwargs)


def _names_device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    named = (*args[1:], *kwargs.values())
    return any(isinstance(a, torch.device) or (isinstance(a, str) and a != "cpu") for a in named)
