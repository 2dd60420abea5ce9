"""A saved program in a process that has loaded it."""

from __future__ import annotations

import builtins
import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

import torch

from .argument_form import ArgumentForm, Binder
from .fast_calls import OTHER, FastCall
from .fx.graph_data import decode, decode_expression, graph_from_data, import_name
from .lora.adapted import routers_of
from .lora.packed import renumbered
from .registry import RUNNING_CALL, RunningCall, runtimes_of_caller
from .torch_compat.dynamo_calls import GlobalState, function_of_code
from .torch_compat.inductor import inductor_misses
from .torch_compat.modules import calls_hooks, completed_call
from .torch_compat.restored_traces import RestoredTrace
from .weights import Weights

__all__ = ["ModuleCalls", "SavedProgram"]


class SavedProgram(FastCall):
    """Calls of the form that was saved; the program is made at the first of them, whose step knows the cache."""

    def __init__(
        self,
        content: Mapping[str, Any],
        code: CodeType,
        function: Any,
        compile_graph: Callable[..., Callable[..., Any]],
        module: torch.nn.Module | None,
        others: Sequence[torch.nn.Module],
    ) -> None:
        self.content = content
        self.trace = RestoredTrace([tuple(symbol) for symbol in content["symbols"]])
        self.conditions = [decode_expression(one, self.trace.symbols) for one in content["conditions"]]
        fields = {name: decode(value, {}) for name, value in content["form"].items()}
        form = ArgumentForm(**fields, symbols=tuple(self.trace.symbols.values()), conditions=self.conditions)
        weights = Weights.at(content["weights"] or [], module, others)
        weights.of(module)
        roots = [*([module] if module is not None else []), *others]
        self._pools = dict(zip(content["pools"], (router.id for router in routers_of(*roots)), strict=True))
        names = {name: _imported(value) for name, value in content["globals"].items() if value}
        self._graph = next(name for name, value in content["globals"].items() if not value)
        names[self._graph] = self._run_graph
        ready = function_of_code(code, function, names)
        super().__init__(
            ready, Binder(function, module is not None), form, GlobalState(tuple(content["state"])), weights
        )
        self._lock = threading.Lock()
        self._run: Callable[..., Any] | None = None
        self._compile = compile_graph

    def _run_graph(self, *args: Any) -> Any:
        """What Dynamo's code calls for the graph."""
        run = self._run
        if run is None:
            with self._lock:
                if self._run is None:
                    self._run = self._made()
                run = self._run
        return run(*args)

    def _made(self) -> Callable[..., Any]:
        content, trace = self.content, self.trace
        gm = graph_from_data(content["graph"])
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.pcg.lora):
            node.args = (*node.args[:-1], renumbered(node.args[-1], self._pools))
        inputs = []
        for node, data in zip(gm.graph.find_nodes(op="placeholder"), content["inputs"], strict=True):
            if len(data) == 2:
                value, static = trace.number(decode_expression(data[0], trace.symbols)), False
            else:
                shape, strides = ([decode_expression(n, trace.symbols) for n in ns] for ns in data[:2])
                offset, static = decode_expression(data[2], trace.symbols), data[5]
                kind = {"dtype": decode(data[3], {}), "device": decode(data[4], {})}
                value = trace.tensor(shape, strides, offset, **kind)
            trace.describe(node, value, data[-1], static)
            inputs.append(value)
        layouts = [decode_expression(one, trace.symbols) for one in content["layouts"]]
        before = inductor_misses()
        with trace.running(self.conditions, layouts):
            run = self._compile(gm, inputs, weights=self.weights)
        again = inductor_misses() - before
        if again and content["options"]["compiler"] == "inductor":
            running = RUNNING_CALL.get()
            for runtime in runtimes_of_caller(running.caller if running is not None else None):
                runtime.shared.counters.fall_back(f"Inductor compiled {again} pieces of a saved program again")
        return run


def _imported(value: Sequence[str]) -> Any:
    """A module, or what a module has under a name."""
    kind, name = value
    if kind == "module":
        return importlib.import_module(name)
    if kind == "builtins":
        return vars(builtins)
    return import_name(name)


class ModuleCalls:
    """The forward of what torch.compile made of a module, with a saved program ahead of Dynamo."""

    def __init__(
        self, program: SavedProgram, model: torch.nn.Module, owner: Any, otherwise: Callable[..., Any]
    ) -> None:
        self.program, self.model, self.owner, self.otherwise = program, model, owner, otherwise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not calls_hooks(self.model):
            complete, more = completed_call(self.model, args, kwargs)
            call = RunningCall(self.owner, self.owner, self.model, True)
            result = self.program.call(call, complete, more, complete)
            if result is not OTHER:
                return result
        return self.otherwise(*args, **kwargs)
