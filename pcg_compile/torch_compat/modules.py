"""Forward hooks of modules without their handles (torch 2.11 to 2.13)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from .probe import attributes

attributes("torch.nn.Module", "2.11 to 2.13", "_forward_hooks _forward_pre_hooks", torch.nn.Module)
attributes("torch.nn.modules.module", "2.11 to 2.13", "_global_forward_hooks _global_forward_pre_hooks")


def completed_call(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module's forward after the pre-hooks that complete a call (2.11 to 2.13).

    Those have ``completes_call``: the forward is not right without them, also where it is not called by the module.
    """
    for hook in module._forward_pre_hooks.values():
        if getattr(hook, "completes_call", False):
            result: Any = hook(module, args, kwargs)
            if result is not None:
                args, kwargs = result
    return args, kwargs


def calls_hooks(module: torch.nn.Module) -> bool:
    """Whether calling a module calls more than its forward, but for hooks that complete a call (2.11 to 2.13)."""
    before = [hook for hook in module._forward_pre_hooks.values() if not getattr(hook, "completes_call", False)]
    everywhere = torch.nn.modules.module
    return bool(
        before or module._forward_hooks or everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
    )


def with_forward_hook(state: dict[str, Any], hook: Callable[..., Any]) -> dict[str, Any]:
    """The state of a module, as pickle and deepcopy have it, with one more forward hook (2.11 to 2.13)."""
    hooks = OrderedDict(state["_forward_hooks"])
    hooks[torch.utils.hooks.RemovableHandle(hooks).id] = hook
    return {**state, "_forward_hooks": hooks}


def drop_forward_hook(module: torch.nn.Module, hook: Callable[..., Any]) -> bool:
    """Takes a hook off a module without the handle that registering it gave; whether it was there (2.11 to 2.13)."""
    keys = [key for key, one in module._forward_hooks.items() if one is hook]
    for key in keys:
        del module._forward_hooks[key]
    return bool(keys)
