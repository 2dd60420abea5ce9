"""The only file that names a private part of torch; each with the versions that it was read in."""

from __future__ import annotations

import atexit
import functools
import math
import operator
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from threading import Thread
from types import CodeType
from typing import Any

import sympy
import torch
import torch._dynamo.convert_frame
import torch._dynamo.eval_frame
import torch._functorch.config
import torch._inductor.config
import torch.fx.experimental._config
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.cache_size import exceeds_recompile_limit
from torch._dynamo.symbolic_convert import TensorifyState
from torch._dynamo.utils import counters
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

__all__ = ["NEEDS_DATA", "FakeTensor", "FakeTensorMode", "fake_mode_of", "python_dispatcher"]

#: What a fake tensor raises where only its data tell what comes next (2.11 to 2.13).
NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException)


def fake_mode_of(inputs: Sequence[Any]) -> FakeTensorMode:
    """The fake mode of Dynamo's trace (2.11 to 2.13), or a fresh one that allows real tensors."""
    mode = detect_fake_mode(list(inputs))
    return mode if mode is not None else FakeTensorMode(allow_non_fake_inputs=True)


def fake_inputs(inputs: Sequence[Any]) -> list[Any]:
    """Fake values of a backend's real inputs, with the symbols that Dynamo gave their sizes (2.11 to 2.13).

    Dynamo's own fake values are not used: in-place changes of shape during the trace have reached them.
    """
    mode = fake_mode_of(inputs)
    context = TracingContext.try_get()
    fakes: list[Any] = []
    for value in inputs:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            fakes.append(value)
            continue
        symbolic = context.tensor_to_context.get(value) if context is not None else None
        if symbolic is None:
            fakes.append(mode.from_tensor(value, static_shapes=True))
        else:
            source = getattr(symbolic, "tensor_source", None)
            fakes.append(mode.from_tensor(value, symbolic_context=symbolic, source=source, trace=False))
    return fakes


def is_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values, unlike those of a trace (2.11 to 2.13)."""
    return not isinstance(tensor, FakeTensor) and not torch._is_functional_tensor(tensor)


def fake_twin(tensor: FakeTensor) -> FakeTensor:
    """A fake tensor of the same sizes, over the same storage, made without arithmetic on sizes (2.11 to 2.13)."""
    with torch._C._DisableTorchDispatch():
        plain = torch.Tensor._make_subclass(torch.Tensor, tensor)
        return FakeTensor(tensor.fake_mode, plain, tensor.fake_device)


def empty_fake(like: FakeTensor, *, whole: bool = False, inside: torch.Tensor | None = None) -> torch.Tensor:
    """A fake tensor of the sizes of ``like`` over memory of its own, or ``inside`` that of another one (2.11 to 2.13).

    ``whole``: instead, all of the memory that ``like`` is a part of, in one dimension.
    """
    kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    with like.fake_mode, enable_python_dispatcher(), torch.no_grad():
        if whole:
            return torch.empty((like.untyped_storage().nbytes() // like.element_size(),), **kind)
        if inside is None and isinstance(like.storage_offset(), int) and like.storage_offset() == 0:
            return torch.empty_strided(like.shape, like.stride(), **kind)
        base = inside if inside is not None else empty_fake(like, whole=True)
        return base.view(like.dtype).as_strided(like.shape, like.stride(), like.storage_offset())


def holds_data(tensor: FakeTensor) -> bool:
    """Whether a fake tensor knows its values, so that ops on it compute with them (2.11 to 2.13)."""
    return tensor.constant is not None or tensor.real_tensor is not None


def modes_of_trace() -> tuple[Any, ...]:
    """The modes that decide, beside its arguments, what an op does in a trace (2.11 to 2.13)."""
    autocast = [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), *autocast)


def python_dispatcher() -> AbstractContextManager[Any]:
    """Makes symbolic shapes pass through ops that decompose in C++ (2.11 to 2.13)."""
    return enable_python_dispatcher()


class _NodeAnalysis(PythonReferenceAnalysis):
    """Torch's, with what it leaves to sympy's own functions or to Python protocols that a proxy does not have."""

    # Rounding to whole numbers asks a value's own methods, which a proxy has not.
    floor_to_int = staticmethod(lambda x, dtype: _call_node(math.floor, x))
    ceil_to_int = staticmethod(lambda x, dtype: _call_node(math.ceil, x))
    trunc_to_int = staticmethod(lambda x, dtype: _call_node(torch.sym_int, x))
    round_to_int = staticmethod(lambda x, dtype: _call_node(round, x))
    round_decimal = staticmethod(lambda x, digits: _call_node(round, x, digits))
    floor = staticmethod(lambda x: _call_node(torch.sym_float, _call_node(math.floor, x)))
    ceil = staticmethod(lambda x: _call_node(torch.sym_float, _call_node(math.ceil, x)))
    trunc = staticmethod(lambda x: _call_node(torch.sym_float, _call_node(torch.sym_int, x)))
    int_truediv = staticmethod(operator.truediv)
    truncdiv = staticmethod(lambda a, b: _call_node(torch.sym_int, a / b))
    add, sub, mul = staticmethod(operator.add), staticmethod(operator.sub), staticmethod(operator.mul)
    bitwise_and, bitwise_or = staticmethod(operator.and_), staticmethod(operator.or_)
    bitwise_xor = staticmethod(operator.xor)


for _name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan"):
    setattr(_NodeAnalysis, _name, staticmethod(partial(lambda f, x: _call_node(f, x), getattr(torch, f"_sym_{_name}"))))


def _call_node(function: Callable[..., Any], *args: Any) -> Any:
    proxies = [a for a in args if isinstance(a, fx.Proxy)]
    return proxies[0].tracer.create_proxy("call_function", function, args, {}) if proxies else function(*args)


def expression_nodes(graph: fx.Graph, expr: sympy.Expr, symbols: Mapping[sympy.Symbol, fx.Node]) -> fx.Node | Any:
    """Nodes at the end of ``graph`` that compute ``expr`` from nodes for its symbols (2.11 to 2.13).

    An expression that no nodes are known for is one call, which no compiler can look into.
    """
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = {symbol: fx.Proxy(node, tracer) for symbol, node in symbols.items()}
    before = set(graph.nodes)
    try:
        result = sympy_interp(_NodeAnalysis, proxies, expr)
    except Exception:
        for node in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(node)
        free = sorted(expr.free_symbols, key=str)
        return graph.call_function(_Expression(expr, tuple(free)), tuple(symbols[s] for s in free))
    return result.node if isinstance(result, fx.Proxy) else result


def evaluate_expression(expr: sympy.Basic, values: Mapping[sympy.Symbol, Any]) -> Any:
    """An expression at values of its symbols, floats among them, by Python's arithmetic (2.11 to 2.13)."""
    try:
        return sympy_interp(_NodeAnalysis, dict(values), expr)
    except (KeyError, AttributeError, NotImplementedError):
        # A function that torch has no Python form of.
        symbols = tuple(sorted(expr.free_symbols, key=str))
        return _Expression(expr, symbols)(*(values[s] for s in symbols))


def number_of_symbol(symbol: sympy.Symbol, like: Any) -> Any:
    """A SymInt or SymFloat of a symbol that only the data give a value, beside another number (2.11 to 2.13)."""
    env = like.node.shape_env
    return (env.create_symintnode if symbol.is_integer else env.create_symfloatnode)(symbol, hint=None)


class _Expression:
    """An expression of sizes as a function of them."""

    def __init__(self, expr: sympy.Expr, symbols: tuple[sympy.Symbol, ...]) -> None:
        self.expr, self.symbols = expr, symbols
        self.__name__ = self.__qualname__ = "expression"

    def __call__(self, *sizes: int | float) -> Any:
        value = self.expr.xreplace({s: sympy.sympify(n) for s, n in zip(self.symbols, sizes, strict=True)})
        if isinstance(value, sympy.logic.boolalg.BooleanAtom):
            return bool(value)
        return int(value) if value.is_integer and not value.is_Float else float(value)


@contextmanager
def isolated_tracing(fake_mode: FakeTensorMode) -> Iterator[None]:
    """A tracing context of our own, so that compiling a piece leaves Dynamo's alone (2.11 to 2.13)."""
    with tracing(TracingContext(fake_mode)):
        yield


def start_inductor_workers() -> None:
    """Begins to start the processes that compile Triton kernels in parallel, if they are not (2.11 to 2.13).

    They take seconds to start; until they have, Inductor compiles kernels itself, one after the other.
    """
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


def prepare_inductor(device: torch.device) -> Callable[[], None]:
    """Begins, beside other work, what a first compile by Inductor waits for; returns what waits for it (2.11 to 2.13).

    The keys of its caches hash the sources of torch and Triton, hundreds of megabytes, mostly without Python's lock.
    """
    try:
        if device.type == "cuda":
            start_inductor_workers()
        # Here and not in the thread: of modules that import each other, two threads could see some half made.
        import torch._inductor.compile_fx  # noqa: F401
        from torch._inductor.codecache import torch_key
        from torch._inductor.runtime import triton_compat
    except Exception:
        # It fails again, and is counted, where a piece is compiled.
        return lambda: None

    def hash_sources() -> None:
        with suppress(Exception):
            torch_key()
            if triton_compat.HAS_TRITON:
                triton_compat.triton_key()

    thread = Thread(target=hash_sources, name="pcg-hash-sources", daemon=True)
    thread.start()
    return thread.join


def compile_with_inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compiles one graph with Inductor, its own CUDA graphs off (2.11 to 2.13)."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(inputs), config_patches={"triton.cudagraphs": False, "keep_output_stride": True})


#: What to do in the next wait of this thread, once.
_WORK: ContextVar[Callable[[], None] | None] = ContextVar("pcg_work_in_waits", default=None)
#: What Inductor's bundler has once for the process, and belongs to the graph that is compiled.
_OF_A_GRAPH = ("_entries", "_static_autotuners", "_winners")


@contextmanager
def while_kernels_compile(work: Callable[[], None] | None) -> Iterator[None]:
    """Has ``work`` done, once, where this thread would wait for kernels of Inductor (2.11 to 2.13)."""
    if work is None or not _watch_waits():
        yield
        return
    counted: Counter[str] = Counter()
    token = _WORK.set(_apart(work, counted))
    try:
        yield
    finally:
        _WORK.reset(token)
        counters["inductor"].update(counted)


def _watch_waits() -> bool:
    """Has Inductor's waits look for work; whether they do: not where something that has to be set aside is missing."""
    try:
        from torch._inductor.async_compile import AsyncCompile, CompiledTritonKernels, get_compile_threads
        from torch._inductor.codecache import CodeCacheFuture
        from torch._inductor.triton_bundler import TritonBundler  # noqa: F401
        from torch._inductor.virtualized import threadlocal  # noqa: F401

        CompiledTritonKernels._cache  # noqa: B018
        waits: dict[str, Callable[..., Any]] = {"wait": AsyncCompile.wait, "triton": AsyncCompile.triton}
        ready = AsyncCompile.use_process_pool
    except (ImportError, AttributeError):
        return False
    if hasattr(waits["wait"], "pcg_looks_for_work"):
        return True

    def in_flight(self: Any, scope: dict[str, Any], *args: Any, **kwargs: Any) -> bool:
        return any(isinstance(value, (Future, CodeCacheFuture)) for value in scope.values())

    def alone(self: Any, *args: Any, **kwargs: Any) -> bool:
        # Its processes are not up yet: it would compile the kernel itself, and nothing beside it.
        return bool(get_compile_threads() > 1 and not ready())

    for (name, wait), when in zip(waits.items(), (in_flight, alone), strict=True):
        setattr(AsyncCompile, name, _looking_for_work(wait, when))
    return True


def _looking_for_work(wait: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    @wraps(wait)
    def looks_for_work(*args: Any, **kwargs: Any) -> Any:
        work = _WORK.get()
        if work is not None and when(*args, **kwargs):
            _WORK.set(None)
            work()
        return wait(*args, **kwargs)

    looks_for_work.pcg_looks_for_work = True  # type: ignore[attr-defined]
    return looks_for_work


def _apart(work: Callable[[], None], counted: Counter[str]) -> Callable[[], None]:
    """The same, under the settings of now, and apart from the graph that is compiled when it is called.

    What is counted of it goes to ``counted``: a graph's own counts are kept in Inductor's cache, and counted again
    whenever it comes from there.
    """
    from torch._inductor.async_compile import CompiledTritonKernels
    from torch._inductor.triton_bundler import TritonBundler
    from torch._inductor.virtualized import threadlocal

    configs = [torch._inductor.config, torch._functorch.config]
    settings = [dict(config.get_config_copy()) for config in configs]
    handlers = dict(vars(threadlocal))

    def run() -> None:
        kernels, CompiledTritonKernels._cache = CompiledTritonKernels._cache, {}
        bundle = {name: getattr(TritonBundler, name) for name in _OF_A_GRAPH if hasattr(TritonBundler, name)}
        for name in bundle:
            setattr(TritonBundler, name, None)
        inner, before = dict(vars(threadlocal)), Counter(counters["inductor"])
        _replace(vars(threadlocal), handlers)
        try:
            with ExitStack() as stack:
                for config, then in zip(configs, settings, strict=True):
                    now = config.get_config_copy()
                    changed = {name: value for name, value in then.items() if now.get(name) is not value}
                    if changed:
                        stack.enter_context(config.patch(changed))
                stack.enter_context(_disable_current_modes())
                stack.enter_context(torch._C._DisablePythonDispatcher())
                work()
        finally:
            counted.update(counters["inductor"])
            counted.subtract(before)
            counters["inductor"].subtract(counted)
            _replace(vars(threadlocal), inner)
            CompiledTritonKernels._cache = kernels
            for name, value in bundle.items():
                setattr(TritonBundler, name, value)

    return run


def _replace(table: dict[str, Any], by: dict[str, Any]) -> None:
    table.clear()
    table.update(by)


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


def is_subclass(value: Any) -> bool:
    """Whether a tensor is made of others and can be taken apart, as a DTensor can (2.11 to 2.13)."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)


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


def lower_subclasses(
    gm: fx.GraphModule, inputs: list[Any], compile_plain: Callable[[fx.GraphModule, Sequence[Any]], Any]
) -> Callable[..., Any]:
    """AOTAutograd's inference graph over plain tensors, compiled by ``compile_plain`` (2.11 to 2.13).

    Parameters keep being known as such, so that they are bound by address. Calls of custom ops that write their
    arguments are in the form that :func:`functionalized_call` reads.
    """
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._inductor import config

    inner: list[_PlainCall] = []

    def compile_lowered(lowered: fx.GraphModule, fakes: Sequence[Any]) -> Any:
        metadata = getattr(TracingContext.try_get(), "fw_metadata", None)
        static = set(getattr(metadata, "static_input_indices", None) or ())
        for position, node in enumerate(lowered.graph.find_nodes(op="placeholder")):
            if position in static:
                node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        # Copies of what was written come after the graph, and autocast is switched off ahead of it.
        copies = getattr(metadata, "mutated_inp_runtime_indices", True)
        inner.append(_PlainCall(compile_plain(lowered, fakes), bool(copies) or torch._C._is_any_autocast_enabled()))
        return inner[-1]

    with config.patch(enable_auto_functionalized_v2=False):
        whole = aot_module_simplified(
            gm,
            inputs,
            fw_compiler=compile_lowered,
            inference_compiler=compile_lowered,
            decompositions={},
            keep_inference_input_mutations=True,
        )
    return _TakesDTensorsApart(whole, inner[-1]) if inner else whole


class _PlainCall:
    """A graph over plain tensors; notes what the last call got and gave."""

    def __init__(self, function: Callable[..., Any], needs_wrappers: bool) -> None:
        self.function, self.needs_wrappers = function, needs_wrappers
        self.last: tuple[Sequence[Any], Any] | None = None

    def __call__(self, *args: Any) -> Any:
        results = self.function(*args)
        self.last = None if self.needs_wrappers else (args, results)
        return results


class _TakesDTensorsApart:
    """A graph over DTensors that calls the one over what they are made of, without AOTAutograd's wrappers where it can.

    Those take some 4 us a parameter at every step, 1 ms for an 8B model. Where a call went through them and they did
    nothing but take arguments apart, and hand on the graph's results as they are, later calls do that by themselves.
    What the wrappers do is fixed when they are made; guards see to it that the arguments are of the same kinds.
    """

    def __init__(self, whole: Callable[..., Any], plain: _PlainCall) -> None:
        self._whole, self._plain = whole, plain
        #: Where each plain argument comes from: an argument, or one of its attributes.
        self._sources: list[tuple[int, str | None]] | None = None

    def __call__(self, *args: Any) -> Any:
        if self._sources is not None:
            return self._plain.function(*_taken_apart(args, self._sources))
        results = self._whole(*args)
        last, self._plain.last = self._plain.last, None
        if last is not None:
            sources = _sources_of(args)
            if _same_objects(_taken_apart(args, sources), last[0]) and _same_objects(results, last[1]):
                self._sources = sources
        return results


def _sources_of(args: Sequence[Any]) -> list[tuple[int, str | None]]:
    sources: list[tuple[int, str | None]] = []
    for i, arg in enumerate(args):
        sources += [(i, name) for name in arg.__tensor_flatten__()[0]] if is_subclass(arg) else [(i, None)]
    return sources


def _taken_apart(args: Sequence[Any], sources: Sequence[tuple[int, str | None]]) -> list[Any]:
    return [args[i] if name is None else getattr(args[i], name) for i, name in sources]


def _same_objects(one: Any, other: Any) -> bool:
    return (
        isinstance(one, (tuple, list))
        and isinstance(other, (tuple, list))
        and len(one) == len(other)
        and all(a is b or (type(a) is int and a == b) for a, b in zip(one, other, strict=True))
    )


def functionalized_call(node: fx.Node) -> tuple[torch._ops.OpOverload, Mapping[str, Any]] | None:
    """The op that writes its arguments, and those, of a node that does it on copies; else None (2.11 to 2.13).

    The node's result is a tuple of what the op returns, or None for an op that returns nothing, and the copies in the
    order of the op's arguments.
    """
    if node.target is not torch.ops.higher_order.auto_functionalized:
        return None
    op = node.args[0]
    assert isinstance(op, torch._ops.OpOverload)
    return op, node.kwargs


def default_store() -> Any:
    """The key-value store that a process group was made with (2.11 to 2.13)."""
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def group_backend(name: str) -> str | None:
    """The backend ("nccl", "gloo") of a process group by its name; None where no group has it (2.11 to 2.13)."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    try:
        group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (LookupError, RuntimeError, ValueError):
        return None
    return str(dist.get_backend(group))


def ranks_of_group(name: str) -> list[int] | None:
    """The ranks of a process group by its name, in the world's numbers; None where no group has it (2.11 to 2.13)."""
    import torch.distributed as dist

    try:
        return dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(name))  # type: ignore[arg-type]
    except (LookupError, RuntimeError, ValueError):
        return None


class GroupMaximum:
    """The largest of two numbers over some ranks, each pair's own, from host to host: a gloo group of its own.

    The backend is called directly: through the dispatcher it would cost twice the time.

    Raises:
        RuntimeError: gloo finds no way between the ranks; from :meth:`wait` also where one is gone, or has not answered
            within the timeout of the default process group.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        import torch.distributed as dist

        default = dist.distributed_c10d._get_default_group()
        options = getattr(default._get_backend(default._device_types[0]), "options", None)
        group = dist.new_group(
            list(ranks), getattr(options, "_timeout", None), backend="gloo", use_local_synchronization=True
        )
        assert group is not None
        self._backend = group._get_backend(torch.device("cpu"))
        self._largest = dist.AllreduceOptions()
        self._largest.reduceOp = dist.ReduceOp.MAX
        with torch.inference_mode(False):
            numbers = torch.zeros(2, dtype=torch.int64, device="cpu")
        self._numbers, self._array = [numbers], numbers.numpy()
        self._work: Any = None

    def start(self, numbers: tuple[int, int]) -> None:
        """Sends this rank's numbers. Those of a step that ended early, which nobody waited for, have come by now."""
        if self._work is not None:
            self._work.wait()
        self._array[:] = numbers
        self._work = self._backend.allreduce(self._numbers, self._largest)

    def wait(self) -> tuple[int, int]:
        """The largest of all ranks' numbers."""
        self._work.wait()
        self._work = None
        first, second = self._array.tolist()
        return first, second


def before_groups_end(release: Callable[[], None]) -> None:
    """Has ``release`` called ahead of ``torch.distributed.destroy_process_group()`` and of the end of Python, once.

    NCCL waits in ``ncclCommDestroy`` until every CUDA graph that holds one of its collectives is gone, so that a
    program which still has recordings would never end (pytorch issue 115388). torch has no hook to tell of it: the
    public function is replaced by one that calls ``release`` first.
    """
    import torch.distributed as dist

    original = dist.destroy_process_group
    if hasattr(original, "__pcg_release__"):
        return

    @functools.wraps(original)
    def destroy_process_group(*args: Any, **kwargs: Any) -> None:
        release()
        original(*args, **kwargs)

    destroy_process_group.__pcg_release__ = release  # type: ignore[attr-defined]
    dist.destroy_process_group = dist.distributed_c10d.destroy_process_group = destroy_process_group
    atexit.register(release)


def data_ptrs_equal(tensors: list[Any], data_ptrs: list[int], indices: list[int]) -> bool:
    """Whether ``tensors[i].data_ptr()`` is ``data_ptrs[i]`` for each index ``i`` (2.11 to 2.13).

    CUDA builds have it as one call, 0.07 us a tensor.
    """
    if _COMPARE_DATA_PTRS is not None:
        return bool(_COMPARE_DATA_PTRS(tensors, data_ptrs, indices))
    return [tensors[i].data_ptr() for i in indices] == [data_ptrs[i] for i in indices]


_COMPARE_DATA_PTRS = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)


class CurrentStream:
    """The stream that is current on a CUDA device, the same object each time (2.11 to 2.15).

    ``torch.cuda.current_stream()`` makes a new one, which costs more than all else that a copy takes on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._index = device.index
        self._known: dict[tuple[int, ...], torch.cuda.Stream] = {}

    def handle(self) -> int:
        """The CUDA handle of that stream, which costs a fraction of the object."""
        index = torch.cuda.current_device() if self._index is None else self._index
        return int(torch._C._cuda_getCurrentRawStream(index))

    def __call__(self) -> torch.cuda.Stream:
        index = torch.cuda.current_device() if self._index is None else self._index
        key = torch._C._cuda_getCurrentStream(index)
        stream = self._known.get(key)
        if stream is None:
            stream = self._known[key] = torch.cuda.current_stream(index)
        return stream


def shape_guards(fake_mode: FakeTensorMode) -> list[Any]:
    """The conditions on sizes under which a graph is right: of the trace and of compiling (2.11 to 2.13)."""
    env = fake_mode.shape_env
    if env is None:
        return []
    conditions = [guard.expr for guard in env.guards]
    for symbol, bounds in env.var_to_range.items():
        for relation, bound in ((sympy.Ge, bounds.lower), (sympy.Le, bounds.upper)):
            if isinstance(bound, (int, sympy.Integer)) or getattr(bound, "is_Integer", False):
                conditions.append(relation(symbol, bound))
    # A symbol that was found equal to another is no longer anybody's size; one that was found to be a number still is.
    fixed = [sympy.Eq(symbol, value) for symbol, value in env.replacements.items() if value.is_number]
    return [*(env.replace(condition) for condition in conditions), *fixed]


def layouts_apart(fake_mode: FakeTensorMode) -> list[Any]:
    """Takes out of Dynamo's guards that a size is not 1 where only an op's layout asked; returns them (2.11 to 2.13).

    torch asks whether a size is 1 where it lays out a view, and Dynamo would trace again for that size. The graph is
    the same; its pieces are captured at larger sizes. Branches of the code itself, and whatever else Dynamo asks,
    stay guards.
    """
    env = fake_mode.shape_env
    if env is None:
        return []
    taken = [
        guard
        for guard in env.guards
        if isinstance(guard.expr, sympy.Ne)
        and isinstance(guard.expr.lhs, sympy.Symbol)
        and guard.expr.rhs == 1
        and getattr(getattr(guard.sloc, "framework_loc", None), "name", "") == "run_node"
    ]
    if taken:
        env.guards[:] = [guard for guard in env.guards if all(guard is not one for one in taken)]
        for guard in taken:
            for implied, _ in env.get_implications(env.simplify(guard.expr)):
                env.axioms.pop(implied, None)
        env._update_version_counter()
    return [guard.expr for guard in taken]


@contextmanager
def guards_apart(fake_mode: FakeTensorMode) -> Iterator[list[Any]]:
    """What a compiler assumes of sizes inside becomes no guard of Dynamo's, but is listed afterwards (2.11 to 2.13).

    Inductor asks whether a size is 1 where it lays out a view, say, and Dynamo would compile the whole model again for
    that size. What other sizes do not satisfy either stays a guard: for those, there will be a graph of their own. But
    not what this call's own sizes do not satisfy, when the compiler was shown others: Dynamo takes that for a bug.
    """
    env, found = fake_mode.shape_env, []  # type: ignore[var-annotated]
    if env is None:
        yield found
        return
    count, replacements = len(env.guards), dict(env.replacements)
    tables = (env.axioms, env.var_to_range, env.var_to_range_sloc)
    before, divisible = [dict(table) for table in tables], set(env.divisible)
    try:
        yield found
    finally:
        made, known = [guard.expr for guard in env.guards[count:]], dict(env.backed_var_to_val)
        untrue = any(condition.xreplace(known) == sympy.false for condition in made)
        same = env.replacements == replacements
        if untrue or (made and same and all(_is_of_0_and_1(env.replace(condition), env) for condition in made)):
            if not same:
                _set_replacements(env, replacements)
            found += [env.replace(condition) for condition in made]
            del env.guards[count:]
            for table, old in zip(tables, before, strict=True):
                table.clear()
                table.update(old)
            env.divisible = divisible
            env._update_version_counter()


#: Sizes of all kinds: small and large, odd, powers of two.
_SAMPLES = (2, 3, 5, 8, 17, 64, 1000, 4096, 100_000)


def _is_of_0_and_1(condition: sympy.Basic, env: Any) -> bool:
    """Whether a condition on sizes holds at all but 0 and 1, as far as samples tell."""
    known, symbols = dict(env.backed_var_to_val), condition.free_symbols
    if not symbols <= known.keys():
        return False
    changes = [dict.fromkeys(symbols, sympy.Integer(n)) for n in _SAMPLES]
    changes += [{symbol: sympy.Integer(n)} for symbol in symbols for n in _SAMPLES]
    return all(condition.xreplace({**known, **change}) == sympy.true for change in changes)


#: What a compiler is shown for sizes of 0 and 1, by symbol: equal ones it would take for the same. The first row that
#: breaks no condition.
_SHOWN = ((16, 24, 40, 48, 56, 80, 88, 96), (8, 12, 14, 10, 6, 4), (2, 3, 5, 7, 9, 11))


@contextmanager
def shown_larger(
    values: Sequence[Any], symbols: Sequence[sympy.Symbol], fake_mode: FakeTensorMode, conditions: list[Any]
) -> Iterator[Sequence[Any]]:
    """The fake inputs of a piece, its sizes of 0 and 1 replaced by larger ones while it compiles (2.11 to 2.13).

    Inductor would lay out code for such a size alone. Where no larger size will do, it is a number while the piece
    compiles, and ``conditions`` say so: Inductor computes what is wrong where a condition tells it that a symbol is 1,
    and the symbol stands in shapes all the same (2.13: a product of one row, under size-oblivious reasoning).
    """
    env = fake_mode.shape_env
    small = [] if env is None else [symbol for symbol in symbols if env.backed_var_to_val.get(symbol) in (0, 1)]
    if env is None or not small:
        yield values
        return
    hints = _larger_hints(env, small)
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    plain = all(
        type(t) in (FakeTensor, torch.nn.Parameter) and t.layout == torch.strided and not (t.is_conj() or t.is_neg())
        for t in tensors
    )
    storages = {t.untyped_storage()._cdata for t in tensors} if plain else set()
    if not hints or len(storages) < len(tensors) or any(isinstance(v, torch.SymFloat) for v in values):
        numbers = {symbol: sympy.Integer(env.backed_var_to_val[symbol]) for symbol in small}
        conditions += [sympy.Eq(symbol, number) for symbol, number in numbers.items()]
        old = dict(env.replacements)
        # What stands for one of them is the number itself: under size-oblivious reasoning torch looks no further.
        _set_replacements(env, {**{s: expr.xreplace(numbers) for s, expr in old.items()}, **numbers})
        try:
            yield values
        finally:
            _set_replacements(env, {**{s: n for s, n in env.replacements.items() if s not in numbers}, **old})
        return
    before = {symbol: env.backed_var_to_val[symbol] for symbol in hints}
    env.backed_var_to_val.update(hints)
    env._update_version_counter()

    def number(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr
        return env.create_symintnode(expr, hint=int(expr.xreplace(dict(env.backed_var_to_val))))

    def again(value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return number(value)
        shape, strides = [number(n) for n in value.shape], [number(n) for n in value.stride()]
        offset = number(value.storage_offset())
        if not any(isinstance(size, torch.SymInt) for size in (*shape, *strides, offset)):
            return value
        with fake_mode, enable_python_dispatcher(), torch.no_grad():
            if isinstance(offset, int) and offset == 0:
                return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
            reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            base = torch.empty((offset + reach + 1,), dtype=value.dtype, device=value.device)
            return base.as_strided(shape, strides, offset)

    try:
        yield [again(value) for value in values]
    finally:
        env.backed_var_to_val.update(before)
        env._update_version_counter()


def _set_replacements(env: Any, replacements: dict[sympy.Symbol, Any]) -> None:
    env.replacements.clear()
    env.replacements.update(replacements)
    if hasattr(env, "_replacements_version_counter"):
        env._replacements_version_counter += 1
    env._update_version_counter()


def _larger_hints(env: Any, small: Sequence[sympy.Symbol]) -> dict[sympy.Symbol, sympy.Integer]:
    """Larger values for sizes of 0 and 1 that break none of the conditions so far; {} where there are none."""
    known = env.backed_var_to_val
    for shown in _SHOWN:
        free = [n for n in shown if n not in known.values()]
        hints = {symbol: sympy.Integer(n) for symbol, n in zip(small, free, strict=False)}
        if len(hints) < len(small):
            continue
        for symbol, expr in env.replacements.items():
            if symbol in known and expr.free_symbols & hints.keys():
                hints[symbol] = expr.xreplace({**known, **hints})
        values = {**known, **hints}
        if (
            all(hint.is_Integer for hint in hints.values())
            and all(hint in env.bound_sympy(symbol) for symbol, hint in hints.items())
            and all(guard.expr.xreplace(values) == sympy.true for guard in env.guards)
        ):
            return hints
    return {}


def is_static_input(node: fx.Node) -> bool:
    """Whether a placeholder of Dynamo's is a parameter or a buffer of a module (2.11 to 2.13)."""
    return isinstance(node.meta.get("example_value"), torch.nn.Parameter) or (
        "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    )


def is_asked_for(reason: str) -> bool:
    """Whether the code itself asked for a break of the graph, where nothing else runs (2.11 to 2.13)."""
    return reason.startswith("Call to `torch._dynamo.graph_break()`")


def graph_break_of(gm: fx.GraphModule) -> tuple[str, Any] | None:
    """Why Dynamo broke the frame after this graph, and the user's frames; None where it did not (2.11 to 2.13)."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    return (reason.reason, reason.user_stack) if getattr(reason, "graph_break", False) else None


#: Where the code around a compiled call lies: what torch.compile returns, and what runs a backend's callable.
_EVAL_FRAME = torch._dynamo.eval_frame.DisableContext.__call__.__code__.co_filename


def calling_wrapper() -> object | None:
    """The object that ``torch.compile`` made of a backend, whose graph is being compiled or called (2.11 to 2.13).

    Equal compiled functions share what Dynamo compiled for the first of them; only the call itself tells them apart.
    Dynamo runs a backend's callable in a function that holds the callback of the present call, for putting it back;
    farther out is the function that torch.compile returned. None where neither is found.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        # 1 us of a step, most of it for the attributes that lead to the wrapper.
        if frame.f_code.co_filename == _EVAL_FRAME:
            name = "callback" if "callback" in frame.f_code.co_freevars else "prior"
            found = _innermost_backend(frame.f_locals.get(name))
            if found is not None:
                return found
        frame = frame.f_back
    return None


def types_of_arguments(schema: Any) -> dict[str, str]:
    """The type of each argument by name, of an op's schema or of its text ``name(Tensor x) -> ()`` (2.11 to 2.13)."""
    parsed = torch._C.parse_schema(schema) if isinstance(schema, str) else schema
    return {argument.name: str(argument.type) for argument in parsed.arguments}


def inline_when_traced(wrapper: Callable[..., Any], function: Callable[..., Any]) -> None:
    """Has Dynamo trace ``function`` where traced code calls ``wrapper``, as for torch.compile's own (2.11 to 2.13)."""
    wrapper._torchdynamo_inline = function  # type: ignore[attr-defined]


def wrapper_of(compiled: Any) -> object | None:
    """The same object, from what ``torch.compile`` returned, or a module after ``module.compile()`` (2.11 to 2.13)."""
    if isinstance(compiled, torch.nn.Module):
        compiled = vars(compiled).get("dynamo_ctx") or vars(compiled).get("_compiled_call_impl")
    if hasattr(compiled, "callback"):
        return _innermost_backend(compiled.callback)
    for cell in getattr(compiled, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            found = _innermost_backend(getattr(cell.cell_contents, "callback", None))
            if found is not None:
                return found
    return None


def _innermost_backend(seen: Any) -> Any:
    for _ in range(16):
        if seen is None or isinstance(seen, torch._TorchCompileWrapper):
            return seen
        seen = getattr(seen, "_torchdynamo_orig_backend", None) or getattr(seen, "_torchdynamo_orig_callable", None)
    return None


def unowned_alias(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor at the same address that does not keep the memory (2.11 to 2.13).

    The results of a recording must not hold memory that later recordings may reuse.
    """
    storage = tensor.untyped_storage()
    borrowed = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), tensor.device, storage.nbytes())
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(borrowed, tensor.storage_offset(), tensor.size(), tensor.stride())


def abandon_capture(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> bool:
    """Ends a capture that failed, so that it leaves no trace; whether its pool can be used again (2.11).

    Where CUDA gave the capture up as invalid, ``capture_end`` raises before it has told torch's allocator and random
    number generator: the allocator would refuse the pool from then on, and every later random number would raise.
    """
    try:
        graph.capture_end()
        return True
    except Exception:  # what follows does the rest
        pass
    index = device.index if device.index is not None else torch.cuda.current_device()
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    # The end of a capture that succeeds tells the generator.
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch.cuda.CUDAGraph()
        empty.capture_begin(capture_error_mode="thread_local")
        empty.capture_end()
    return False


#: Up to so many, single copies take less of the host: 5 us each on an H200's, against 18 for a call with a list.
FEW_COPIES = 3


def foreach_copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copies a list of tensors, many in one call, one kernel where types and layouts agree (2.11 to 2.13)."""
    if len(targets) > FEW_COPIES:
        torch._foreach_copy_(targets, sources, non_blocking=True)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, True)


def compile_whole_with_inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """What ``backend="inductor"`` would do with a graph, gradients included (2.11 to 2.13)."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(inputs))


#: What marks a call's dynamic dimensions, for traces of this thread or task: (tensor, dimensions, strict) of each.
_MARK: ContextVar[Callable[[], Marks] | None] = ContextVar("pcg_mark", default=None)
Marks = list[tuple[torch.Tensor, list[int], bool]]


class compile_for_all_sizes:
    """If Dynamo compiles inside, marked sizes cover 0 and 1 too, and branches on them become guards (2.11 to 2.13).

    ``mark`` returns the dynamic dimensions of the arguments, as :func:`dynamic_dims` has them; it is called only then,
    so a call that compiles nothing costs an assignment.
    """

    __slots__ = ("mark", "token")

    def __init__(self, mark: Callable[[], Marks]) -> None:
        self.mark = mark

    def __enter__(self) -> None:
        self.token = _MARK.set(self.mark)

    def __exit__(self, *error: object) -> None:
        _MARK.reset(self.token)


def requested_marks() -> Marks | None:
    """The dynamic dimensions that the caller asks traces of this call for, for all sizes; None where it does not."""
    mark = _MARK.get()
    return mark() if mark is not None else None


@dataclass(frozen=True)
class Trace:
    """One trace of Dynamo's that is about to begin.

    Attributes:
        wrapper: what ``torch.compile`` made of the backend.
        code: the code that is traced. arguments: its local variables, which the trace is shown; may be replaced.
        first: whether the code was never compiled before.
        limit: the name of the limit on compilations that the code has reached, so that it will run eagerly; or "".
        why: the guard that failed, where Dynamo knows.
        context: the object behind the compiled callable. at_end: what is called when the running call of it ends.
    """

    wrapper: Any
    code: CodeType
    arguments: dict[str, Any]
    first: bool
    limit: str
    why: str
    context: Any
    at_end: list[Callable[[], None]] | None


#: Who is told of each trace, in the thread that traces: registered once, at import.
_TOLD_OF_TRACES: list[Callable[[Trace], None]] = []


def watch_traces(before: Callable[[Trace], None] | None = None, after: Callable[[], None] | None = None) -> None:
    """Has ``before(trace)`` called ahead of each of Dynamo's traces, or keeps it so (2.11 to 2.13).

    What it raises reaches the caller of the compiled function as it is, and nothing has run. Dynamo calls its hooks
    for the context of recompilations in the tracing thread, holding its compile lock, ahead of every trace and of the
    limit on recompilations. ``after()`` is called once code has been compiled, before it runs.
    """
    if before is not None:
        _TOLD_OF_TRACES.append(before)
    if after is not None:
        torch._dynamo.convert_frame.register_bytecode_hook(lambda code, compiled: after())
    if _before_trace not in (torch._dynamo.utils.get_hook_for_recompile_user_context() or ()):
        torch._dynamo.register_hook_for_recompile_user_context(_before_trace)


def _before_trace() -> str:
    frame: Any = sys._getframe(1)
    if frame.f_code.co_name != "_compile":  # up to Python 3.11 a comprehension is a frame of its own
        frame = frame.f_back
    here = frame.f_locals
    if frame.f_code.co_name != "_compile" or "compiler_fn" not in here:
        return ""
    wrapper = _innermost_backend(here["compiler_fn"])
    if wrapper is None:
        trace = Trace(None, here["code"], {}, False, "", "", None, None)
    else:
        exceeded, limit = exceeds_recompile_limit(here["cache_size"], here["compile_id"])
        first = str(here["compile_id"]).rpartition("/")[2] == "0"
        limit = f"{limit} ({getattr(torch._dynamo.config, limit)})" if exceeded else ""
        why = str(here.get("recompile_reason") or "").partition("\n")[0]
        context, at_end = _running_call(frame, wrapper)
        trace = Trace(wrapper, here["code"], here["locals"], first, limit, why, context, at_end)
    for call in _TOLD_OF_TRACES:
        call(trace)
    return ""


def _running_call(frame: Any, wrapper: Any) -> tuple[Any, list[Callable[[], None]] | None]:
    """The context whose call Dynamo compiles for, and the list of what it does at the call's end (2.11 to 2.13)."""
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper":
            context, at_end = frame.f_locals.get("self"), frame.f_locals.get("cleanups")
            if _innermost_backend(getattr(context, "callback", None)) is wrapper:
                return context, at_end if isinstance(at_end, list) else None
        frame = frame.f_back
    return None, None


def context_of(compiled: Any) -> Any:
    """The object behind what ``torch.compile`` returned, which does what each call begins and ends with (2.11 to 2.13).

    None where there is none.
    """
    context = getattr(compiled, "dynamo_ctx", None)
    if context is None and hasattr(compiled, "_torchdynamo_inline"):
        for cell in getattr(compiled, "__closure__", None) or ():
            with suppress(ValueError):
                if hasattr(cell.cell_contents, "enter_exit_hooks"):
                    context = cell.cell_contents
    return context


def with_each_call(context: Any, enter: Callable[[], Callable[[], None]]) -> None:
    """Has ``enter()`` called ahead of each call behind a context, and what it returns at the call's end (2.11 to 2.13).

    That is how ``torch.compile(dynamic=...)`` sets what it sets; here for the context of one compiled function.
    """
    context.enter_exit_hooks.append(enter)


def breaks_so_far() -> int:
    """How many breaks Dynamo has noted (2.11 to 2.13)."""
    return len(torch._dynamo.utils.graph_break_reasons)


def breaks_since(count: int) -> list[tuple[str, Any]]:
    """The reason and the user's frames of each break after the first ``count`` (2.11 to 2.13)."""
    return [(reason.reason, reason.user_stack) for reason in torch._dynamo.utils.graph_break_reasons[count:]]


def dynamo_refused(error: BaseException | None) -> bool:
    """Whether an error of a call with ``fullgraph=True`` is that Dynamo makes no single graph of it (2.11 to 2.13)."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, UncapturedHigherOrderOpError, Unsupported, UserError

    unseen = isinstance(error, RuntimeError) and "fullgraph=True found no compiled frames" in str(error)
    return unseen or isinstance(error, (Unsupported, UserError, FailOnRecompileLimitHit, UncapturedHigherOrderOpError))


def freezes_weights() -> bool:
    """Whether Inductor is to make constants of weights (2.11 to 2.13)."""
    return bool(torch._inductor.config.freezing) and not torch.is_grad_enabled()


def settings_of_trace(trace: Trace, marks: Marks, *, for_all_sizes: bool, outermost: bool) -> Callable[[], None]:
    """Settings of torch for one trace; the result takes them back (2.11 to 2.13).

    Settings are the thread's own where torch has them so (2.13); before, they are in force while Dynamo holds its lock.
    Two calls that mark code for a profiler are left out, some 10 us a step. Inductor's freezing would hold a second
    copy of the weights. With ``dynamic=True`` a first trace has floats as constants, as it has them without.
    Marked dimensions are dynamic; ``for_all_sizes``, for 0 and 1 too, with branches on those as guards. Where the
    ``outermost`` function of a call computes nothing, Dynamo compiles that too: else it would leave the function to
    Python for all later calls, whatever they do.
    """
    with ExitStack() as stack:
        dynamo: dict[str, Any] = {}
        if getattr(torch._dynamo.config, "record_runtime_overhead", False):
            dynamo["record_runtime_overhead"] = False
        if trace.first and not (torch._dynamo.config.specialize_float or torch._dynamo.config.assume_static_by_default):
            dynamo["specialize_float"] = True
        if outermost:
            dynamo["allow_empty_graphs"] = True
        if dynamo:
            stack.enter_context(torch._dynamo.config.patch(dynamo))
        if freezes_weights():
            stack.enter_context(torch._inductor.config.patch(freezing=False))
        # What is forced to be a constant of this trace may change until the next one.
        stack.callback(_forget_constants, frozenset(TensorifyState.force_specializations))
        if for_all_sizes:
            stack.enter_context(torch.fx.experimental._config.patch(backed_size_oblivious=True))
        for tensor, dims, surely in marks:
            stack.callback(_unmark, tensor, {k: v for k, v in vars(tensor).items() if "_dynamo_" in k})
            (torch._dynamo.mark_dynamic if surely else torch._dynamo.maybe_mark_dynamic)(tensor, dims)
        return stack.pop_all().close


def _forget_constants(before: Set[str]) -> None:
    for name in TensorifyState.force_specializations - before:
        TensorifyState.force_specializations.discard(name)


def _unmark(tensor: torch.Tensor, before: Mapping[str, Any]) -> None:
    # Other compiled models must not find the marks.
    for name in [name for name in vars(tensor) if "_dynamo_" in name and name not in before]:
        delattr(tensor, name)
    vars(tensor).update(before)


def show_more_rows(arguments: dict[str, Any], marks: Marks) -> tuple[Marks, tuple[int, int]] | None:
    """Shows a trace tensors of more rows where marked sizes are 0 or 1; None where that cannot be (2.11 to 2.13).

    torch lays a view of one row out for that row alone, and a trace is to serve all sizes. ``arguments`` is what
    Dynamo traces instead of the frame's own variables; the call itself gets what its caller passed. Dynamo does not
    check its guards at a call that it traced for, so whoever shows other sizes checks them: :func:`guards_hold_at`.

    Returns:
        The marks of what is shown, the size that the call has, and the one that is shown instead.
    """
    real = {tensor.shape[d] for tensor, dims, _ in marks for d in dims if tensor.shape[d] < 2}
    leaves = [leaf for value in arguments.values() for leaf in _tensor_leaves(value)]
    taken = {int(size) for tensor in leaves for size in tensor.shape}
    # A size of its own: which symbols stand for it is known by the value that they were shown.
    free = [size for size in _SHOWN[0] if size not in taken]
    if len(real) != 1 or not free:
        return None
    larger: dict[int, torch.Tensor] = {}
    shown: Marks = []
    for tensor, dims, surely in marks:
        small = {d for d in dims if tensor.shape[d] < 2}
        if small and id(tensor) not in larger:
            grown = _with_more_rows(tensor, small, free[0])
            if grown is None:
                return None
            larger[id(tensor)] = grown
        shown.append((larger[id(tensor)] if small else tensor, dims, surely))
    for name, value in arguments.items():
        if not isinstance(value, torch.nn.Module):
            arguments[name] = tree_map(lambda leaf: larger.get(id(leaf), leaf), value)
    return shown, (real.pop(), free[0])


def _tensor_leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.nn.Module):
        return []
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _with_more_rows(tensor: torch.Tensor, dims: Set[int], rows: int) -> torch.Tensor | None:
    """A tensor of the same layout with ``rows`` entries in some dimensions; None where its entries would overlap."""
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.requires_grad:
        return None
    shape = [rows if d in dims else size for d, size in enumerate(tensor.shape)]
    strides = list(tensor.stride())
    dense = least = 1
    for d in sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), -d)):
        # Behind what grows, dimensions that lie densely go on doing so.
        if tensor.stride(d) == dense:
            strides[d] = least
        elif shape[d] > 1 and strides[d] < least:
            return None
        dense, least = tensor.stride(d) * max(tensor.shape[d], 1), strides[d] * shape[d]
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)


def guards_hold_at(real: int, shown: int, fake_mode: FakeTensorMode) -> bool:
    """Whether a trace that :func:`show_more_rows` showed more rows is right for the size of the call (2.11 to 2.13)."""
    env = fake_mode.shape_env
    if env is None:
        return False
    known = {s: sympy.Integer(real) if value == shown else value for s, value in env.backed_var_to_val.items()}
    return all(condition.xreplace(known) == sympy.true for condition in shape_guards(fake_mode))


@contextmanager
def graph_breaks() -> Iterator[list[tuple[str, Any]]]:
    """The reason and the user's frames of each break of a graph inside; filled at the end (2.11 to 2.13)."""
    before, found = breaks_so_far(), []  # type: ignore[var-annotated]
    try:
        yield found
    finally:
        found += breaks_since(before)


def inputs_only(entries: Sequence[Any]) -> list[bool]:
    """A ``guard_filter_fn`` that keeps guards on arguments, sizes, modes and training flags (2.11 to 2.13)."""
    keep = []
    for entry in entries:
        name = entry.name
        own = name.startswith("L['") and not name.startswith("L['self']") and not entry.is_global
        plain = "._modules" not in name and "._parameters" not in name and "._buffers" not in name
        keep.append(name == "" or (own and plain) or name.endswith(".training"))
    return keep


def ensure_backend(name: str, backend: Callable[..., Any]) -> None:
    """Registers a backend unless an entry point does (2.11 to 2.13)."""
    if name not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(backend, name=name)


def changing_floats(gm: fx.GraphModule, code: CodeType | None) -> dict[fx.Node, float]:
    """The inputs of a graph that are Python floats which change from call to call, and their values (2.11 to 2.13).

    Dynamo makes tensors on the CPU of those, and ``item()`` of them in the graph. With ``dynamic=True`` it does so for
    all floats; then it is made to trace again with those that do not change as constants.
    """
    from torch.fx.experimental.symbolic_shapes import SymT, symbol_is_type

    found: dict[fx.Node, float] = {}
    fresh: list[str] = []
    env = fake_mode_of([]).shape_env
    for node in gm.graph.find_nodes(op="placeholder"):
        number = getattr(node.meta.get("example_value"), "item_memo", None)
        symbol = getattr(getattr(number, "node", None), "_expr", None)
        # A tensor of the caller's that is read by .item() has a symbol that only the data tell.
        if not isinstance(symbol, sympy.Symbol) or env is None or not symbol_is_type(symbol, SymT.FLOAT):
            continue
        source = getattr(getattr(node, "_dynamo_source", None), "name", "")
        if _has_changed(source() if callable(source) else str(source), code):
            found[node] = float(env.backed_var_to_val[symbol])
        elif not TensorifyState.should_specialize(symbol.name):
            fresh.append(symbol.name)
    for name in fresh:
        TensorifyState.specialize(name)
    if fresh:
        raise trace_again()
    return found


def _has_changed(source: str, code: CodeType | None) -> bool:
    """Whether Dynamo has seen two values of a number; also where it cannot tell (2.11 to 2.13)."""
    from torch._dynamo import pgo

    if code is None or torch._dynamo.config.assume_static_by_default:
        return True  # it makes no symbol of any other number
    where = (code.co_filename, code.co_firstlineno, code.co_name)
    for key, state in pgo.get_code_state().items():
        if (key.filename, key.firstlineno, key.name) == where and source in state.automatic_dynamic:
            return state.automatic_dynamic[source].scalar is pgo.auto_dynamic
    return True


def trace_again() -> Exception:
    """What a backend raises to have Dynamo trace the code once more (2.11 to 2.13)."""
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    return TensorifyScalarRestartAnalysis()


class _Decomposing(fx.Interpreter):
    """Runs a graph with custom ops replaced by what they are made of: functionalization does not look into them."""

    def __init__(
        self,
        gm: fx.GraphModule,
        decompositions: Mapping[Any, Callable[..., Any]],
        at: Callable[[fx.Node], None] = lambda node: None,
    ) -> None:
        super().__init__(gm)
        self.decompositions, self.at = decompositions, at

    def run_node(self, n: fx.Node) -> Any:
        self.at(n)
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        overload = target.default if isinstance(target, torch._ops.OpOverloadPacket) else target
        if overload in self.decompositions:
            return self.decompositions[overload](*args, **kwargs)
        return super().call_function(target, args, kwargs)


def run_functionally(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    decompositions: Mapping[Any, Callable[..., Any]],
    at: Callable[[fx.Node], None],
) -> tuple[Any, ...]:
    """The results of a graph, a tuple, and the inputs that it writes, from ops that write nothing (2.11 to 2.13).

    ``at`` is told each node before it runs. Dispatch modes see the functional ops.
    """

    def plain(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not torch._is_functional_tensor(value):
            return value
        torch._sync(value)
        return torch._from_functional_tensor(value)

    wrapped = [torch._to_functional_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    torch._enable_functionalization(reapply_views=True)
    try:
        results = _Decomposing(gm, decompositions, at).run(*wrapped)
    finally:
        torch._disable_functionalization()
    tensors = [x for x in wrapped if isinstance(x, torch.Tensor)]
    return tuple(map(plain, (*results, *(x for x in tensors if torch._functionalize_has_data_mutation(x)))))


def functional_aten(
    gm: fx.GraphModule, inputs: Sequence[Any], decompositions: Mapping[Any, Callable[..., Any]]
) -> fx.GraphModule:
    """A graph in functional aten form, its nodes with fake values and the lines they come from (2.11 to 2.13).

    Its results are the graph's, a tuple, and the inputs that it writes.
    """
    from torch._subclasses.functional_tensor import FunctionalTensor, dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    def run(*args: Any) -> Any:
        # What the graph writes is a result as well.
        results = _Decomposing(gm, decompositions).run(*args)
        tensors = [x for x in args if isinstance(x, FunctionalTensor)]
        return (*results, *(x for x in tensors if torch._functionalize_has_data_mutation(x.elem)))

    fresh = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    with fake_mode_of(inputs), enable_python_dispatcher(), torch.no_grad(), preserve_node_meta():
        return make_fx(dispatch_functionalize(run), record_module_stack=False)(*fresh)


def is_decomposed(op: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
    """Whether torch's tracer would look at what an op is made of instead of at the op (2.11 to 2.13)."""
    from torch.fx.experimental.proxy_tensor import autograd_would_have_decomposed

    aten = torch.ops.aten
    kept = (aten.size.default, aten.stride.default, aten.storage_offset.default)
    return op not in kept and autograd_would_have_decomposed(op, list(args))


def unbacked_symbols_may_stay(fake_mode: FakeTensorMode) -> AbstractContextManager[Any]:
    """Sizes that only data tell come up again when a graph is interpreted again (2.11 to 2.13)."""
    env = fake_mode.shape_env
    return env.ignore_fresh_unbacked_symbols() if env is not None else nullcontext()


def without_transforms(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor under function transforms such as vmap, whose own tensors have no storage (2.11 to 2.13)."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def traced_function(gm: fx.GraphModule | None) -> tuple[str, str] | None:
    """File and name of the function that Dynamo traced a graph of, where it kept them (2.11 to 2.13)."""
    stack = getattr(getattr(gm, "compile_subgraph_reason", None), "user_stack", None)
    return (stack[0].filename, stack[0].name) if stack else None


def keep_traced_function(copy: fx.GraphModule, original: fx.GraphModule) -> None:
    """Lets a copy of Dynamo's graph answer :func:`traced_function` as well (2.11 to 2.13)."""
    copy.compile_subgraph_reason = getattr(original, "compile_subgraph_reason", None)  # type: ignore[assignment]
