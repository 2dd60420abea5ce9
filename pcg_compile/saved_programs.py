"""Programs in files: what Dynamo and Inductor made of a model, for another process on a machine of the same kind.

Note [Saved programs]
A file is a zip archive of JSON, of the code that Dynamo wrote, and of Inductor's artifacts as
``torch.compiler.save_cache_artifacts`` gives them. The JSON holds Dynamo's graph node by node, the conditions on its
sizes and the form of the arguments (see Note [Fast calls]). pcg's own passes run again on that graph: they prove what
is safe, and take a fraction of what tracing and compiling take. Captured graphs are made anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import linecache
import marshal
import os
import platform
import sys
import sysconfig
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, ModuleType
from typing import Any

import torch

from .backend import compile_graph
from .errors import OptionsError, ProgramError, message
from .fast_calls import ArgumentForm, Binder, FastCall, NoFastCall, Product, TracedGraph, Weights, WeightsChanged, named_constant
from .fx.graph_data import (
    CannotSave,
    decode,
    decode_expression,
    encode,
    encode_expression,
    graph_from_data,
    graph_to_data,
    import_name,
)
from .options import Options
from .piecewise import CompiledFunction, decorate
from .registry import RUNNING_CALL, RunningCall, graphs_of, runtimes_of_caller
from .torch_compat.dynamo_calls import GlobalState, function_of_code, globals_of_code
from .torch_compat.dynamo_wrappers import wrapper_of

from .torch_compat.inductor import inductor_misses
from .torch_compat.modules import calls_hooks, completed_call
from .torch_compat.restored_traces import RestoredTrace, source_of_symbol, symbol_of
from .version import __version__

__all__ = ["load", "save"]

_FORMAT = 1
_TORCH, _OWN = (os.path.dirname(module) + os.sep for module in (torch.__file__, __file__))
_PYTHON = sysconfig.get_path("stdlib") + os.sep
_TRUST = "A program holds code: load only files that you trust."


def save(compiled: Any, path: str | os.PathLike[str]) -> None:
    """Writes what a model was compiled to into a file that :func:`load` reads in another process.

    Call it after a warm-up or a first step. The file holds no weights.

    Args:
        compiled: what ``torch.compile(model, backend="pcg")`` or ``@pcg.piecewise`` gave.
        path: of the file; an existing one is replaced.

    Raises:
        ProgramError: the model was not called yet, has several graphs, or parts that mean nothing in another process;
            the message names them.
        TypeError: ``compiled`` was not compiled by pcg.
    """
    function, model, about = _compiled_part(compiled)
    traced = _only_graph(compiled)
    try:
        content, code = _content(traced, function, model, about)
    except (CannotSave, NoFastCall) as what:
        raise _refused(str(what)) from what
    artifacts = b""
    if content["options"]["compiler"] == "inductor":
        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            raise _refused("what Inductor compiled: its caches are off, and it keeps nothing that could be saved")
        artifacts = saved[0]
    beside = f"{os.fspath(path)}.{os.getpid()}"
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("program.json", json.dumps(content))
        file.writestr("code", marshal.dumps(code))
        file.writestr("inductor", artifacts)
    os.replace(beside, path)


def _refused(what: str) -> ProgramError:
    return ProgramError(
        message(
            f"the program cannot be saved: {what}",
            why="A saved program is one graph, made of what every process finds by its name.",
            cure="Without it, start with warm caches of Inductor: TORCHINDUCTOR_CACHE_DIR.",
        )
    )


def _compiled_part(compiled: Any) -> tuple[Any, torch.nn.Module | None, dict[str, Any]]:
    """The function that Dynamo traced, its module, and how :func:`load` is to compile it."""
    if isinstance(compiled, torch.nn.Module) and hasattr(compiled.forward, "__pcg_function__"):
        compiled = compiled.forward
    decorated: CompiledFunction | None = getattr(compiled, "__pcg_function__", None)
    if decorated is not None:
        module = decorated.bound if decorated.bound is not None else getattr(compiled, "__self__", None)
        dynamic = dict(decorated.dynamic) if decorated.dynamic is not None else None
        about = {"way": "piecewise", "guards": decorated.guards, "dynamic": dynamic, "name": decorated.function.__name__}
        return decorated.own, module, {**about, "options": _options_data(decorated.options)}
    model = getattr(compiled, "_orig_mod", None)
    wrapper: Any = wrapper_of(compiled)
    if model is None or wrapper is None:
        raise _refused("it is neither a decorated function nor what torch.compile made of a module")
    options = Options.parse(wrapper.kwargs.get("options"))
    about = {"way": "torch.compile", "guards": "dynamo", "dynamic": wrapper.dynamic, "name": "forward"}
    return model.forward, model, {**about, "options": _options_data(options)}


def _options_data(options: Options) -> dict[str, Any]:
    found = dataclasses.asdict(options)
    if not isinstance(options.compiler, str):
        raise _refused(f"the compiler {options.compiler!r}, whose results pcg knows nothing of")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _only_graph(compiled: Any) -> TracedGraph:
    graphs = graphs_of(compiled)
    if not graphs:
        raise _refused("the model was not called yet; call it once, or warm it up")
    if len(graphs) > 1:
        raise _refused(f"it has {len(graphs)} graphs; see pcg.explain() for what breaks the graph")
    counters, runtime = graphs[0]
    traced: TracedGraph | None = getattr(runtime, "traced", None)
    if traced is None:
        reasons = [fallback.reason for fallback in counters.snapshot().fallbacks]
        raise _refused(reasons[0] if reasons else "it was loaded from a file itself: copy that file")
    if isinstance(traced.form, NoFastCall):
        raise _refused(str(traced.form))
    return traced


def _content(
    traced: TracedGraph, function: Any, model: torch.nn.Module | None, about: dict[str, Any]
) -> tuple[dict[str, Any], CodeType]:
    runtime, form = traced.runtime, traced.form
    assert isinstance(form, ArgumentForm) and traced.code is not None and traced.state is not None
    plain = getattr(function, "__func__", function)
    if traced.original is None or traced.original.co_code != plain.__code__.co_code:
        raise CannotSave(f"Dynamo traced {traced.original and traced.original.co_name} and not {plain.__name__}")
    gm, plan = runtime.context.source, runtime.plan
    values = {spec.position: spec for spec in plan.inputs if spec.position >= 0}
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = [_input_data(node, values[i], traced) for i, node in enumerate(placeholders)]
    symbols = [symbol for symbol in form.symbols]
    others = _roots(model, traced.weights.others if traced.weights is not None else ())
    names = globals_of_code(traced.code, plain.__globals__, [code.co_names for code in traced.codes])
    content = {
        "format": _FORMAT,
        "versions": _versions(),
        "device": _device_data(runtime.shared.device),
        **about,
        "sources": [_source_data(code) for code in traced.codes if _is_users(code.co_filename)],
        "model": _model_data(others),
        "graph": graph_to_data(gm),
        "inputs": inputs,
        "symbols": [[s.name, *source_of_symbol(traced.fake_mode, s), bool(s.is_positive)] for s in symbols],
        "conditions": [encode_expression(condition) for condition in form.conditions],
        "layouts": [encode_expression(condition) for condition in traced.layouts],
        "form": _form_data(form),
        "state": list(traced.state.saved()),
        "weights": traced.weights.places if traced.weights is not None else None,
        "globals": names,
    }
    return content, traced.code


def _roots(model: torch.nn.Module | None, others: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    return [*([model] if model is not None else []), *others]


def _input_data(node: Any, spec: Any, traced: TracedGraph) -> list[Any]:
    value, source = spec.value, getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    name = str(name() if callable(name) else name)
    if isinstance(value, torch.SymInt) or type(value) is int:
        return [encode_expression(symbol_of(traced.fake_mode, value)), name]
    if not isinstance(value, torch.Tensor):
        raise CannotSave(f"{node.name}, a {type(value).__name__} that changes")
    sizes = [[encode_expression(symbol_of(traced.fake_mode, n)) for n in ns] for ns in (value.shape, value.stride())]
    offset = encode_expression(symbol_of(traced.fake_mode, value.storage_offset()))
    return [*sizes, offset, encode(value.dtype), encode(value.device), spec.kind == "static", name]


def _form_data(form: ArgumentForm) -> dict[str, Any]:
    found = {field.name: getattr(form, field.name) for field in dataclasses.fields(form)}
    del found["symbols"], found["conditions"]
    derived = [[i, d, stride, product.factor, list(product.places)] for i, d, stride, product in form.derived]
    found["constants"] = [(i, {"": named_constant(c)} if named_constant(c) else c) for i, c in form.constants]
    return {name: encode(value) for name, value in found.items() if name != "derived"} | {"derived": derived}


def _form_of(data: Mapping[str, Any], symbols: Sequence[Any], conditions: Sequence[Any]) -> ArgumentForm:
    found = {name: decode(value, {}) for name, value in data.items() if name != "derived"}
    found["constants"] = [(i, import_name(c[""]) if isinstance(c, dict) else c) for i, c in found["constants"]]
    derived = [(i, d, stride, Product(factor, tuple(places))) for i, d, stride, factor, places in data["derived"]]
    return ArgumentForm(**found, derived=derived, symbols=tuple(symbols), conditions=list(conditions))


def _versions() -> dict[str, str]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    python = platform.python_version()
    return {"torch": torch.__version__, "triton": of("triton"), "pcg": __version__, "python": python}


def _device_data(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type}
    return {
        "type": "cuda",
        "name": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
    }


def _is_users(file: str) -> bool:
    """Whether the versions of Python, torch and pcg do not tell what a file holds; generated code has no file."""
    library = file.startswith(_PYTHON) and "-packages" + os.sep not in file
    return not (library or file.startswith((_TORCH, _OWN)) or (file.startswith("<") and not linecache.getlines(file)))


def _source_data(code: CodeType) -> list[Any]:
    module = next((name for name, one in list(sys.modules.items()) if _file_of(one) == code.co_filename), None)
    text = _source_text(code.co_filename, code.co_firstlineno)
    if text is None:
        raise CannotSave(f"the source of {code.co_name} cannot be read, at {code.co_filename}:{code.co_firstlineno}")
    return [module, code.co_filename, code.co_firstlineno, code.co_name, hashlib.sha256(text.encode()).hexdigest()]


def _file_of(module: ModuleType | None) -> str | None:
    return getattr(module, "__file__", None)


def _source_text(path: str, first: int) -> str | None:
    """The lines of the function that begins at a line."""
    lines = linecache.getlines(path)[first - 1 :]
    try:
        return "".join(inspect.getblock(lines)) if lines else None
    except (IndentationError, SyntaxError):
        return None


def _model_data(roots: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The classes of all modules, whether they train, and the form of their parameters and buffers."""
    found: dict[str, Any] = {}
    for i, root in enumerate(roots):
        prefix = f"{i}." if i else ""
        for path, one in root.named_modules():
            found[f"{prefix}{path}" or "the model"] = [type(one).__qualname__, "training" if one.training else "eval"]
            for name, value in (*one._parameters.items(), *one._buffers.items()):
                form = None if value is None else [list(value.shape), str(value.dtype), value.device.type]
                found[f"{prefix}{path}.{name}".lstrip(".")] = form
    return found


def load(model: Any, path: str | os.PathLike[str], **options: Any) -> Any:
    """Reads a program that :func:`save` wrote, for the same model: no Dynamo, no Inductor, captured graphs made anew.

    Returns what ``torch.compile(model, backend="pcg")`` or ``@pcg.piecewise`` gave, with the same options. Calls that
    look like the one that was traced run the program; weights that are replaced or moved are followed. Other calls are
    traced by Dynamo as usual. Until it does, the model's code is taken to be what was saved: attributes, globals,
    closures and patched functions are not compared at each call.

    A program holds code: load only files that you trust.

    Args:
        model: the module, or the function where one was decorated.
        path: of the file.
        options: what the options must be, where that matters to you.

    Raises:
        ProgramError: the file is damaged, or was made for another model, other options, another device, or by other
            versions; the message says what differs.
    """
    content, code, artifacts = _read(path)
    _compare("the file's format", content["format"], _FORMAT, path)
    for name, here in _versions().items():
        _compare(f"the version of {name}", content["versions"].get(name), here, path)
    saved = Options(**content["options"])
    _check_options(saved, options, path)
    device = content["device"]
    if device["type"] == "cuda":
        if not torch.cuda.is_available():
            raise _mismatch("the device", device["name"], "no GPU", path)
        _compare("the GPU", device, _device_data(torch.device("cuda", torch.cuda.current_device())), path)
    _check_sources(content["sources"], path)
    function, module = _function_of(model, content)
    if artifacts:
        torch.compiler.load_cache_artifacts(artifacts)
    if content["way"] == "torch.compile":
        compiled: Any = torch.compile(model, backend="pcg", options=content["options"], dynamic=content["dynamic"])
        program = _program(content, code, function, module, path)
        compiled.forward = _ModuleCalls(program, model, wrapper_of(compiled), saved, compiled.forward)
        return compiled
    if hasattr(function, "__pcg_function__"):
        wrapper = function
        mine = function.__pcg_function__.options
        _compare("the options of the decorated function", _options_data(saved), _options_data(mine), path)
    else:
        dynamic = content["dynamic"]
        if dynamic is not None:
            dynamic = {name: tuple(dims) if isinstance(dims, list) else dims for name, dims in dynamic.items()}
        wrapper = decorate(function, dynamic, content["guards"], saved)
    decorated: CompiledFunction = wrapper.__pcg_function__
    program = _program(content, code, decorated.own, module, path)
    program.compile_with(lambda gm, inputs: compile_graph(gm, inputs, saved, decorated.backend))
    decorated.fast = (program, *decorated.fast)
    return wrapper


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], CodeType, bytes]:
    try:
        with zipfile.ZipFile(path) as file:
            content = json.loads(file.read("program.json"))
            if content["versions"]["python"] != platform.python_version():
                # Its code could not even be read.
                return content, (lambda: None).__code__, b""
            return content, marshal.loads(file.read("code")), file.read("inductor")
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, TypeError, OSError, NotImplementedError) as error:
        raise ProgramError(
            message(
                f"{os.fspath(path)} is no saved program, or is damaged ({type(error).__name__}: {error})",
                why=_TRUST,
                cure="Write it again: pcg.save(compiled, path)",
            )
        ) from error


def _mismatch(what: str, saved: Any, here: Any, path: Any) -> ProgramError:
    return ProgramError(
        message(
            f"{os.fspath(path)} was saved for another case: {what} is {here} here, and was {saved}",
            why="A program is right only for what it was made for.",
            cure="Compile the model as usual, and save it again: pcg.save(compiled, path)",
        )
    )


def _compare(what: str, saved: Any, here: Any, path: Any) -> None:
    if saved != here:
        raise _mismatch(what, saved, here, path)


def _check_options(saved: Options, wanted: Mapping[str, Any], path: Any) -> None:
    try:
        parsed = Options.parse(wanted)
    except OptionsError as error:
        raise ProgramError(str(error)) from error
    for name in wanted:
        _compare(f"the option {name!r}", getattr(saved, name), getattr(parsed, name), path)


def _check_sources(sources: Sequence[Any], path: Any) -> None:
    for module, file, first, name, saved in sources:
        here = _file_of(sys.modules.get(module)) or file
        linecache.checkcache(here)
        text = _source_text(here, first)
        if text is None or hashlib.sha256(text.encode()).hexdigest() != saved:
            raise ProgramError(
                message(
                    f"{os.fspath(path)} was saved for other code: {name} has changed",
                    where=f"{here}:{first}",
                    why="Its graph is what Dynamo made of the code as it was.",
                    cure="Compile the model as usual, and save it again: pcg.save(compiled, path)",
                )
            )


def _function_of(model: Any, content: Mapping[str, Any]) -> tuple[Any, torch.nn.Module | None]:
    """What was compiled of a model."""
    module = model if isinstance(model, torch.nn.Module) else None
    function = getattr(model, content["name"]) if module is not None else model
    if not callable(function):
        raise ProgramError(f"{model!r} is neither a module nor a function: pass what was compiled")
    if module is None and isinstance(getattr(function, "__self__", None), torch.nn.Module):
        module = function.__self__
    return function, module


def _program(
    content: Mapping[str, Any], code: CodeType, function: Any, module: torch.nn.Module | None, path: Any
) -> _SavedProgram:
    decorated: Any = getattr(function, "__pcg_function__", None)
    others = decorated.watch.modules if decorated is not None else ()
    from .piecewise import modules_of

    others = modules_of(function) if content["weights"] is not None else others
    here, saved = _model_data(_roots(module, others)), content["model"]
    for name in (*saved, *here):
        _compare(name, saved.get(name, "missing"), here.get(name, "missing"), path)
    try:
        return _SavedProgram(content, code, function, module, others)
    except (WeightsChanged, KeyError, ValueError, TypeError, ImportError, AttributeError) as error:
        raise ProgramError(
            message(
                f"{os.fspath(path)} cannot be read ({type(error).__name__}: {error})",
                why=_TRUST,
                cure="Write it again: pcg.save(compiled, path)",
            )
        ) from error


class _SavedProgram(FastCall):
    """Calls of the form that was saved; the program is made at the first of them, whose step knows the cache."""

    def __init__(
        self,
        content: Mapping[str, Any],
        code: CodeType,
        function: Any,
        module: torch.nn.Module | None,
        others: Sequence[torch.nn.Module],
    ) -> None:
        self.content = content
        self.trace = RestoredTrace([tuple(symbol) for symbol in content["symbols"]])
        self.conditions = [decode_expression(one, self.trace.symbols) for one in content["conditions"]]
        form = _form_of(content["form"], list(self.trace.symbols.values()), self.conditions)
        weights = Weights.at(content["weights"] or [], others)
        weights.of(module)
        names = {name: import_name_or_module(value) for name, value in content["globals"].items() if value}
        self._graph = next(name for name, value in content["globals"].items() if not value)
        names[self._graph] = self._run_graph
        ready = function_of_code(code, function, names)
        super().__init__(ready, Binder(function, module is not None), form, GlobalState(tuple(content["state"])), weights)
        self._lock = threading.Lock()
        self._run: Callable[..., Any] | None = None
        self._compile: Callable[[Any, list[Any]], Callable[..., Any]] | None = None

    def compile_with(self, compile_graph: Callable[[Any, list[Any]], Callable[..., Any]]) -> None:
        """Sets what makes a program of a graph."""
        self._compile = compile_graph

    def _run_graph(self, *args: Any) -> Any:
        """What Dynamo's code calls for the graph."""
        run = self._run
        if run is None:
            with self._lock:
                if self._run is None:
                    self._run = self._made()
                run = self._run
        if self.content["weights"] is not None:
            running = RUNNING_CALL.get()
            assert running is not None and running.weights is not None
            return run(*args, *running.weights)
        return run(*args)

    def _made(self) -> Callable[..., Any]:
        content, trace = self.content, self.trace
        gm = graph_from_data(content["graph"])
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
        assert self._compile is not None
        with trace.running(self.conditions, layouts):
            run = self._compile(gm, inputs)
        again = inductor_misses() - before
        if again and content["options"]["compiler"] == "inductor":
            running = RUNNING_CALL.get()
            for runtime in runtimes_of_caller(running.caller if running is not None else None):
                runtime.shared.counters.fall_back(f"Inductor compiled {again} pieces of a saved program again")
        return run


def import_name_or_module(value: Sequence[str]) -> Any:
    """A module, or what a module has under a name."""
    kind, name = value
    if kind == "module":
        import importlib

        return importlib.import_module(name)
    if kind == "builtins":
        import builtins

        return vars(builtins)
    return import_name(name)


class _ModuleCalls:
    """The forward of what torch.compile made of a module, with a saved program ahead of Dynamo."""

    def __init__(
        self, program: _SavedProgram, model: torch.nn.Module, owner: Any, options: Options, otherwise: Callable[..., Any]
    ) -> None:
        self.program, self.model, self.owner, self.otherwise = program, model, owner, otherwise
        program.compile_with(lambda gm, inputs: compile_graph(gm, inputs, options, owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not calls_hooks(self.model):
            complete, more = completed_call(self.model, args, kwargs)
            weights = self.program.weights_of(self.model, complete, more)
            if weights is not None:
                token = RUNNING_CALL.set(RunningCall(self.owner, self.owner, self.model, weights))
                try:
                    return self.program.function(*complete, **more)
                finally:
                    RUNNING_CALL.reset(token)
        return self.otherwise(*args, **kwargs)
