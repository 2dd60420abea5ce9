"""CUDA: addresses, streams, captures that failed, and copies of many tensors at once (torch 2.11 to 2.15)."""

from __future__ import annotations

import warnings
from contextlib import suppress
from operator import eq
from typing import Any

import torch

from .probe import private

_READ = "2.11 to 2.13"
_compare_data_ptrs = private("torch._C._tensors_data_ptrs_at_indices_equal", _READ, optional=True)
_storage_at = private("torch._C._construct_storage_from_data_pointer", _READ)
_foreach_copy_ = private("torch._foreach_copy_", _READ)
_raw_stream = private("torch._C._cuda_getCurrentRawStream", "2.11 to 2.15", cuda=True)
_stream_key = private("torch._C._cuda_getCurrentStream", "2.11 to 2.15", cuda=True)
_end_allocate_to_pool = private("torch._C._cuda_endAllocateToPool", "2.11", cuda=True)
_release_pool = private("torch._C._cuda_releasePool", "2.11", cuda=True)


def data_ptrs_equal(tensors: list[Any], data_ptrs: list[int], indices: list[int]) -> bool:
    """Whether ``tensors[i].data_ptr()`` is ``data_ptrs[i]`` for each index ``i`` (2.11 to 2.13).

    CUDA builds have it as one call, 0.07 us a tensor.
    """
    if _compare_data_ptrs is not None:
        return bool(_compare_data_ptrs(tensors, data_ptrs, indices))
    addresses = map(torch.Tensor.data_ptr, map(tensors.__getitem__, indices))
    return all(map(eq, addresses, map(data_ptrs.__getitem__, indices)))


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
        return int(_raw_stream(index))

    def __call__(self) -> torch.cuda.Stream:
        index = torch.cuda.current_device() if self._index is None else self._index
        key = _stream_key(index)
        stream = self._known.get(key)
        if stream is None:
            stream = self._known[key] = torch.cuda.current_stream(index)
        return stream


def unowned_alias(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor at the same address that does not keep the memory (2.11 to 2.13).

    The results of a captured graph must not hold memory that later captured graphs may reuse.
    """
    storage = tensor.untyped_storage()
    borrowed = _storage_at(storage.data_ptr(), tensor.device, storage.nbytes())
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(borrowed, tensor.storage_offset(), tensor.size(), tensor.stride())


def abandon_capture(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> bool:
    """Ends a capture that failed, so it leaves no trace; whether its pool can be used again (2.11).

    Where CUDA gave the capture up as invalid, ``capture_end`` raises before it has told torch's allocator and random
    number generator: the allocator would refuse the pool from then on, and every later random number would raise.
    """
    try:
        graph.capture_end()
        return True
    except RuntimeError:  # what CUDA reports; what follows does the rest
        pass
    index = device.index if device.index is not None else torch.cuda.current_device()
    with suppress(RuntimeError):
        _end_allocate_to_pool(index, pool)
        _release_pool(index, pool)
    # The end of a capture that succeeds tells the generator.
    with suppress(RuntimeError), warnings.catch_warnings():
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
        _foreach_copy_(targets, sources, non_blocking=True)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, True)
