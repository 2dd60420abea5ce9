"""Captures ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from .errors import PCGError, TraceError, message
from .registry import is_compiled, runtimes
from .runtime.ahead_of_time import WarmUp, warm_up_context
from .step import current_step
from .torch_compat.dynamo_traces import Marks, compile_for_all_sizes

__all__ = ["mark_sizes", "warmup"]

Buckets = Sequence[int | tuple[int, ...]]


def warmup(
    compiled: Any, *example_args: Any, buckets: Buckets | None = None, progress: bool = True, **kwargs: Any
) -> None:
    """Captures a compiled model's buckets now, largest first, and changes nothing else.

    Parameters, buffers, caches, the arguments and the random number generators are left as they were; inside
    ``pcg.step()`` only page 0 of the cache is written. A model that was not called before is compiled for all sizes.

    Nothing is returned: attention has read the scratch page, so the model's outputs would not be those of a step.

    Args:
        compiled: what ``torch.compile(model, backend="pcg")`` or ``@pcg.piecewise`` gave, or a module that has it as
            its forward or among its children.
        example_args, kwargs: arguments of one call; their sizes do not matter, their values must be valid.
        buckets: sizes to capture; tuples where the model has several dynamic sizes; None: the options' table.
        progress: show a progress bar with the bucket, the time left and the memory held.

    Raises:
        ValueError: ``buckets`` do not fit the model's dynamic sizes, or nothing in the model is compiled by pcg.
        BatchError: a model with paged attention outside ``pcg.step()``.
    """
    bar = _Progress(compiled) if progress else None
    request = WarmUp(buckets, bar.report if bar else lambda done, total, name: None)
    before = len(runtimes())
    try:
        sizes = compile_for_all_sizes(lambda: mark_sizes(example_args, kwargs, buckets))
        # With gradients there would be nothing to capture.
        with warm_up_context(request), sizes, torch.no_grad():
            compiled(*example_args, **kwargs)
        if request.served and not request.dynamic and len(runtimes()) == before:
            _capture_other_sizes(compiled, example_args, kwargs, request)
        if not request.served:
            name = getattr(compiled, "__name__", type(compiled).__name__)
            raise ValueError(
                message(
                    f"{name} ran, and nothing in it is compiled by pcg",
                    why="There is nothing to capture.",
                    cure='Compile it first: compiled = torch.compile(model, backend="pcg"); pcg.warmup(compiled, ...)',
                )
            )
    finally:
        if bar is not None:
            bar.close()


def mark_sizes(args: Any, kwargs: Any, buckets: Buckets | None = None) -> Marks:
    """The sizes to bucket: the step's token count where there is one, else each tensor's leading dimensions."""
    return [(tensor, dims, False) for tensor, dims in _sizes_to_bucket(args, kwargs, buckets)]


def _sizes_to_bucket(args: Any, kwargs: Any, buckets: Buckets | None) -> list[tuple[torch.Tensor, list[int]]]:
    """Tensors, and the dimensions of each; none where the caller has marked some."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim() > 0]
    marks = ("_dynamo_dynamic_indices", "_dynamo_weak_dynamic_indices")
    if any(getattr(t, mark, None) for t in tensors for mark in marks):
        return []
    step = current_step()
    several = max((len(b) for b in buckets or () if isinstance(b, tuple)), default=1)
    found = []
    for tensor in tensors:
        if step is not None:
            dims = [d for d, size in enumerate(tensor.shape) if size == step.batch.num_tokens]
        else:
            dims = list(range(min(several, tensor.dim())))
        if dims:
            found.append((tensor, dims))
    return found


def _capture_other_sizes(compiled: Any, args: Any, kwargs: Any, request: WarmUp) -> None:
    """Once more with one row more, where a graph of an earlier call has answered, which serves the one size alone.

    Dynamo compiles the first size that it meets for that size, and for all sizes when it meets another.
    """
    dims = {id(tensor): (tensor, dims) for tensor, dims in _sizes_to_bucket(args, kwargs, request.buckets)}
    grown: list[tuple[torch.Tensor, list[int]]] = []

    def grow(value: Any) -> Any:
        tensor, along = dims.get(id(value), (value, []))
        for dim in along:
            tensor = torch.cat((tensor, tensor.narrow(dim, 0, min(1, tensor.shape[dim]))), dim)
        if along:
            grown.append((tensor, along))
        return tensor

    args, kwargs = tree_map(grow, (args, kwargs))

    try:
        sizes = compile_for_all_sizes(lambda: [(tensor, along, False) for tensor, along in grown])
        with warm_up_context(request), sizes, torch.no_grad():
            compiled(*args, **kwargs)
    except Exception as error:
        if isinstance(error, PCGError) and not isinstance(error, TraceError):
            raise
        # A model may take the one size only.
        reason = f"warmup captured the size of the example alone: with one row more, {_first_line(error)}"
        for counters in request.counters:
            counters.fall_back(reason)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


class _Progress:
    """A tqdm bar over buckets."""

    def __init__(self, compiled: Any) -> None:
        # A function that calls compiled models is none itself: then the memory of all is shown.
        self.compiled = compiled if is_compiled(compiled) else None
        self.bar: Any = None

    def report(self, done: int, total: int, name: Any) -> None:
        if self.bar is None or self.bar.total != total or done < self.bar.n:
            self.close()
            self.bar = tqdm(total=total, unit="bucket", desc="captured graph")
        self.bar.update(done - self.bar.n)
        mebibytes = sum(runtime.nbytes() for runtime in runtimes(self.compiled)) / 2**20
        self.bar.set_postfix_str(f"{'' if name is None else f'bucket {name}, '}{mebibytes:.1f} MiB")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
