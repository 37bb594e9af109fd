"""How often what a mask guards was skipped: counted by what runs a function, for each mask that guards work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graft.codegen.kernel_ir import AtenKernel, AttendKernel, ExpertKernel, Guard, Kernel, MatmulKernel


@dataclass(frozen=True)
class SkipCount:
    """What one guard did since counting began."""

    guard: str
    """As in KernelRecord."""
    regions: int
    """Runs of neighbouring kernels under it that have a product with weights or attention in them."""
    weights: int
    """Bytes of the parameters that those read."""
    calls: int
    skipped_calls: int
    """Calls in which no row needed them, so that no weight was read."""
    rows: int
    skipped_rows: int
    """Rows that did not need them, summed over the calls."""


@dataclass(frozen=True)
class Guarded:
    """What stands under one guard."""

    guard: Guard
    counter: int
    """The kernel that counts, by its place."""
    regions: int
    weights: int

    @property
    def name(self) -> str:
        """The mask, and which of its values needs the regions."""
        return guard_text(self.guard)

    def count(self, calls: int, skipped_calls: int, rows: int, skipped_rows: int) -> SkipCount:
        """With what was counted."""
        return SkipCount(self.name, self.regions, self.weights, calls, skipped_calls, rows, skipped_rows)


def guard_text(guard: Guard) -> str:
    """E.g. "some gt_3", "not all gt_3"."""
    return f"{'some' if guard.wanted else 'not all'} {guard.mask.name}"


def guarded_regions(kernels: Sequence[Kernel]) -> list[Guarded]:
    """The guards under which work stands that need not be done. What ATen runs row by row is not counted."""
    first: dict[Guard, int] = {}
    runs: dict[Guard, set[int]] = {}
    weights: dict[Guard, int] = {}
    run, before = 0, None
    for place, kernel in enumerate(kernels):
        guard = None if isinstance(kernel, AtenKernel) else kernel.guard
        run, before = run + (guard != before), guard
        if guard is None:
            continue
        first.setdefault(guard, place)
        if isinstance(kernel, MatmulKernel | ExpertKernel | AttendKernel):
            runs.setdefault(guard, set()).add(run)
            weights[guard] = weights.get(guard, 0) + weight_bytes(kernel)
    return [Guarded(guard, first[guard], len(held), weights[guard]) for guard, held in runs.items()]


def weight_bytes(kernel: Kernel) -> int:
    """Bytes of the rows of parameters that a product reads; of experts those that one row may choose."""
    if isinstance(kernel, ExpertKernel):
        chosen = min(kernel.slots, kernel.experts)
        return chosen * kernel.outputs * kernel.depth * kernel.weight_dtype.itemsize
    if not isinstance(kernel, MatmulKernel):
        return 0
    return sum(end - start for start, end in kernel.ranges) * kernel.depth * kernel.weight_dtype.itemsize
