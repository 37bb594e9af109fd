"""Where the arrays lie that kernels hand to each other: an arena, in which places are used again."""

from __future__ import annotations

from graft.codegen.kernel_ir import Array, Kernel

LINE = 64
"""Bytes that arrays are aligned to."""


def place_arrays(kernels: tuple[Kernel, ...], external: frozenset[str]) -> tuple[dict[str, int], int]:
    """Bytes per row in front of each array in the arena, by name, and those of all together.

    An array's bytes are free again behind the last kernel that reads it. `external` arrays lie elsewhere.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    arrays: dict[str, Array] = {}
    for index, kernel in enumerate(kernels):
        for array in kernel.reads:
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
