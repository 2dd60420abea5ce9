"""Calls that look like one that was traced reach their graph without Dynamo.

Note [Fast calls]
Dynamo's code for a function, called as a plain function, does what a call behind ``torch.compile`` does, except that
nobody evaluates guards and looks the code up. A :class:`FastCall` holds such code and what it may be used for: the
:class:`ArgumentForm` of the traced call, the :class:`GlobalState` of torch, and the :class:`Weights` of the modules. A
call that differs in any of these takes the way through Dynamo, which decides. So does the first call on another module:
its weights are known once Dynamo's guards have let a graph run for it. The graph's runtime compares weights once it has
launched the loads of the arguments, and raises :class:`WeightsChanged` ahead of everything else. The form may be
stricter than Dynamo's guards on arguments, and is never looser. Not compared: what ``guards="inputs"`` does not see,
and Python attributes of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch

from .argument_form import ArgumentForm, Binder, NoFastCall
from .registry import RUNNING_CALL, RunningCall
from .torch_compat.dynamo_calls import GlobalState, function_of_code
from .torch_compat.fake_tensors import FakeTensorMode
from .weights import Weights, WeightsChanged

__all__ = ["OTHER", "FastCall", "TracedGraph"]

#: The result of a call that goes through Dynamo.
OTHER = object()


@dataclass
class TracedGraph:
    """What is known of a graph's trace beside the graph: for calls without Dynamo, and for saving it.

    Attributes:
        runtime: what runs it, and knows the graph itself.
        seen: what Dynamo has looked at of the arguments, by name: fake tensors and symbolic numbers.
        codes: the code of all functions that the trace went through.
        layouts: conditions that hold at every bucket and are no guards; see ``layouts_apart``.
        weights: where the tensors lie that are attributes of Dynamo's graph; None where it has weights as inputs.
        original, code: the function's code, and what Dynamo made of it.
        form: of the traced call's arguments; or why calls cannot do without Dynamo.
    """

    runtime: Any
    seen: dict[str, Any]
    codes: list[CodeType]
    fake_mode: FakeTensorMode
    layouts: Sequence[Any]
    weights: Weights | None = None
    original: CodeType | None = None
    code: CodeType | None = None
    form: ArgumentForm | NoFastCall = field(default_factory=lambda: NoFastCall("Dynamo made no code for the function"))
    state: GlobalState | None = None

    def complete(self, code: CodeType, compiled: CodeType, given: Mapping[str, Any], conditions: Sequence[Any]) -> None:
        """Notes what Dynamo made of the function's code."""
        self.original, self.code, self.state = code, compiled, GlobalState()
        try:
            self.form = ArgumentForm.of(code, given, self.seen, conditions)
        except NoFastCall as reason:
            self.form = reason
        self.seen = {}


class FastCall:
    """Calls of one form, on modules that were called through Dynamo before; see Note [Fast calls].

    Attributes:
        function: Dynamo's code as a function, or bound method.
        weights: where the graph's attributes lie.
    """

    def __init__(
        self, function: Callable[..., Any], binder: Binder, form: ArgumentForm, state: GlobalState, weights: Weights
    ) -> None:
        self.function, self.binder, self.form, self.state, self.weights = function, binder, form, state, weights

    @classmethod
    def of(cls, function: Any, graph: TracedGraph | None, module: torch.nn.Module | None) -> FastCall:
        """What serves calls like one that has just been traced.

        Args:
            function: the function or bound method that Dynamo traced.
            graph: what came of the trace; None where the call was more than a graph.
            module: what it was called on.

        Raises:
            NoFastCall: only Dynamo can serve them.
        """
        if graph is None:
            raise NoFastCall("the call is no single graph that is captured")
        if isinstance(graph.form, NoFastCall):
            raise graph.form
        assert graph.code is not None and graph.state is not None
        if not graph.state.holds():
            raise NoFastCall("torch.device(), a mode or a transform is around the call that was traced")
        if graph.weights is None:
            raise NoFastCall("its code fetches weights, from where they cannot be looked up once")
        binder = Binder(function, module is not None)
        if binder.names != graph.form.parameters:
            raise NoFastCall("torch wraps it, as torch.no_grad does: Dynamo traces a function inside")
        return cls(function_of_code(graph.code, function, {}), binder, graph.form, graph.state, graph.weights)

    def call(self, call: RunningCall, args: tuple[Any, ...], kwargs: dict[str, Any], given: tuple[Any, ...]) -> Any:
        """The result of a call, or ``OTHER`` for one that it cannot serve, of which nothing has run.

        Weights are compared inside the graph's runtime, once the device is at work on the arguments.

        Args:
            call: whose it is. args, kwargs: its arguments. given: ``args`` without the module.
        """
        if not self.state.holds():
            return OTHER
        values = self.binder(given, kwargs)
        if values is None or not self.form.accepts(values):
            return OTHER
        token = RUNNING_CALL.set(call)
        try:
            return self.function(*args, **kwargs)
        except WeightsChanged as change:
            if change.moved is not self.weights:
                raise
            return OTHER
        finally:
            RUNNING_CALL.reset(token)
