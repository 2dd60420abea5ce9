"""Programs in files: what Dynamo and Inductor made of a model, for another process on a machine of the same kind.

Note [Saved programs]
A file is a zip archive of JSON, of the code that Dynamo wrote, and of Inductor's artifacts as
``torch.compiler.save_cache_artifacts`` gives them. The JSON holds Dynamo's graph node by node, the conditions on its
sizes and the form of the arguments (see Note [Fast calls]). pcg's own passes run again on that graph: they prove what
is safe, and take a fraction of what tracing and compiling take. CUDA graphs are captured again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import marshal
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch

from .argument_form import ArgumentForm, NoFastCall
from .backend import compile_graph
from .counters import Counters
from .errors import OptionsError, ProgramError, message
from .fast_calls import TracedGraph
from .fx.graph_data import CannotSave, encode, encode_expression, graph_to_data
from .loaded_programs import ModuleCalls, SavedProgram
from .lora.adapted import routers_of
from .options import Options, OptionsDict
from .piecewise import CompiledFunction, decorate, modules_of
from .program_facts import check_sources, compare, device_data, different, model_data, sources_data, unfit, versions
from .registry import graphs_of
from .torch_compat.dynamo_calls import globals_of_code, name_of_source
from .torch_compat.dynamo_wrappers import wrapper_of
from .torch_compat.restored_traces import source_of_symbol, symbol_of
from .weights import WeightsChanged

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["load", "save"]

_FORMAT = 2
_PARTS = ("program.json", "code", "inductor", "digest")
#: What reading a file raises that is no program, or not all of one.
_DAMAGE = (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError, NotImplementedError)
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
    graphs = graphs_of(compiled)
    function, model, about = _compiled_part(compiled)
    traced = _only_graph(graphs)
    try:
        content, code = _content(traced, function, model, about)
    except CannotSave as what:
        raise _refused(str(what)) from what
    artifacts = b""
    if content["options"]["compiler"] == "inductor":
        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            raise _refused("what Inductor compiled: its caches are off, and it keeps nothing that could be saved")
        artifacts = saved[0]
    beside = f"{os.fspath(path)}.{os.getpid()}"
    parts = (json.dumps(content).encode(), marshal.dumps(code), artifacts)
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as file:
        for name, part in zip(_PARTS, (*parts, _digest(parts)), strict=True):
            file.writestr(name, part)
    os.replace(beside, path)


def _digest(parts: Sequence[bytes]) -> bytes:
    """What tells a file that was changed after it was written; it proves nothing about who wrote it."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


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
        about = {
            "way": "piecewise",
            "guards": decorated.guards,
            "dynamic": dynamic,
            "name": decorated.function.__name__,
        }
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


def _only_graph(graphs: Sequence[tuple[Counters, Any]]) -> TracedGraph:
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
        whose = f"{plain.__qualname__} is torch's own code, or wrapped by it"
        raise CannotSave(f"{whose}; call it inside your own function or module")
    gm, plan = runtime.context.source, runtime.plan
    values = {spec.position: spec for spec in plan.inputs if spec.position >= 0}
    placeholders = gm.graph.find_nodes(op="placeholder")
    others = traced.weights.others if traced.weights is not None else ()
    content = {
        "format": _FORMAT,
        "versions": versions(),
        "device": device_data(runtime.shared.device),
        **about,
        "sources": sources_data(traced.codes),
        "model": model_data(_roots(model, others), function),
        "graph": graph_to_data(gm),
        "inputs": [_input_data(node, values[i], traced) for i, node in enumerate(placeholders)],
        "symbols": [[s.name, *source_of_symbol(traced.fake_mode, s), bool(s.is_positive)] for s in form.symbols],
        "conditions": [encode_expression(condition) for condition in form.conditions],
        "layouts": [encode_expression(condition) for condition in traced.layouts],
        "form": _form_data(form),
        "state": list(traced.state.saved()),
        "weights": traced.weights.places if traced.weights is not None else None,
        "pools": [router.id for router in routers_of(*_roots(model, others))],
        "globals": globals_of_code(traced.code, plain.__globals__, [code.co_names for code in traced.codes]),
    }
    return content, traced.code


def _roots(model: torch.nn.Module | None, others: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    return [*([model] if model is not None else []), *others]


def _input_data(node: Any, spec: Any, traced: TracedGraph) -> list[Any]:
    value, name = spec.value, name_of_source(getattr(node, "_dynamo_source", None))
    if isinstance(value, torch.SymInt) or type(value) is int:
        return [encode_expression(symbol_of(traced.fake_mode, value)), name]
    if not isinstance(value, torch.Tensor):
        raise CannotSave(f"{node.name}, a {type(value).__name__} that changes")
    sizes = [[encode_expression(symbol_of(traced.fake_mode, n)) for n in ns] for ns in (value.shape, value.stride())]
    offset = encode_expression(symbol_of(traced.fake_mode, value.storage_offset()))
    return [*sizes, offset, encode(value.dtype), encode(value.device), spec.kind == "static", name]


def _form_data(form: ArgumentForm) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(form) if field.name not in ("symbols", "conditions")]
    return {name: encode(getattr(form, name)) for name in names}


def load(model: Any, path: str | os.PathLike[str], **options: Unpack[OptionsDict]) -> Any:
    """Reads a program that :func:`save` wrote for the same model, without Dynamo and Inductor.

    CUDA graphs are captured again.

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
    saved = Options(**content["options"])
    _check_options(saved, options, path)
    device = content["device"]
    if device["type"] == "cuda":
        if not torch.cuda.is_available():
            raise different("the device", device["name"], "a CPU", path)
        compare("the GPU", device, device_data(torch.device("cuda", torch.cuda.current_device())), path)
    check_sources(content["sources"], path)
    function, module = _function_of(model, content)
    decorated: CompiledFunction | None = getattr(function, "__pcg_function__", None)
    plain = decorated.own if decorated is not None else function
    others = modules_of(plain) if content["weights"] is not None else ()
    here, there = model_data(_roots(module, others), plain), content["model"]
    for name in (*there, *here):
        compare(name, there.get(name, "missing"), here.get(name, "missing"), path)
    if artifacts:
        torch.compiler.load_cache_artifacts(artifacts)

    def program_of(function: Any, owner: object) -> SavedProgram:
        compile_it = partial(compile_graph, options=saved, owner=owner)
        try:
            return SavedProgram(content, code, function, compile_it, module, others)
        except (WeightsChanged, ImportError) as error:
            raise unfit(str(error), path) from error

    if content["way"] == "torch.compile":
        compiled: Any = torch.compile(model, backend="pcg", options=content["options"], dynamic=content["dynamic"])
        owner = wrapper_of(compiled)
        program = program_of(function, owner)
        compiled.forward = ModuleCalls(program, model, owner, compiled.forward)
        return compiled
    if decorated is not None:
        wrapper, mine = function, decorated.options
        compare("the options of the decorated function", _options_data(saved), _options_data(mine), path)
    else:
        dynamic = content["dynamic"]
        if dynamic is not None:
            dynamic = {name: tuple(dims) if isinstance(dims, list) else dims for name, dims in dynamic.items()}
        wrapper = decorate(function, dynamic, content["guards"], saved)
        made: CompiledFunction = wrapper.__pcg_function__
        decorated = made
    program = program_of(decorated.own, decorated.backend)
    decorated.fast = (program, *decorated.fast)
    return wrapper


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], CodeType, bytes]:
    try:
        with zipfile.ZipFile(path) as file:
            *parts, digest = map(file.read, _PARTS)
            if _digest(parts) != digest:
                raise ValueError("it was changed after it was written")
            content = json.loads(parts[0])
            if content["format"] != _FORMAT:
                raise different("the format of programs", content["format"], _FORMAT, path)
            for name, number in versions().items():
                compare(f"the version of {name}", content["versions"].get(name), number, path)
            return content, marshal.loads(parts[1]), parts[2]
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise ProgramError(
            message(
                f"{os.fspath(path)} is no saved program, or is damaged ({type(error).__name__}: {error})",
                why=_TRUST,
                cure="Write it again: pcg.save(compiled, path)",
            )
        ) from error


def _check_options(saved: Options, wanted: Mapping[str, Any], path: Any) -> None:
    try:
        parsed = Options.parse(wanted)
    except OptionsError as error:
        raise ProgramError(str(error)) from error
    for name in wanted:
        compare(f"the option {name!r}", getattr(saved, name), getattr(parsed, name), path)


def _function_of(model: Any, content: Mapping[str, Any]) -> tuple[Any, torch.nn.Module | None]:
    """What was compiled of a model."""
    module = model if isinstance(model, torch.nn.Module) else None
    function: Any = getattr(model, content["name"]) if module is not None else model
    if not callable(function):
        raise ProgramError(f"{model!r} is neither a module nor a function: pass what was compiled")
    owner = getattr(function, "__self__", None)
    return function, module if module is not None or not isinstance(owner, torch.nn.Module) else owner
