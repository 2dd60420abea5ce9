"""@piecewise: a forward, or a plain function, compiled for all sizes at its first call."""

from __future__ import annotations

import functools
import inspect
import logging
import types
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch.utils._pytree import tree_leaves

from .argument_form import NoFastCall
from .backend import compile_graph
from .calls import Call, Watch
from .errors import OptionsError, message
from .fast_calls import OTHER, FastCall
from .options import Options, OptionsDict
from .plain_errors import noted, place_of_error, why_untraceable
from .registry import RunningCall, reset_backend
from .torch_compat.dynamo_graphs import trace_failed
from .torch_compat.dynamo_traces import Marks, compile_for_all_sizes
from .torch_compat.dynamo_wrappers import inline_when_traced
from .torch_compat.guards import inputs_only
from .torch_compat.modules import completed_call
from .weights import WeightsChanged

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CompiledFunction", "decorate", "modules_of", "piecewise"]

_LOG = logging.getLogger("pcg_compile")
_F = TypeVar("_F", bound=Callable[..., Any])
Dynamic = Mapping[str, int | tuple[int, ...]]


class _Backend:
    """The backend of one decorated function: stats and reset find its graphs by it."""

    watched = True

    def __init__(self, options: Options, compiled: CompiledFunction) -> None:
        self.options = options
        self._compiled = weakref.ref(compiled)

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        return compile_graph(gm, example_inputs, self.options, self)

    def __repr__(self) -> str:
        return "pcg"

    def module(self) -> torch.nn.Module | None:
        """Whose bound method was decorated."""
        compiled = self._compiled()
        return compiled.bound if compiled is not None else None

    def reset(self) -> None:
        """Reached by ``torch.compiler.reset()``."""
        compiled = self._compiled()
        if compiled is not None:
            compiled.fast = ()
        reset_backend(self)


class CompiledFunction:
    """A decorated function: it owns its graphs, and each of its calls runs one of them or is counted.

    Attributes:
        fast: with ``guards="inputs"``, what calls need no Dynamo for; see Note [Fast calls].
        slow: why the last traced call was not added to these.
    """

    def __init__(
        self,
        function: Any,
        options: Options,
        guards: str,
        dynamic: Dynamic | None,
        mark: Callable[[tuple[Any, ...], dict[str, Any]], Marks],
    ) -> None:
        self.function, self.options, self.guards = function, options, guards
        self.dynamic, self.mark = dynamic, mark
        on = getattr(function, "__self__", None)
        self.bound = on if isinstance(on, torch.nn.Module) else None
        self.completes = self.bound is not None and function.__name__ == "forward"
        self.backend = _Backend(options, self)
        self.watch = Watch(self.backend, options, whole=True)
        self.generator = _why_generator(function)
        self.fast: tuple[FastCall, ...] = ()
        self.slow: str | None = None
        self._start()

    def _start(self) -> None:
        """Begins without any graph, with code of its own that Dynamo has not seen."""
        self.fast = ()
        self.own = _with_own_code(self.function)
        # A function that is not one module's may be called on another one, whose attributes only Dynamo can compare.
        filtered = self.guards == "inputs" and self.bound is not None
        extra: Any = {"options": {"guard_filter_fn": inputs_only}} if filtered else {}
        self.compiled: Any = torch.compile(self.own, backend=self.backend, fullgraph=self.options.strict, **extra)
        self.watch.modules = modules_of(self.function)
        self.references = _references(self.function)
        # Under a signature that hides its code, weights could not be told from what code computes.
        self.watch.free_tensors = self.guards == "inputs" and self.own is not self.function

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the function."""
        module, rest = self.bound, args
        if self.completes:
            args, kwargs = completed_call(self.bound, args, kwargs)  # type: ignore[arg-type]
            rest = args
        elif module is None and args and isinstance(args[0], torch.nn.Module):
            # The module that a method is called on; a plain function's first argument may be one just as well.
            module, rest = args[0], args[1:]
        if any(_looked_up(look) is not module for look, module in self.references):
            self._start_over("a module that it refers to has been replaced")
        if self.fast:
            call = RunningCall(self.backend, module if module is not None else self.backend, module, True)
            for fast in self.fast:
                result = fast.call(call, args, kwargs, rest)
                if result is not OTHER:
                    return result
        return self._through_dynamo(module, args, kwargs, True)

    def _through_dynamo(
        self, module: torch.nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any], show_rows: bool
    ) -> Any:
        self._follow_weights(module)
        running = self.watch.begin(module, show_rows, module)
        untraceable: Exception | None = None
        try:
            if self.generator:
                running.counted = True
                self.watch.fall_back(*self.generator)
            with compile_for_all_sizes(lambda: self.mark(args, kwargs)):
                result = self.compiled(*args, **kwargs)
            self._learn(running)
            return result
        except Exception as error:
            if isinstance(error, WeightsChanged) and not running.graphs:
                # Dynamo's guards let the module pass, whose weights lie elsewhere; nothing has run.
                self._start_over(error)
            elif running.without_attributes:
                self.watch.free_tensors = False
            elif running.traces > 1 or running.graphs:
                raise
            # Nothing of the call has run. Shown more rows than there are, a trace may fail where the call is right.
            elif running.shown is not None:
                show_rows = False
            elif trace_failed(error):
                untraceable = error
            else:
                raise
            running.forget()
        finally:
            self.watch.end(running)
        if untraceable is not None:
            return self._eagerly(untraceable, args, kwargs)
        return self._through_dynamo(module, args, kwargs, show_rows)

    def _eagerly(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call that Dynamo cannot trace, counted. Wrong arguments then raise what they raise in eager."""
        fallback = f"Dynamo cannot trace this call, which runs eagerly: {why_untraceable(error)}", place_of_error(error)
        if self.options.strict:
            self.watch.fall_back(*fallback)
        with noted(error):
            result = self.function(*args, **kwargs)
        self.watch.fall_back(*fallback)
        return result

    def _follow_weights(self, module: torch.nn.Module | None) -> None:
        """Starts over where graphs are of modules that have been replaced: Dynamo would not notice."""
        try:
            for fast in self.fast:
                fast.weights.follow(module)
        except WeightsChanged as change:
            self._start_over(change)

    def _start_over(self, why: object) -> None:
        _LOG.warning("%s is traced again: %s", self.function.__qualname__, why)
        self._start()

    def _learn(self, running: Call) -> None:
        """Has later calls like one that was traced do without Dynamo."""
        if self.guards != "inputs" or not running.traces:
            return
        try:
            graph = running.graph if running.traces == running.handed == 1 and not self.watch.left_out else None
            self.fast = (FastCall.of(self.own, graph, running.module), *self.fast)
            self.slow = None
        except NoFastCall as reason:
            self.slow = str(reason)


@overload
def piecewise(function: _F) -> _F: ...
@overload
def piecewise(
    *, dynamic: Dynamic | None = None, guards: Literal["dynamo", "inputs"] = "dynamo", **options: Unpack[OptionsDict]
) -> Callable[[_F], _F]: ...
def piecewise(function: Any = None, *, dynamic: Dynamic | None = None, guards: str = "dynamo", **options: Any) -> Any:
    """Compiles a model's forward, or a plain function, with pieces captured for each bucket.

    Args:
        dynamic: for each argument name, the dimension (or dimensions) whose size changes from call to call. The
            first call then compiles for all sizes, 1 included; a branch on the size becomes a guard. Without it,
            the first dimension of every tensor argument, but for a single row beside tensors of more.
        guards: "dynamo" has Dynamo evaluate all of its guards at each call. With "inputs" a call like one that was
            traced needs no Dynamo: compared are arguments, grad mode, autocast and the like, training flags, and
            whether the modules' children, parameters and buffers are the same objects; the first call on another
            module evaluates all guards. It no longer sees: other attributes of modules that changed later (numbers,
            flags, lists, hooks, the class), attributes of tensors, globals and closure variables that are no modules,
            patched functions, and configuration of torch. Parameter addresses are checked either way.
        options: see :class:`pcg_compile.options.Options`.

    Raises:
        OptionsError: an unknown option or a bad value; a name in ``dynamic`` that is no parameter, at the first call a
            dimension that the argument lacks; bad ``guards``.
    """
    parsed = Options.parse(options)
    if guards not in ("dynamo", "inputs"):
        raise OptionsError(
            message(f"bad value for guards: {guards!r}", why="Allowed: 'dynamo' or 'inputs'.",
                    cure='Write: @pcg.piecewise(guards="inputs")')
        )  # fmt: skip
    if function is not None:
        return decorate(function, dynamic, guards, parsed)
    return lambda f: decorate(f, dynamic, guards, parsed)


def decorate(function: Any, dynamic: Dynamic | None, guards: str, options: Options) -> Any:
    signature = inspect.signature(function)
    if dynamic is not None and not isinstance(dynamic, Mapping):
        raise OptionsError(
            message(f"dynamic is {dynamic!r}", why="Allowed: a dict of argument names and dimensions.",
                    cure=f'Write: @pcg.piecewise(dynamic={{"{next(iter(signature.parameters), "x")}": 0}})')
        )  # fmt: skip
    for name, dims in (dynamic or {}).items():
        if name not in signature.parameters:
            raise OptionsError(
                message(f"dynamic names {name!r}, which {function.__qualname__} does not take",
                        why=f"It takes: {', '.join(signature.parameters)}.",
                        cure=f'Write: @pcg.piecewise(dynamic={{"{next(iter(signature.parameters), "x")}": 0}})')
            )  # fmt: skip
        if not all(
            isinstance(d, int) and not isinstance(d, bool) for d in (dims if isinstance(dims, tuple) else (dims,))
        ):
            raise OptionsError(
                message(f"dynamic[{name!r}] is {dims!r}", why="Allowed: a dimension, or a tuple of dimensions.",
                        cure=f'Write: @pcg.piecewise(dynamic={{"{name}": 0}})')
            )  # fmt: skip
    compiled = CompiledFunction(function, options, guards, dynamic, lambda args, kwargs: mark(args, kwargs))

    def mark(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Marks:
        arguments = signature.bind(*args, **kwargs).arguments
        if dynamic is None:
            tensors = [value for value in _tensors(arguments) if value.dim() > 0]
            # Beside tensors of more rows, one row is broadcast rather than a single token.
            several = [value for value in tensors if value.shape[0] != 1]
            wanted: list[tuple[torch.Tensor, tuple[int, ...]]] = [(value, (0,)) for value in several or tensors]
        else:
            wanted = []
            for name, dims in dynamic.items():
                given, several_dims = arguments.get(name), dims if isinstance(dims, tuple) else (dims,)
                if isinstance(given, torch.Tensor):
                    _check_dims(name, given, several_dims)
                for value in _tensors(given):
                    # A container may hold scalars beside what has the dimension.
                    wanted.append((value, tuple(d for d in several_dims if -value.dim() <= d < value.dim())))
        # What was named must be dynamic, or the user is told; what was not may turn out to be fixed.
        return [(value, [dim % value.dim() for dim in dims], dynamic is not None) for value, dims in wanted]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return compiled.call(args, kwargs)

    wrapper.__pcg_owner__ = compiled.backend  # type: ignore[attr-defined]
    wrapper.__pcg_function__ = compiled  # type: ignore[attr-defined]
    inline_when_traced(wrapper, function)
    return wrapper


def _with_own_code(function: Any) -> Any:
    """The same function with code of its own: Dynamo keeps graphs, and counts them, by code.

    Forwards of several models of one class would share one limit on recompilations.
    """
    plain = getattr(function, "__func__", function)
    if not isinstance(plain, types.FunctionType) or hasattr(plain, "_torchdynamo_inline"):
        return function
    code = plain.__code__.replace()
    own = types.FunctionType(code, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
    own.__kwdefaults__, own.__qualname__, own.__module__ = plain.__kwdefaults__, plain.__qualname__, plain.__module__
    own.__dict__.update(plain.__dict__)
    return types.MethodType(own, function.__self__) if inspect.ismethod(function) else own


def modules_of(function: Any) -> tuple[torch.nn.Module, ...]:
    """The modules that a function refers to, other than by its arguments."""
    return tuple({id(module): module for _, module in _references(function)}.values())


def _references(function: Any) -> list[tuple[Callable[[], Any], torch.nn.Module]]:
    """The modules in a function's globals and closure, and what looks each of them up again."""
    plain = getattr(function, "__func__", function)
    code = getattr(plain, "__code__", None)
    if code is None:
        return []
    found = [functools.partial(plain.__globals__.get, name) for name in code.co_names]
    found += [functools.partial(getattr, cell, "cell_contents", None) for cell in plain.__closure__ or ()]
    return [(look, value) for look in found if isinstance(value := _looked_up(look), torch.nn.Module)]


def _looked_up(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except ValueError:  # an empty cell
        return None


def _why_generator(function: Any) -> tuple[str, str] | None:
    """Why Dynamo does not look at a function at all, and its place."""
    if not (inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function)):
        return None
    code = inspect.unwrap(function).__code__
    kind = "generator" if inspect.isgeneratorfunction(function) else "coroutine"
    return f"Dynamo does not trace a {kind}: it runs eagerly", f"{code.co_filename}:{code.co_firstlineno}"


def _check_dims(name: str, value: torch.Tensor, dims: tuple[int, ...]) -> None:
    for dim in dims:
        if not -value.dim() <= dim < value.dim():
            raise OptionsError(
                message(f"dynamic[{name!r}] names dimension {dim} of a tensor of {value.dim()} dimensions",
                        why=f"{name} has the shape {list(value.shape)}.",
                        cure=f'Write: @pcg.piecewise(dynamic={{"{name}": 0}})')
            )  # fmt: skip


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.nn.Module):
        return []
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
