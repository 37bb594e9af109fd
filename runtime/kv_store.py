"""The owner of the KV cache's bytes, and the transaction on it: append, then commit a path or roll back.

Rows are appended behind the committed tokens of their slot. Commit gathers the accepted rows to the front of the
uncommitted ones, one operation per state whatever the number of layers, and only then do they count. Nothing but
committed tokens may ever be scored, encoded or evicted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from graft.compiler.errors import StateError
from graft.compiler.program import KVState

FIRST_CAPACITY = 256
"""Tokens per slot at first; capacity doubles when a slot needs more."""


class KVStore:
    """One tensor [layers, slots, kv heads, capacity, key dim + value dim] for each state."""

    def __init__(self, states: Sequence[KVState], device: torch.device) -> None:
        self.states, self.device = tuple(states), device
        self.tensors = [self.allocate(state, 0, FIRST_CAPACITY) for state in self.states]
        self.lengths: list[int] = []
        """Committed tokens, by slot."""
        self.pending: list[int] = []
        """Uncommitted rows, by slot."""
        self.free: list[int] = []

    @property
    def capacity(self) -> int:
        """Tokens that each slot has room for at present."""
        return self.tensors[0].shape[3] if self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def open(self) -> int:
        """A free slot; the store grows where there is none."""
        if not self.free:
            slots = max(1, 2 * len(self.lengths))
            self.resize(slots, self.capacity)
            self.free = list(range(slots - 1, len(self.lengths) - 1, -1))
            self.pending += [0] * (slots - len(self.lengths))
            self.lengths += [0] * (slots - len(self.lengths))
        return self.free.pop()

    def close(self, slot: int) -> None:
        """Give a slot back."""
        if slot in self.free or not 0 <= slot < len(self.lengths):
            raise StateError("the slot is not open", found=slot)
        self.lengths[slot] = self.pending[slot] = 0
        self.free.append(slot)

    def append(self, slots: Sequence[int]) -> None:
        """Make room for one more row of each slot named, as often as it is named, and mark the rows uncommitted.

        Raises StateError if a slot has uncommitted rows already, or if memory runs out; then nothing has changed.
        """
        counts = Counter(slots)
        for slot in counts:
            if self.pending[slot]:
                raise StateError(
                    "the slot has uncommitted rows",
                    where=f"slot {slot}",
                    remedy="commit or roll back before the next call",
                )
        need = max(self.lengths[slot] + count for slot, count in counts.items())
        if need > self.capacity:
            self.resize(len(self.lengths), max(2 * self.capacity, need))
        for slot, count in counts.items():
            self.pending[slot] = count

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep the uncommitted rows at these places, in this order, behind the committed tokens; drop the others."""
        length, count = self.lengths[slot], self.pending[slot]
        outside = any(not 0 <= place < count for place in path)
        if outside or any(second <= first for first, second in pairwise(path)):
            raise StateError(
                "a commit names rows that were not appended in that order",
                expected=f"rising places below {count}",
                found=list(path),
                where=f"slot {slot}",
            )
        stay = next((index for index, place in enumerate(path) if place != index), len(path))
        if stay < len(path):
            for tensor in self.tensors:
                gather(tensor[:, slot, :, length:], path[stay:], stay)
        self.lengths[slot], self.pending[slot] = length + len(path), 0

    def rollback(self, slot: int) -> None:
        """Drop the slot's uncommitted rows."""
        self.pending[slot] = 0

    def resize(self, slots: int, capacity: int) -> None:
        """Reallocate, keeping what is stored; the old tensors stay in place if memory runs out."""
        try:
            grown = [self.allocate(state, slots, capacity) for state in self.states]
        except (RuntimeError, MemoryError) as error:
            raise StateError(
                "no memory for the KV cache",
                expected=f"{sum(s.bytes_per_token for s in self.states) * slots * capacity} bytes",
                found=str(error).splitlines()[0],
                remedy="fewer sequences at once, or a shorter context",
            ) from error
        for new, old in zip(grown, self.tensors, strict=True):
            new[:, : old.shape[1], :, : old.shape[3]] = old
        self.tensors = grown

    def allocate(self, state: KVState, slots: int, capacity: int) -> Tensor:
        """Zeros, so that what was never written can be read without harm."""
        shape = (state.layers, slots, state.heads, capacity, state.key_dim + state.value_dim)
        return torch.zeros(shape, dtype=state.dtype, device=self.device)


def gather(rows: Tensor, places: Sequence[int], start: int) -> None:
    """Move these of the rows of [layers, kv heads, rows, dim] to the places from `start` on, in their order.

    On the CPU by numpy, in the calling thread: torch wakes its thread pool for some hundred kilobytes, which takes
    milliseconds where other threads wait for the next step.
    """
    end = start + len(places)
    if rows.device.type == "cpu":
        width = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[rows.element_size()]
        values = rows.view(getattr(torch, np.dtype(width).name)).numpy()
        values[:, :, start:end] = values[:, :, list(places)]
    else:
        rows[:, :, start:end] = rows.index_select(2, torch.tensor(places, device=rows.device))
