"""Inductor: compiling graphs, its worker processes, and the code that it wrote (torch 2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread
from typing import Any

import torch
import torch._dynamo.utils
import torch._inductor.config
from torch import fx

from .probe import attributes, deferred

_READ = "2.11 to 2.13"
attributes("torch._inductor.config", _READ, "freezing keep_output_stride triton")
_compile_fx = deferred("torch._inductor.compile_fx.compile_fx", _READ)
_maybe_warm_pool = deferred("torch._inductor.async_compile.maybe_warm_pool", _READ)
_torch_key = deferred("torch._inductor.codecache.torch_key", _READ)
_triton_compat = deferred("torch._inductor.runtime.triton_compat", _READ)


def start_inductor_workers() -> None:
    """Begins to start the processes that compile Triton kernels in parallel, if they are not (2.11 to 2.13).

    They take seconds to start; until they have, Inductor compiles kernels itself, one after the other.
    """
    _maybe_warm_pool()()


def prepare_inductor(device: torch.device) -> Callable[[], None]:
    """Begins, beside other work, what a first compile by Inductor waits for; returns what waits for it (2.11 to 2.13).

    The keys of its caches hash the sources of torch and Triton, hundreds of megabytes, mostly without Python's lock.
    """
    try:
        if device.type == "cuda":
            start_inductor_workers()
        # Here and not in the thread: of modules that import each other, two threads could see some half made.
        _compile_fx()
        torch_key, triton_compat = _torch_key(), _triton_compat()
    except Exception:  # an import may raise anything: it fails again, and is counted, where a piece is compiled
        return lambda: None

    def hash_sources() -> None:
        # As above: Inductor asks for the keys again.
        with suppress(Exception):
            torch_key()
            if triton_compat.HAS_TRITON:
                triton_compat.triton_key()

    thread = Thread(target=hash_sources, name="pcg-hash-sources", daemon=True)
    thread.start()
    return thread.join


def compile_with_inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compiles one graph with Inductor, its own CUDA graphs off (2.11 to 2.13)."""
    compile_fx: Callable[..., Callable[..., Any]] = _compile_fx()
    return compile_fx(gm, list(inputs), config_patches={"triton.cudagraphs": False, "keep_output_stride": True})


def inductor_output(function: Callable[..., Any]) -> str | None:
    """The path of the code that Inductor wrote for what it compiled; None where it compiled nothing (2.11 to 2.13).

    The compiled graph lies in the closures of the wrappers around it.
    """
    waiting: list[Any] = [function]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop(0)
        if id(found) in seen:
            continue
        seen.add(id(found))
        call = getattr(found, "current_callable", None)
        if call is not None:
            code = getattr(getattr(call, "__func__", call), "__code__", None)
            return None if code is None else str(code.co_filename)
        waiting.append(getattr(found, "__wrapped__", None))
        for cell in getattr(found, "__closure__", None) or ():
            with suppress(ValueError):
                waiting.append(cell.cell_contents)
    return None


def inductor_misses() -> int:
    """How many graphs Inductor has compiled in this process since its caches had none of them (2.11 to 2.13)."""
    return int(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"])


def compile_all_with_inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """What ``backend="inductor"`` would do with a graph, gradients included (2.11 to 2.13)."""
    compile_fx: Callable[..., Callable[..., Any]] = _compile_fx()
    return compile_fx(gm, list(inputs))


def freezes_weights() -> bool:
    """Whether Inductor is to make constants of weights (2.11 to 2.13)."""
    return bool(torch._inductor.config.freezing) and not torch.is_grad_enabled()
