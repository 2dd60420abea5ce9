"""Staging: pinned host memory that metadata pass through on their way to the device.

A buffer is filled again only after the copy out of it has finished, which an event on the stream tells. Where
every buffer is still being copied the ring grows; only a host that is many steps ahead of its device waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..torch_internals import CurrentStream

__all__ = ["StagingBuffer", "StagingRing"]

_MOST_BUFFERS = 16


class StagingBuffer:
    """Host memory, and the event after which it may be written again.

    Attributes:
        host: uint8 CPU tensor, pinned where the device is CUDA. words, longs: the same memory as int32 and int64.
        array, word_array, long_array: the same as numpy arrays.
    """

    __slots__ = ("_event", "_recorded", "_stream", "array", "host", "long_array", "longs", "word_array", "words")

    def __init__(self, nbytes: int, device: torch.device, stream: CurrentStream) -> None:
        cuda = device.type == "cuda"
        self._stream = stream
        with torch.inference_mode(False):
            self.host = torch.zeros((nbytes + 7) // 8 * 8, dtype=torch.uint8, device="cpu", pin_memory=cuda)
            self.words, self.longs = self.host.view(torch.int32), self.host.view(torch.int64)
        self.array: npt.NDArray[np.uint8] = self.host.numpy()
        self.word_array: npt.NDArray[np.int32] = self.words.numpy()
        self.long_array: npt.NDArray[np.int64] = self.longs.numpy()
        self._event: Any = torch.cuda.Event() if cuda else None
        self._recorded = False

    @property
    def busy(self) -> bool:
        """Whether a copy out of it is still under way."""
        return self._recorded and not self._event.query()

    def wait(self) -> None:
        """Blocks until it may be written."""
        if self.busy:
            self._event.synchronize()

    def sent(self) -> None:
        """To be called once the copy out of it is enqueued on the current stream of its device."""
        if self._event is not None:
            self._event.record(self._stream())
            self._recorded = True


class StagingRing:
    """A ring of staging buffers for one device; on a CPU plain memory, used one after the other."""

    def __init__(self, device: torch.device, nbytes: int = 1 << 16, most: int = _MOST_BUFFERS) -> None:
        self.device = device
        self._nbytes, self._most = nbytes, most
        self._stream = CurrentStream(device)
        self._buffers: deque[StagingBuffer] = deque()

    def take(self, nbytes: int) -> StagingBuffer:
        """A buffer of at least ``nbytes`` that no copy reads. Call ``sent()`` on it after enqueueing the copy."""
        if nbytes > self._nbytes:
            # Larger from now on; a buffer still being copied is kept alive by torch's own pinned allocator.
            self._nbytes = 1 << (nbytes - 1).bit_length()
            for buffer in self._buffers:
                buffer.wait()
            self._buffers.clear()
        if self._buffers and (not self._buffers[0].busy or len(self._buffers) >= self._most):
            buffer = self._buffers.popleft()
            buffer.wait()
        else:
            buffer = StagingBuffer(self._nbytes, self.device, self._stream)
        self._buffers.append(buffer)
        return buffer

    def send(self, values: npt.NDArray[Any], target: torch.Tensor) -> None:
        """Copies a contiguous array into a contiguous tensor on the device, whose bytes it has exactly.

        Neither waits for the device nor copies from pageable memory.
        """
        nbytes = values.nbytes
        buffer = self.take(nbytes)
        buffer.array[:nbytes].view(values.dtype)[:] = values.ravel()
        target.view(-1).copy_(buffer.host[:nbytes].view(target.dtype), non_blocking=True)
        buffer.sent()

    def send_longs(self, parts: Sequence[npt.NDArray[np.int64]], target: torch.Tensor) -> None:
        """Like :meth:`send`, for int64 arrays that lie one after the other in ``target``."""
        buffer, at = self.take(8 * target.numel()), 0
        for part in parts:
            buffer.long_array[at : at + len(part)] = part
            at += len(part)
        target.copy_(buffer.longs[:at], non_blocking=True)
        buffer.sent()
