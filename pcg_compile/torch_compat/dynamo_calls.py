"""What Dynamo checks at each call, for calls that reach their graph without it (torch 2.11 to 2.13)."""

from __future__ import annotations

import dis
import itertools
import weakref
from collections.abc import Mapping, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch._dynamo.eval_frame

from .fake_tensors import FakeTensorMode, TracingContext
from .probe import attributes, private

__all__ = [
    "GlobalState",
    "TensorChecks",
    "function_of_code",
    "globals_of_code",
    "name_of_source",
    "traced_codes",
    "traced_inputs",
]

_READ = "2.11 to 2.13"
_GlobalStateGuard = private("torch._C._dynamo.guards.GlobalStateGuard", _READ)
_TensorGuards = private("torch._C._dynamo.guards.TensorGuards", _READ)
_callback = private("torch._C._dynamo.eval_frame.get_eval_frame_callback", _READ)
_dispatch_modes = private("torch._C._len_torch_dispatch_stack", _READ)
_function_modes = private("torch._C._len_torch_function_stack", _READ)
_transforms = private("torch._C._functorch.peek_interpreter_stack", _READ)
attributes("torch._dynamo.eval_frame", _READ, "_stance")
#: Registry of names: two functions may have the same code.
_numbers = itertools.count()
attributes("torch.fx.experimental.symbolic_shapes.ShapeEnv", _READ, "tracked_fakes", lambda: _env())


def _env() -> Any:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv()


class GlobalState:
    """The state of torch that Dynamo guards: grad mode, autocast, default dtype, deterministic algorithms, ...

    Args:
        saved: what :meth:`saved` gave in another process; None: the present state.
    """

    __slots__ = ("_guard", "_inference")

    def __init__(self, saved: tuple[str, bool] | None = None) -> None:
        self._guard = _GlobalStateGuard()
        self._inference = torch.is_inference_mode_enabled()
        if saved is not None:
            self._guard.__setstate__(saved[0])
            self._inference = saved[1]

    def saved(self) -> tuple[str, bool]:
        """The state as plain data."""
        return self._guard.__getstate__(), self._inference

    def holds(self) -> bool:
        """Whether the state is the present one, and nobody looks at the calls of this thread (2.11 to 2.13).

        Dynamo does while it runs another compiled function; modes and function transforms do.
        """
        return (
            self._guard.check()
            and torch.is_inference_mode_enabled() is self._inference
            and _callback() is None
            and not _dispatch_modes()
            and not _function_modes()
            and _transforms() is None
            and torch._dynamo.eval_frame._stance.stance == "default"
        )

    def why(self) -> str:
        """What differs, for messages; "" where nothing is known."""
        return str(self._guard.reason()) if not self._guard.check() else ""


class TensorChecks:
    """Dynamo's check of tensors: type, dtype, device, dispatch keys, ``requires_grad``, sizes, strides (2.11 to 2.13).

    Args:
        tensors: examples; they are not kept.
        sizes, strides: for each tensor, None for every dimension whose value may differ.
    """

    __slots__ = ("check",)

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        sizes: Sequence[Sequence[int | None]],
        strides: Sequence[Sequence[int | None]],
    ) -> None:
        guards = _TensorGuards(
            *tensors, dynamic_dims_sizes=list(map(list, sizes)), dynamic_dims_strides=list(map(list, strides))
        )
        self.check = guards.check


def name_of_source(source: Any) -> str:
    """How Dynamo names where a value comes from: an expression of the function's locals (2.11 to 2.13)."""
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def traced_inputs(fake_mode: FakeTensorMode) -> dict[str, Any]:
    """Everything with a size that Dynamo has looked at in the running trace: fake values by name (2.11 to 2.13)."""
    env = fake_mode.shape_env
    tracked = getattr(env, "tracked_fakes", None) or []
    return {name_of_source(one.source): one.fake for one in tracked}


def traced_codes() -> list[CodeType]:
    """The code of all functions that the running trace went through (2.11 to 2.13)."""
    context = TracingContext.try_get()
    return list(dict.fromkeys(getattr(context, "traced_code", None) or []))


def function_of_code(code: CodeType, function: Any, names: Mapping[str, Any]) -> Any:
    """The function, or bound method, with the code that Dynamo wrote for it (2.11 to 2.13).

    Args:
        names: globals that the code finds beside the function's own.
    """
    plain = getattr(function, "__func__", function)
    scope, added = ({**plain.__globals__, **names}, ()) if names else (plain.__globals__, _direct_graphs(code, plain))
    code = code.replace(co_names=tuple(dict(added).get(name, name) for name in code.co_names))
    made = FunctionType(code, scope, plain.__name__, plain.__defaults__, plain.__closure__)
    made.__kwdefaults__ = plain.__kwdefaults__
    for _, name in added:
        weakref.finalize(made, scope.pop, name, None)
    return MethodType(made, function.__self__) if hasattr(function, "__self__") else made


def _direct_graphs(code: CodeType, function: Any) -> Sequence[tuple[str, str]]:
    """Enters the graphs that code calls among a function's globals once more, without what keeps Dynamo from them.

    That wrapper takes 3 us a call; where nobody looks at the calls of the thread it has nothing to do (2.11 to 2.13).

    Returns:
        (name in the code, new name) of each.
    """
    found, scope = [], function.__globals__
    for name in code.co_names:
        graph = getattr(scope.get(name), "_torchdynamo_orig_callable", None)
        if name.startswith("__compiled_fn") and graph is not None:
            found.append((name, f"{name}_direct_{next(_numbers)}"))
            scope[found[-1][1]] = graph
    return found


def globals_of_code(
    code: CodeType, scope: Mapping[str, Any], known: Sequence[Sequence[str]]
) -> dict[str, tuple[str, str] | None]:
    """What code that Dynamo wrote finds among its globals beside the function's own, by name (2.11 to 2.13).

    Args:
        scope: the globals. known: names that the code of traced functions uses.

    Returns:
        ("module", name), ("builtins", "") or ("object", dotted name) for each; None for the graph.

    Raises:
        ValueError: one has no name.
    """
    found: dict[str, tuple[str, str] | None] = {}
    users = {name for names in known for name in names}
    for name in dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"):
        value = scope.get(name)
        if name.startswith("__compiled_fn"):
            found[name] = None
        elif isinstance(value, ModuleType) and name not in users:
            found[name] = ("module", value.__name__)
        elif name.startswith("__builtins_dict__"):
            found[name] = ("builtins", "")
        elif name in users or name not in scope:
            continue  # the function's own, or a builtin
        elif isinstance(value, type) or callable(value):
            found[name] = ("object", f"{value.__module__}.{value.__qualname__}")
        else:
            raise ValueError(f"{name}, a {type(value).__name__} that the function's results are made with")
    return found
