"""The class of a layer with adapters: the layer's own, with a ``forward`` that adds them."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable
from functools import cache
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError, BatchError, message
from ..step import current_step
from ..torch_compat.modules import drop_forward_hook, with_forward_hook
from .shards import own_tensors

#: Attributes of a layer with adapters: the buffer of packed factors, and plain ones.
FACTORS = "pcg_lora_factors"
FACTS = ("pcg_lora_layout", "pcg_lora_name", "pcg_lora_kinds", "pcg_lora_sizes", "pcg_lora_router")


def routers_of(*models: nn.Module) -> list[Any]:
    """The routers of the adapter pools that models' layers belong to, in the order of the layers."""
    routers = (getattr(module, "pcg_lora_router", None) for model in models for module in model.modules())
    return list({id(router): router for router in routers if router is not None}.values())


class _CopiedAsBase(nn.Module):
    """A layer that a pool loads adapters into; copies of it are the base model's.

    Note [the class of a layer]
    Dynamo does not notice hooks that come or go once a model is compiled. It guards the class of every module, once, so
    that another class is what costs a step the least: a hook and a ``forward`` of the layer's own are some 20 guards
    more for each layer, 7 us instead of 3 at every step (on a CPU). ``torch.nn.utils.parametrize`` does so as well.
    """

    #: The encoded :class:`~pcg_compile.lora.packed.PackedFactors`; None: no pool loads adapters into this layer.
    pcg_lora_layout: str | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What a deep copy and a pickle are made of: a layer of the class it was, without adapters."""
        made = super().__reduce_ex__(protocol)
        if isinstance(made, str):
            return made
        function, args, *rest = made
        # pickle insists on the object's own class where it knows the function.
        function = _new if function is copyreg.__newobj__ else function  # type: ignore[attr-defined]
        args = tuple(_class_before(type(self)) if one is type(self) else one for one in args)
        if rest and isinstance(rest[0], dict) and "_buffers" in rest[0]:
            rest[0] = _state_of_a_copy(rest[0])
        return (function, args, *rest)


class _Adapted(_CopiedAsBase):
    """Adds each token's adapter to what the layer's class computes."""


def _forward_and_adapters(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The ``forward`` of a layer that had one of its own, which may or may not call its class's."""
    return _added(self, self.pcg_lora_forward(*args, **kwargs), args, kwargs)


def _added(module: Any, output: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    layout = module.pcg_lora_layout
    if layout is not None:
        if not output.requires_grad:
            y, x = own_tensors(module, output, args[0] if args else next(iter(kwargs.values())))
            torch.ops.pcg.lora(y, x, module.pcg_lora_factors, layout)
        elif not torch.compiler.is_compiling():
            _refuse_gradients()
    return output


@cache
def _adapted_class(base: type, cls: type[nn.Module]) -> type[nn.Module]:
    members: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    if base is _Adapted:
        # By name: Dynamo guards every step of super()'s way.
        def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return _added(self, cls.forward(self, *args, **kwargs), args, kwargs)

        members["forward"] = forward
    own: Any = getattr(cls, "__deepcopy__", None)
    if own is not None:
        # Of a parametrized layer, for one: it copies what it finds.
        def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
            copy = own(self, memo)
            unadapt(copy)
            copy.register_forward_hook(_hook_of_a_copy)
            return copy

        members["__deepcopy__"] = deepcopy
    return type(f"LoRA{cls.__name__}", (base, cls), members)


def adapt(module: nn.Module, *, around: bool = False) -> None:
    """Gives a layer a class with adapters.

    Args:
        around: they are added to the result of the ``forward`` that the layer has of its own, else to its class's.
    """
    # It may be a copy of a layer with adapters; now it gets its own.
    drop_forward_hook(module, _hook_of_a_copy)
    if not isinstance(module, _CopiedAsBase):
        cls: Any = type(module)
        module.__class__ = _adapted_class(_CopiedAsBase if around else _Adapted, cls)
    elif around and isinstance(module, _Adapted):
        raise AdapterError(
            message(
                f"{type(module).__name__} got another class and a forward of its own since it had an adapter pool",
                cure="Give it its former class back first, or make the pool on a new model.",
            )
        )
    if around:
        own: Any = module
        own.pcg_lora_forward = vars(module).pop("forward")
        own.forward = MethodType(_forward_and_adapters, module)


def unadapt(module: nn.Module) -> None:
    """Restores a layer. If its class was changed since, the remaining class adds nothing."""
    if "pcg_lora_forward" in vars(module):
        vars(module)["forward"] = vars(module).pop("pcg_lora_forward")
    for name in (FACTORS, *FACTS):
        if name in vars(module) or name in module._buffers:
            delattr(module, name)
    module.__class__ = _class_before(type(module))


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)


def _class_before(cls: type) -> type:
    """The class of a layer before it got adapters; a class that was put on top since stays."""
    return cls.__bases__[1] if cls.__bases__[0] in (_CopiedAsBase, _Adapted) and len(cls.__bases__) == 2 else cls


def _state_of_a_copy(state: dict[str, Any]) -> dict[str, Any]:
    """A copied layer is the base model's: its pool knows nothing of it, and loads no adapter into it."""
    kept = {name: value for name, value in state.items() if name not in FACTS}
    if "pcg_lora_forward" in kept:
        kept["forward"] = kept.pop("pcg_lora_forward")
    kept["_buffers"] = {name: value for name, value in state["_buffers"].items() if name != FACTORS}
    kept["_non_persistent_buffers_set"] = state["_non_persistent_buffers_set"] - {FACTORS}
    return with_forward_hook(kept, _hook_of_a_copy)


def _hook_of_a_copy(module: Any, args: Any, output: torch.Tensor) -> None:
    if not torch.compiler.is_compiling():
        state = current_step()
        adapters = None if state is None else state.batch.adapters
        if isinstance(adapters, torch.Tensor) or any(adapters or ()):
            raise BatchError(
                message(
                    "the batch names adapters, and the model is a copy of the one that their pool was made on",
                    cure="Make a pool for the copy: AdapterPool(copy, ...)",
                )
            )


def _refuse_gradients() -> None:
    """Raises if the batch has adapters: their gradients would be wrong."""
    state = current_step()
    if state is not None and state.batch.adapters is not None:
        raise BatchError(
            message("the batch names adapters, and gradients are enabled", cure="Call it in torch.no_grad().")
        )


# -- layers whose forward was replaced by one that does more: adapters go inside of that ---------------------------

#: What transformers' ``install_forward`` calls the method that it replaces (5.18 to 5.24).
_REPLACED = "original_forward"


def has_forward_of_class(module: nn.Module) -> bool:
    """Whether calling a module calls its class's ``forward``."""
    forward = vars(module).get("forward")
    return forward is None or _is_of_class(forward, module)


def opened_forward(name: str, module: nn.Module) -> Callable[[nn.Module], Callable[..., Any]]:
    """What makes of a module's own ``forward`` one that calls the module's class as it will be then.

    transformers' parallel styles replace ``module.forward`` by a function that brings the input to the rank, calls the
    method that was there, and sums up the ranks' results: adapters go inside of it.

    Returns:
        A function of the module that gives the new forward.

    Raises:
        AdapterError: it is not known what the forward does with the class's.
    """
    forward = vars(module)["forward"]
    names = forward.__code__.co_freevars if inspect.isfunction(forward) else ()
    cells = dict(zip(names, forward.__closure__ or (), strict=True)) if names else {}
    original: Any = cells[_REPLACED].cell_contents if _REPLACED in cells else None
    if not _is_of_class(original, module):
        raise AdapterError(
            message(
                f"the forward of {name} was replaced by {getattr(forward, '__qualname__', forward)!r}",
                why="Adapters come before the ranks' results are summed up, and whether it does that is not known.",
                cure="Split the model by parallelize_module(model, ...), or by from_pretrained(..., tp_plan='auto').",
            )
        )

    def opened(module: nn.Module) -> Callable[..., Any]:
        inside = {**cells, _REPLACED: CellType(MethodType(type(module).forward, module))}
        new = FunctionType(
            forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, tuple(inside.values())
        )
        new.__kwdefaults__, new.__qualname__ = forward.__kwdefaults__, forward.__qualname__
        return new

    return opened


def _is_of_class(function: Any, module: nn.Module) -> bool:
    """Whether it is the method that the module's class has for ``forward``."""
    return bool(function == MethodType(type(module).forward, module))
