"""A KV store as a draft function sees it that shares the target's: its tensors, with lengths and pages apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from graft.compiler.errors import StateError
from graft.compiler.program import KVState
from graft.runtime.kv_pages import FarTokens
from graft.runtime.kv_store import KVStore, check_length, first_moved, gather_path


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
            if held.get(state.name) not in (state, replace(state, pages=None)):
                raise StateError(
                    "a draft function shares a KV state that the target does not have in that layout",
                    expected=held.get(state.name) or f"one of {', '.join(held) or 'no states'}",
                    found=state,
                    remedy="a pass aimed at a draft that shares the target's KV must keep its layout; one that reads "
                    "queries finds none there",
                )
        self.store, self.states, self.device = store, tuple(states), store.device
        self.grown: dict[int, int] = {}
        """Slot -> rows kept behind the store's committed tokens."""
        self.pending: dict[int, int] = {}
        self.far = {state.name: FarTokens(state, self.device) for state in states if held[state.name] != state}
        """Pages of the draft's own, where it reads compressed what the target reads as it is."""
        self.opened: dict[int, int] = {}
        """Slot -> which of its sequences those pages are of (KVStore.opened)."""

    @property
    def lengths(self) -> list[int]:
        """Tokens that count for the draft function, by slot."""
        return [length + self.grown.get(slot, 0) for slot, length in enumerate(self.store.lengths)]

    @property
    def nbytes(self) -> int:
        """Bytes of its own: pages alone."""
        return sum(self.bytes.values())

    @property
    def bytes(self) -> dict[str, int]:
        """See `KVStore.bytes`."""
        found: Counter[str] = Counter()
        for one in self.far.values():
            found.update(one.bytes)
        return dict(found)

    def open(self, prompt: int = 0) -> int:
        """Slots are the store's."""
        raise StateError("an overlay opens no slots", remedy="use the slots of the store below")

    def trigger(self, slot: int) -> int | None:
        """Drafts may go beyond the position at which the store's cut moves; what is kept here never gets there."""
        return None

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
        self.store.reserve({slot: self.length(slot) + count for slot, count in counts.items()})
        for slot in counts:
            self.catch_up(slot)
        self.pending.update(counts)

    def catch_up(self, slot: int) -> None:
        """Bring pages of the draft's own up to what the store has committed by now; the tail stays the store's."""
        for name, one in self.far.items():
            if len(one.cuts) < len(self.store.lengths):
                one.resize(len(self.store.lengths))
            if self.opened.get(slot) != self.store.opened[slot]:
                one.forget(slot)
            trigger = self.store.lengths[slot] // one.layout.every * one.layout.every
            ((tail, _),) = self.store.tails([state for state in self.states if state.name == name], slot)
            one.advance(slot, tail[:, :, :trigger], 0, trigger)
        self.opened[slot] = self.store.opened[slot]

    def length(self, slot: int) -> int:
        """Tokens of the slot that count for the draft function."""
        return self.store.lengths[slot] + self.grown.get(slot, 0)

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """As `KVStore.commit`, here alone."""
        moved = first_moved(path, self.pending.get(slot, 0), slot)
        if moved < len(path):
            gather_path(self.store.tails(self.states, slot), self.length(slot), path, moved)
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

    def far_inputs(self, states: Sequence[KVState]) -> list[Tensor]:
        """See `KVStore.far_inputs`."""
        found: list[Tensor] = []
        for state in states:
            one = self.far.get(state.name)
            if one is None:
                found += self.store.far_inputs([state], self.lengths)
            else:
                found += [torch.tensor(column, dtype=torch.int64) for column in (self.lengths, one.cuts)]
                found += one.inputs()
        return [tensor.to(self.device) for tensor in found]
