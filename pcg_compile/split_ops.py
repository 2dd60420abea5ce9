"""The registry of split ops: ops that run between pieces, outside every captured graph."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from .errors import OptionsError, message
from .torch_compat.functionalize import types_of_arguments

__all__ = ["SplitOp", "register_split_op", "registered_split_ops", "split_op"]

_METADATA = ("qo_indptr", "kv_indptr", "kv_indices", "last_page_len", "slot_mapping", "max_qo_len", "max_kv_len")


@dataclass(frozen=True)
class SplitOp:
    """An op that runs between pieces, and what the runtime may assume of it.

    Attributes:
        name: packet name ("mylib::attention") or overload name ("mylib::attention.default").
        metadata: which of its arguments hold the batch's metadata, by role.
        scratch_page: a page that the owner of its cache never gives out, or None.
        page_size: tokens a page; 1 for an op without pages.
        any_strides: True where the op takes tensors of any strides, so a slice need not be copied.
        function: the Python implementation, called directly where known, without the dispatcher.
        bind: ``fn(*args, **kwargs) -> Callable[[], None]``, called once when a program is built.
        bucket_args: positions of int arguments that are the bucket's even in slice mode (metadata preparation).
        late: True where the sizes of its results follow from the padding, so nothing static can hold them.
        own_metadata: True where the op takes its metadata from the step, which pads it.
        optional_step: True where no running step means that there is nothing to prepare.
        bind_full_graph: like ``bind``, for metadata that a full CUDA graph reads; the callable returns
            what the captured graph bakes in, or raises ``DoesNotFit``.
        recordable: True where a full CUDA graph may hold the op (``cudagraph_mode="full"``): it reads
            all that changes from step to step from its tensor arguments, on the device.
        needs_none: arguments that a padding request cannot cover; where one is given, the op gets the real rows.
        compiled: True where the op is compiled on its own (its eager form would be a dense fallback).
        fallback: ``fn(*args, **kwargs) -> str | None``, called with the node's arguments once ``bind`` has returned:
            why the op runs otherwise than it is meant to on this device, which is counted at each step.
        uncapturable: ``fn(*args, **kwargs) -> str | None``, called like ``fallback``: why a full CUDA graph cannot hold
            the op after all, though it is ``recordable``.
    """

    name: str
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    scratch_page: int | None = None
    page_size: int = 1
    any_strides: bool = False
    function: Callable[..., Any] | None = None
    bind: Callable[..., Callable[[], None]] | None = None
    bucket_args: tuple[int, ...] = ()
    late: bool = False
    own_metadata: bool = False
    optional_step: bool = False
    bind_full_graph: Callable[..., Callable[[], Any]] | None = None
    recordable: bool = False
    needs_none: tuple[str, ...] = ()
    compiled: bool = False
    fallback: Callable[..., str | None] | None = None
    uncapturable: Callable[..., str | None] | None = None

    @property
    def paged(self) -> bool:
        """Whether the op reads KV pages."""
        return any(role in self.metadata for role in ("kv_indices", "last_page_len", "slot_mapping"))


#: What an argument of a role is.
_NUMBERS = ("max_qo_len", "max_kv_len")

_REGISTRY: dict[str, SplitOp] = {}

_F = TypeVar("_F", bound=Callable[..., Any])


def register_split_op(
    name: str,
    *,
    qo_indptr: str | None = None,
    kv_indptr: str | None = None,
    kv_indices: str | None = None,
    last_page_len: str | None = None,
    slot_mapping: str | None = None,
    max_qo_len: str | None = None,
    max_kv_len: str | None = None,
    page_size: int = 1,
    scratch_page: int | None = None,
    any_strides: bool = False,
    recordable: bool = False,
) -> None:
    """Splits every graph at an op that someone else defined.

    Args:
        name: "mylib::attention" (every overload) or "mylib::attention.default" (one).
        qo_indptr, kv_indptr, kv_indices, last_page_len, slot_mapping: names of the op's own arguments
            that hold the batch's metadata (int tensors: ``[requests + 1]``, ``[requests + 1]``, ``[pages]``,
            ``[requests]``, ``[tokens]``). With ``qo_indptr`` the op is padded by a padding request.
        max_qo_len, max_kv_len: names of int arguments that bound the lengths; raised to cover the padding.
        page_size: tokens a page, for an op with pages.
        scratch_page: a page that is never given to a request; without it an op with pages gets the real
            rows only.
        any_strides: the op takes tensors of any strides.
        recordable: ``cudagraph_mode="full"`` may capture it with the rest of the step. Only for an op that reads
            all that changes from step to step from its tensor arguments, on the device; any other would be silently
            wrong.

    Raises:
        OptionsError: ``name`` is not of the form "library::op"; a role names no argument of the op, or one of another
            type (of an op that is not defined yet: when the first graph with it is compiled).
    """
    roles = dict(
        zip(
            _METADATA,
            (qo_indptr, kv_indptr, kv_indices, last_page_len, slot_mapping, max_qo_len, max_kv_len),
            strict=True,
        )
    )
    described = SplitOp(
        name,
        MappingProxyType({role: arg for role, arg in roles.items() if arg is not None}),
        scratch_page=scratch_page,
        page_size=page_size,
        any_strides=any_strides,
        recordable=recordable,
    )
    _check_name(name)
    for overload in _overloads(name):
        _check_roles(described, types_of_arguments(overload._schema))
    add_split_op(described)


def add_split_op(op: SplitOp) -> None:
    """Registers a fully described split op."""
    _check_name(op.name)
    _REGISTRY[op.name] = op


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.count("::") != 1 or not all(name.split("::")):
        raise OptionsError(
            message(
                f"{name!r} is not the name of an op",
                why="A split op is named by its library and its name.",
                cure='Write: pcg.register_split_op("mylib::attention")',
            )
        )


def check_registration(names: Iterable[str]) -> None:
    """Raises where a split op of these names was registered before it was defined, with roles that it does not have."""
    for name in names:
        described = _REGISTRY.get(name)
        if described is not None and described.metadata:
            for overload in _overloads(name):
                _check_roles(described, types_of_arguments(overload._schema))


def _overloads(name: str) -> list[torch._ops.OpOverload]:
    """Those of an op that are defined by now."""
    library, op = name.split("::")
    packet = getattr(getattr(torch.ops, library), op.partition(".")[0], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return []
    overload = op.partition(".")[2]
    return [getattr(packet, one) for one in packet.overloads() if one == overload or not overload]


def _check_roles(op: SplitOp, types: Mapping[str, str]) -> None:
    """Raises where a role names no argument of the op, or one that cannot have the role.

    Args:
        types: the schema's type of each argument, by name.
    """
    for role, argument in op.metadata.items():
        wanted = ("int", "SymInt") if role in _NUMBERS else ("Tensor",)
        fitting = [name for name, kind in types.items() if kind.rstrip("?") in wanted]
        if argument not in types:
            close = difflib.get_close_matches(str(argument), fitting, n=1, cutoff=0.1) or fitting[-1:]
            such_as = f', such as: {role}="{close[0]}"' if close else f", or leave {role} out."
            raise OptionsError(
                message(
                    f"split op {op.name!r}: {role}={argument!r} names no argument of the op",
                    why=f"It takes: {', '.join(types) or 'none'}.",
                    cure=f"Write the name of the argument that holds it{such_as}",
                )
            )
        if argument not in fitting:
            raise OptionsError(
                message(
                    f"split op {op.name!r}: {role}={argument!r} names an argument of the type {types[argument]}",
                    why=f"It is {'an int' if role in _NUMBERS else 'a tensor of ints'}.",
                    cure=f"Name the argument that holds it, or leave {role} out.",
                )
            )


def registered_split_ops() -> Mapping[str, SplitOp]:
    """All registered split ops by name."""
    return MappingProxyType(_REGISTRY)


@dataclass
class _Definition:
    """An op that :func:`split_op` defined: what is called, which a later definition may replace."""

    function: Callable[..., Any]
    shape_of: Callable[..., Any]
    schema: str
    described: SplitOp
    #: Undoes the registrations when it dies.
    library: Any = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def fake(self, *args: Any, **kwargs: Any) -> Any:
        return self.shape_of(*args, **kwargs)

    def replaced(self, *args: Any, **kwargs: Any) -> Any:
        """What a graph calls that was compiled with a definition of another form."""
        raise OptionsError(
            message(
                f"split op {self.described.name!r} was defined again with other arguments or roles",
                why="The model was compiled with the definition before.",
                cure="Have it compiled again: torch.compiler.reset()",
            )
        )


#: Registry of the ops that split_op defined.
_DEFINED: dict[str, _Definition] = {}


def split_op(
    name: str, *, mutates_args: Iterable[str] = (), fake: Callable[..., Any] | None = None, **metadata: Any
) -> Callable[[_F], _F]:
    """Defines an op from a Python function and registers it as a split op, in one go.

    The function's annotations give the schema. An op that returns nothing needs no fake implementation;
    one that returns tensors takes it as ``fake``, and without it its results are taken to be shaped like
    its first tensor argument. ``metadata`` is passed on to :func:`register_split_op`.

    What the decorator returns calls the op, as ``torch.ops.library.op`` does, so a model that calls it by its
    Python name is split there. A program calls the function itself, without the dispatcher. Defining an op again, as a
    notebook's cell does that is run twice, replaces it.

    Raises:
        OptionsError: a bad name; an argument in ``mutates_args``, or in a role, that the function does not have.
        ValueError: an annotation that has no schema type (from ``torch.library``).
    """
    _check_name(name)
    known = inspect.signature(register_split_op).parameters
    for key in metadata:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise OptionsError(
                message(
                    f"split_op {name!r} has no option {key!r}.{hint}",
                    why=f"It takes: mutates_args, fake, {', '.join(known)}.",
                    cure=f'Write, for example: @pcg.split_op("{name}", qo_indptr="cu_seqlens")',
                )
            )

    def define(function: _F) -> _F:
        mutated = tuple(mutates_args)
        parameters = inspect.signature(function).parameters
        for argument in mutated:
            if argument not in parameters:
                raise OptionsError(
                    message(
                        f"split_op {name!r} mutates {argument!r}, which {function.__qualname__} does not take",
                        why=f"It takes: {', '.join(parameters)}.",
                        cure=f'Write: @pcg.split_op("{name}", mutates_args=("{next(iter(parameters), "out")}",))',
                    )
                )
        schema = torch.library.infer_schema(function, mutates_args=mutated)
        described = _describe(name, schema, metadata)
        if schema.rstrip().endswith("-> ()"):
            shape_of: Callable[..., Any] = _nothing
        else:
            shape_of = fake if fake is not None else _like_first_tensor
        _define(_Definition(function, shape_of, schema, described))
        library, op = name.split("::")

        @functools.wraps(function)
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            return getattr(getattr(torch.ops, library), op)(*args, **kwargs)

        return dispatch  # type: ignore[return-value]

    return define


def _describe(name: str, schema: str, metadata: Mapping[str, Any]) -> SplitOp:
    """The registration that ``metadata`` ask for, its roles checked."""
    roles = {role: metadata[role] for role in _METADATA if metadata.get(role) is not None}
    rest = {key: value for key, value in metadata.items() if key not in _METADATA}
    described = SplitOp(name, MappingProxyType(roles), **rest)
    _check_roles(described, types_of_arguments(name.split("::")[1] + schema))
    return described


def _define(new: _Definition) -> None:
    name = new.described.name
    before = _DEFINED.get(name)
    if before is not None and (before.schema, before.described) == (new.schema, new.described):
        # Graphs that were compiled with it go on, with what it does now.
        before.function, before.shape_of = new.function, new.shape_of
        return
    if before is not None:
        before.function = before.replaced
        before.library = None
    library, op = name.split("::")
    new.library = torch.library.Library(library, "FRAGMENT")
    new.library.define(op + new.schema)
    new.library.impl(op, new.call, "CompositeExplicitAutograd")
    torch.library.register_fake(name, new.fake, lib=new.library)
    _DEFINED[name] = new
    add_split_op(replace(new.described, function=new.call))


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _like_first_tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
    first = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
    return torch.empty_like(first)
