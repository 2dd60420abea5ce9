"""The registry of split ops: ops that run between pieces, outside every recording."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from .errors import OptionsError, message

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
        any_strides: True where the op takes tensors of any strides, so that a slice need not be copied.
        function: the Python implementation, called directly where known, without the dispatcher.
        bind: ``fn(*args, **kwargs) -> Callable[[], None]``, called once when a program is built.
        bucket_args: positions of int arguments that are the bucket's even in slice mode (metadata preparation).
        late: True where the sizes of its results follow from the padding, so that nothing static can hold them.
        own_metadata: True where the op takes its metadata from the step, which pads it.
        optional_step: True where no running step means that there is nothing to prepare.
        bind_whole: like ``bind``, for metadata that come before the recording of a whole step; the callable returns
            what the recording bakes in, or raises ``DoesNotFit``.
        recordable: True where a recording of the whole step may hold the op (``cudagraph_mode="full"``): it reads
            whatever changes from step to step from its tensor arguments, on the device.
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
    bind_whole: Callable[..., Callable[[], Any]] | None = None
    recordable: bool = False
    needs_none: tuple[str, ...] = ()
    compiled: bool = False
    fallback: Callable[..., str | None] | None = None
    uncapturable: Callable[..., str | None] | None = None

    @property
    def paged(self) -> bool:
        """Whether the op reads KV pages."""
        return any(role in self.metadata for role in ("kv_indices", "last_page_len", "slot_mapping"))


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
            whatever changes from step to step from its tensor arguments, on the device; any other would be silently
            wrong.

    Raises:
        OptionsError: ``name`` is not of the form "library::op".
    """
    roles = dict(
        zip(
            _METADATA,
            (qo_indptr, kv_indptr, kv_indices, last_page_len, slot_mapping, max_qo_len, max_kv_len),
            strict=True,
        )
    )
    add_split_op(
        SplitOp(
            name,
            MappingProxyType({role: arg for role, arg in roles.items() if arg is not None}),
            scratch_page=scratch_page,
            page_size=page_size,
            any_strides=any_strides,
            recordable=recordable,
        )
    )


def add_split_op(op: SplitOp) -> None:
    """Registers a fully described split op."""
    if op.name.count("::") != 1 or not all(op.name.split("::")):
        raise OptionsError(
            message(
                f"{op.name!r} is not the name of an op",
                why="A split op is named by its library and its name.",
                cure='Write: pcg.register_split_op("mylib::attention")',
            )
        )
    _REGISTRY[op.name] = op


def registered_split_ops() -> Mapping[str, SplitOp]:
    """All registered split ops by name."""
    return MappingProxyType(_REGISTRY)


def split_op(
    name: str, *, mutates_args: Iterable[str] = (), fake: Callable[..., Any] | None = None, **metadata: Any
) -> Callable[[_F], _F]:
    """Defines an op from a Python function and registers it as a split op, in one go.

    The function's annotations give the schema. An op that returns nothing needs no fake implementation;
    one that returns tensors takes it as ``fake``, and without it its results are taken to be shaped like
    its first tensor argument. ``metadata`` is passed on to :func:`register_split_op`.

    The function itself is what a program calls, without the dispatcher.

    Raises:
        OptionsError: a bad name, an argument in ``mutates_args`` that the function does not have.
        ValueError: an annotation that has no schema type (from ``torch.library``).
    """

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
        register_split_op(name, **metadata)
        schema = torch.library.infer_schema(function, mutates_args=mutated)
        library, op = name.split("::")
        fragment = torch.library.Library(library, "FRAGMENT")
        fragment.define(op + schema)
        fragment.impl(op, function, "CompositeExplicitAutograd")
        if schema.rstrip().endswith("-> ()"):
            shape_of: Callable[..., Any] = _nothing
        else:
            shape_of = fake if fake is not None else _like_first_tensor
        torch.library.register_fake(name, shape_of, lib=fragment)
        # The library object undoes its registrations when it dies: it lives as long as the function.
        function._pcg_library = fragment  # type: ignore[attr-defined]
        registered = _REGISTRY[name]
        add_split_op(replace(registered, function=function))
        return function

    return define


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _like_first_tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
    first = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
    return torch.empty_like(first)
