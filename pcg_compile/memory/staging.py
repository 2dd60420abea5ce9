"""Staging: pinned host memory that metadata pass through on their way to the device.

A buffer is filled again only after the copy out of it has finished, which an event on the stream tells. Where
every buffer is still being copied the ring grows; only a host that is many steps ahead of its device waits.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..torch_compat.cuda import CurrentStream

__all__ = ["StagingBuffer", "StagingRing"]

_MOST_BUFFERS = 16
_MOST_VIEWS = 256


class StagingBuffer:
    """Host memory, and the event after which it may be written again.

    Attributes:
        host: uint8 CPU tensor, pinned where the device is CUDA. words, longs: the same memory as int32 and int64.
        array, word_array, long_array: the same as numpy arrays.
    """

    __slots__ = (
        "_captured",
        "_event",
        "_stream",
        "_views",
        "array",
        "host",
        "long_array",
        "longs",
        "word_array",
        "words",
    )  # fmt: skip

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
        self._captured = False
        self._views: dict[tuple[bool, int], torch.Tensor] = {}

    def first(self, count: int, longs: bool) -> torch.Tensor:
        """The first words or longs, as one view for each count: steps come with the same ones again and again."""
        view = self._views.get((longs, count))
        if view is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            view = self._views[longs, count] = (self.longs if longs else self.words)[:count]
        return view

    @property
    def busy(self) -> bool:
        """Whether a copy out of it is still under way."""
        return self._captured and not self._event.query()

    def wait(self) -> None:
        """Blocks until it may be written."""
        if self.busy:
            self._event.synchronize()

    def sent(self) -> None:
        """To be called once the copy out of it is enqueued on the current stream of its device."""
        if self._event is not None:
            self._event.record(self._stream())
            self._captured = True


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
        oldest = self._buffers[0] if self._buffers else None
        if oldest is None or oldest.busy:
            if len(self._buffers) < self._most:
                self._buffers.append(StagingBuffer(self._nbytes, self.device, self._stream))
                return self._buffers[-1]
            assert oldest is not None
            oldest.wait()
        self._buffers.rotate(-1)
        return oldest

    def send(self, values: npt.NDArray[Any], target: torch.Tensor) -> None:
        """Copies a contiguous array into a contiguous tensor on the device, whose bytes it has exactly.

        Neither waits for the device nor copies from pageable memory.
        """
        nbytes = values.nbytes
        buffer = self.take(nbytes)
        buffer.array[:nbytes].view(values.dtype)[:] = values.ravel()
        target.view(-1).copy_(buffer.host[:nbytes].view(target.dtype), non_blocking=True)
        buffer.sent()

    def send_longs(self, values: npt.NDArray[np.int64], target: torch.Tensor) -> None:
        """Like :meth:`send`, for int64."""
        count = len(values)
        buffer = self.take(8 * count)
        buffer.long_array[:count] = values
        target.copy_(buffer.first(count, longs=True), True)
        buffer.sent()
