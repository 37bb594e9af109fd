"""Where arrays and weights lie: an arena for what kernels hand to each other, panels for what they multiply with."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.codegen.kernel_ir import Array, Kernel

PANEL = 32
"""Outputs of a parameter that are stored side by side (include/matmul.h)."""
LINE = 64
"""Bytes that arrays are aligned to."""


def pack(weight: Tensor) -> Tensor:
    """A parameter [out, in] as panels [ceil(out / 32), in, 32]; in bfloat16 pairs of inputs, [.., ceil(in / 2), 32, 2].

    What a panel has beyond the parameter is zero.
    """
    out, depth = weight.shape
    paired = weight.dtype == torch.bfloat16
    panels, steps = -(-out // PANEL), -(-depth // 2) * 2 if paired else depth
    if (out, depth) != (panels * PANEL, steps):
        padded = weight.new_zeros(panels * PANEL, steps)
        padded[:out, :depth] = weight
        weight = padded
    if paired:
        return weight.view(panels, PANEL, steps // 2, 2).permute(0, 2, 1, 3).contiguous()
    return weight.view(panels, PANEL, steps).permute(0, 2, 1).contiguous()


def place_arrays(kernels: tuple[Kernel, ...], external: frozenset[str]) -> tuple[dict[str, int], int]:
    """Bytes per row in front of each array in the arena, by name, and those of all together.

    An array's bytes are free again behind the last kernel that reads it. `external` arrays lie elsewhere.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    arrays: dict[str, Array] = {}
    for index, kernel in enumerate(kernels):
        for array in kernel.arrays:
            if array.rows and array.name not in external:
                arrays[array.name] = array
                first.setdefault(array.name, index)
                last[array.name] = index
    offsets: dict[str, int] = {}
    for name in sorted(arrays, key=lambda name: (first[name], -row_bytes(arrays[name]))):
        alive = sorted(
            (offsets[other], offsets[other] + row_bytes(arrays[other]))
            for other in offsets
            if last[other] >= first[name] and first[other] <= last[name]
        )
        offset = 0
        for start, end in alive:
            if offset + row_bytes(arrays[name]) <= start:
                break
            offset = max(offset, end)
        offsets[name] = offset
    return offsets, max((offsets[name] + row_bytes(arrays[name]) for name in arrays), default=0)


def row_bytes(array: Array) -> int:
    """Bytes of one row, rounded up so that every array begins on a line for any number of rows."""
    return -(-array.width * array.dtype.itemsize // LINE) * LINE
