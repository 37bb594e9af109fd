"""The owner of the KV cache's bytes, and the transaction on it: append, then commit a path or roll back.

Rows are appended behind the committed tokens of their slot. Commit gathers the accepted rows to the front of the
uncommitted ones, one operation per state whatever the number of layers, and only then do they count. Nothing but
committed tokens may ever be scored, encoded or evicted.

A draft function that shares the target's KV runs on a `KVOverlay`: the same tensors, lengths of its own.
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
        self.reserve(need)
        for slot, count in counts.items():
            self.pending[slot] = count

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in each slot. Raises StateError if memory runs out; then nothing has changed."""
        if tokens > self.capacity:
            self.resize(len(self.lengths), max(2 * self.capacity, tokens))

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep the uncommitted rows at these places, in this order, behind the committed tokens; drop the others."""
        gather_path(self.tensors, slot, self.lengths[slot], self.pending[slot], path)
        self.lengths[slot], self.pending[slot] = self.lengths[slot] + len(path), 0

    def rollback(self, slot: int) -> None:
        """Drop the slot's uncommitted rows."""
        self.pending[slot] = 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget the slot's committed tokens behind the first `length`, and its uncommitted rows.

        Raises StateError where there are fewer.
        """
        check_length(slot, length, 0, self.lengths[slot])
        self.lengths[slot], self.pending[slot] = length, 0

    def select(self, states: Sequence[KVState]) -> list[Tensor]:
        """The tensors of these states, by name, as they are at present."""
        names = [state.name for state in self.states]
        return [self.tensors[names.index(state.name)] for state in states]

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


class KVOverlay:
    """The slots of a store under lengths of its own, for a draft function that reads and writes the same tensors.

    A slot holds the store's committed tokens and, behind them, what was committed here since. Those rows lie where the
    store's next uncommitted rows will, so the target overwrites them when it verifies, and they count for the draft
    alone; `truncate` forgets them. The store must neither have uncommitted rows of a slot that is used here, nor commit
    while rows are kept here: whoever drafts truncates first.
    """

    def __init__(self, store: KVStore, states: Sequence[KVState]) -> None:
        """`states` are those the draft function has, each one of the store's.

        Raises StateError for a state that the store does not hold in that layout.
        """
        held = {state.name: state for state in store.states}
        for state in states:
            if held.get(state.name) != state:
                raise StateError(
                    "a draft function shares a KV state that the target does not have in that layout",
                    expected=held.get(state.name) or f"one of {', '.join(held) or 'no states'}",
                    found=state,
                    remedy="a pass aimed at a draft that shares the target's KV must keep its layout",
                )
        self.store, self.states, self.device = store, tuple(states), store.device
        self.grown: dict[int, int] = {}
        """Slot -> rows kept behind the store's committed tokens."""
        self.pending: dict[int, int] = {}

    @property
    def lengths(self) -> list[int]:
        """Tokens that count for the draft function, by slot."""
        return [length + self.grown.get(slot, 0) for slot, length in enumerate(self.store.lengths)]

    @property
    def nbytes(self) -> int:
        """It holds no bytes of its own."""
        return 0

    def open(self) -> int:
        """Slots are the store's."""
        raise StateError("an overlay opens no slots", remedy="use the slots of the store below")

    def close(self, slot: int) -> None:
        """Forget what was kept of the slot, which stays the store's."""
        self.grown.pop(slot, None)
        self.pending.pop(slot, None)

    def append(self, slots: Sequence[int]) -> None:
        """As `KVStore.append`; the store must have no uncommitted rows of the slots either."""
        counts = Counter(slots)
        for slot in counts:
            if self.pending.get(slot) or self.store.pending[slot]:
                raise StateError(
                    "the slot has uncommitted rows",
                    where=f"slot {slot} of {'the overlay' if self.pending.get(slot) else 'the store below'}",
                    remedy="commit or roll back before the next call",
                )
        self.store.reserve(max(self.length(slot) + count for slot, count in counts.items()))
        self.pending.update(counts)

    def length(self, slot: int) -> int:
        """Tokens of the slot that count for the draft function."""
        return self.store.lengths[slot] + self.grown.get(slot, 0)

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """As `KVStore.commit`, here alone."""
        gather_path(self.select(self.states), slot, self.length(slot), self.pending.get(slot, 0), path)
        self.grown[slot] = self.grown.get(slot, 0) + len(path)
        self.pending.pop(slot, None)

    def rollback(self, slot: int) -> None:
        """Drop the slot's uncommitted rows."""
        self.pending.pop(slot, None)

    def truncate(self, slot: int, length: int) -> None:
        """As `KVStore.truncate`; the store's own tokens stay."""
        check_length(slot, length, self.store.lengths[slot], self.length(slot))
        self.grown[slot] = length - self.store.lengths[slot]
        self.pending.pop(slot, None)

    def select(self, states: Sequence[KVState]) -> list[Tensor]:
        """See `KVStore.select`."""
        return self.store.select(states)


def gather_path(tensors: Sequence[Tensor], slot: int, length: int, count: int, path: Sequence[int]) -> None:
    """Move the rows at these places of the `count` behind `length` to the front of them, in order."""
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
        for tensor in tensors:
            gather(tensor[:, slot, :, length:], path[stay:], stay)


def check_length(slot: int, length: int, least: int, most: int) -> None:
    """Raise StateError unless the slot can be cut to `length` tokens."""
    if not least <= length <= most:
        raise StateError(
            "the slot cannot be cut to that length",
            expected=f"{least} to {most} tokens",
            found=length,
            where=f"slot {slot}",
        )
