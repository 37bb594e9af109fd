"""Memory that is read from front to back in every step, in large pages where the system has them.

In pages of 4 KiB the weights and the KV cache take tens of thousands of address translations in a step, each from a
table that they have themselves driven out of the caches.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

LINE = 64
"""Bytes of a cache line, where every tensor begins."""
HUGE = 2 << 20
"""Bytes of a large page."""


class HugePages:
    """Room for so many tensors that take so many bytes together, side by side; in small pages if it has none."""

    def __init__(self, size: int, tensors: int = 1) -> None:
        """Raises MemoryError where the system refuses it."""
        size += LINE * tensors
        if not hasattr(mmap, "MADV_HUGEPAGE") or size < HUGE:
            self.free = torch.zeros(size + LINE, dtype=torch.uint8)
            start = -self.free.data_ptr() % LINE
        else:
            try:
                memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, OverflowError) as error:
                raise MemoryError(f"{size} bytes: {error}") from error
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
            self.free = torch.frombuffer(memory, dtype=torch.uint8)
            start = -self.free.data_ptr() % HUGE
        self.free = self.free[start:]

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros in the room that is left; it keeps the memory for as long as it lives."""
        size = math.prod(shape) * dtype.itemsize
        assert size <= len(self.free), (size, len(self.free))
        taken, self.free = self.free[:size], self.free[-(-size // LINE) * LINE :]
        return taken.view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy in the room that is left."""
        return self.zeros(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros, on the CPU in large pages."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return HugePages(math.prod(shape) * dtype.itemsize).zeros(shape, dtype)
