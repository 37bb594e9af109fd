"""Loops as they are printed: dims of one dropped, adjacent dims merged, operands counted up."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from graft.codegen.kernel_ir import Access, Instruction, Load, Loop, Reduce, Store


@dataclass
class Draft:
    """A loop in the making."""

    sizes: tuple[int, ...]
    reduced: int | None = None
    """Trailing dims that its reductions combine; None while it has no reduction."""
    body: list[Instruction] = field(default_factory=list)
    known: dict[object, int] = field(default_factory=dict)
    """What is in a register already."""

    def add(self, instruction: Instruction, key: object = None) -> int:
        """The instruction's place in the body; an equal one is not repeated."""
        key = key or (instruction if not isinstance(instruction, (Store, Reduce)) else None)
        if key is not None and key in self.known:
            return self.known[key]
        self.body.append(instruction)
        if key is not None:
            self.known[key] = len(self.body) - 1
        return len(self.body) - 1


def moved(one: Load | Store | Reduce, access: Access, dtype: torch.dtype) -> Instruction:
    """The instruction on another array."""
    match one:
        case Load():
            return Load(access, dtype)
        case Store(_, operand, _):
            return Store(access, operand, dtype)
        case Reduce(op, operand, _, divisor, _):
            return Reduce(op, operand, access, divisor, dtype)


def tidy(draft: Draft, locals_at: int) -> Loop:
    """The loop with dims of one dropped, adjacent dims merged where every access allows it, operands counted up."""
    reduced = draft.reduced or 0
    groups = [list(range(len(draft.sizes) - reduced)), list(range(len(draft.sizes) - reduced, len(draft.sizes)))]
    accesses = [one.access for one in draft.body if isinstance(one, (Load, Store, Reduce))]
    merged: list[list[tuple[int, int]]] = []
    for group in groups:
        dims: list[tuple[int, int]] = []  # (size, the axis whose strides count)
        for axis in group:
            if draft.sizes[axis] == 1:
                continue
            if dims and all(a.strides[dims[-1][1]] == a.strides[axis] * draft.sizes[axis] for a in accesses):
                dims[-1] = (dims[-1][0] * draft.sizes[axis], axis)
            else:
                dims.append((draft.sizes[axis], axis))
        merged.append(dims)
    if reduced and not merged[1]:
        merged[1] = [(1, len(draft.sizes) - 1)]
    axes = [axis for dims in merged for _, axis in dims]

    def renamed(access: Access) -> Access:
        operand = access.operand if access.operand >= 0 else locals_at - 1 - access.operand
        return Access(operand, access.offset, tuple(access.strides[axis] for axis in axes), access.selected)

    body = tuple(
        moved(one, renamed(one.access), one.dtype) if isinstance(one, (Load, Store, Reduce)) else one
        for one in draft.body
    )
    return Loop(tuple(size for dims in merged for size, _ in dims), len(merged[1]), body)
