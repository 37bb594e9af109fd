"""The owner of the KV cache's bytes, and the transaction on it: append, then commit a path or roll back.

Rows are appended behind the committed tokens of their slot. Commit gathers the accepted rows to the front of the
uncommitted ones, one operation per state whatever the number of layers, and only then do they count. Nothing but
committed tokens may ever be scored, encoded or evicted.

A draft function that shares the target's KV runs on a `KVOverlay`: the same tensors, lengths of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from graft.compiler.errors import StateError
from graft.compiler.program import KVState
from graft.runtime.kv_pages import FarTokens

FIRST_CAPACITY = 256
"""Tokens per slot at first; capacity doubles when a slot needs more."""


class KVStore:
    """One tensor [layers, slots, kv heads, capacity, key dim + value dim] for each state."""

    def __init__(self, states: Sequence[KVState], device: torch.device) -> None:
        self.states, self.device = tuple(states), device
        self.tensors = [self.allocate(state, 0, FIRST_CAPACITY) for state in self.states]
        self.far = {state.name: FarTokens(state, device) for state in self.states if state.pages is not None}
        """Of states with pages."""
        self.lengths: list[int] = []
        """Committed tokens, by slot."""
        self.pending: list[int] = []
        """Uncommitted rows, by slot."""
        self.free: list[int] = []
        self.opened: Counter[int] = Counter()
        """Slot -> how often it was given to a sequence."""
        self.prompts: dict[int, int] = {}
        """Slot -> tokens of its prompt, where that was said."""
        self.layout = next((state.pages for state in self.states if state.pages is not None), None)
        for state in self.states:
            # One cut a slot: compress-kv gives all states that it changes one layout.
            assert state.pages in (None, self.layout), "states of one program have pages of one layout"

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return sum(self.bytes.values())

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes allocated, used or not, by what they are for: "dense" ones, and those of pages."""
        found = Counter(dense=sum(tensor.nbytes for tensor in self.tensors))
        for one in self.far.values():
            found.update(one.bytes)
        return dict(found)

    def open(self, prompt: int = 0) -> int:
        """A free slot; the store grows where there is none. `prompt`: so many tokens will be the text's prompt."""
        if not self.free:
            slots = max(1, 2 * len(self.lengths))
            self.resize(slots, [tensor.shape[3] for tensor in self.tensors])
            for one in self.far.values():
                one.resize(slots)
            self.free = list(range(slots - 1, len(self.lengths) - 1, -1))
            self.pending += [0] * (slots - len(self.lengths))
            self.lengths += [0] * (slots - len(self.lengths))
        slot = self.free.pop()
        self.prompts[slot] = prompt
        self.opened[slot] += 1
        return slot

    def close(self, slot: int) -> None:
        """Give a slot back."""
        if slot in self.free or not 0 <= slot < len(self.lengths):
            raise StateError("the slot is not open", found=slot)
        self.lengths[slot] = self.pending[slot] = 0
        for one in self.far.values():
            one.forget(slot)
        self.prompts.pop(slot, None)
        self.free.append(slot)

    def trigger(self, slot: int) -> int | None:
        """The length at which the slot's cut moves next; until then all rows see what is far alike, so none may stand
        at that position or behind it. None where nothing is ever far."""
        return self.layout.trigger(self.lengths[slot], self.prompts.get(slot, 0)) if self.layout else None

    def base(self, state: KVState, slot: int) -> int:
        """The position of the first token that the slot has in the state's tensor."""
        one = self.far.get(state.name)
        return 0 if one is None or one.layout.codec.in_place else one.cuts[slot]

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
        self.reserve({slot: self.lengths[slot] + count for slot, count in counts.items()})
        for slot, count in counts.items():
            trigger = self.trigger(slot)
            if trigger is not None and self.lengths[slot] + count >= trigger:
                for one in self.far.values():
                    one.reserve(slot, trigger)
        for slot, count in counts.items():
            self.pending[slot] = count

    def reserve(self, lengths: Mapping[int, int]) -> None:
        """Make room for so many tokens, by slot. Raises StateError if memory runs out; then nothing has changed."""
        held = [tensor.shape[3] for tensor in self.tensors]
        need = [max(length - self.base(state, slot) for slot, length in lengths.items()) for state in self.states]
        if any(more > there for more, there in zip(need, held, strict=True)):
            grown = [max(2 * there, more) if more > there else there for more, there in zip(need, held, strict=True)]
            self.resize(len(self.lengths), grown)

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep the uncommitted rows at these places, in this order, behind the committed tokens; drop the others.

        Where that is a length at which the cut moves, tokens go over into pages.
        """
        length, trigger = self.lengths[slot] + len(path), self.trigger(slot)
        if trigger is not None and length > trigger:
            raise StateError(
                "a commit goes beyond the position at which the cut moves",
                expected=f"{trigger} tokens at most",
                found=f"{length} tokens",
                where=f"slot {slot}",
                remedy="let rows end in front of KVStore.trigger(slot)",
            )
        gather_path(self.tails(self.states, slot), self.lengths[slot], self.pending[slot], path, slot)
        self.lengths[slot], self.pending[slot] = length, 0
        if length == trigger:
            self.move_cut(slot)

    def tails(self, states: Sequence[KVState], slot: int) -> list[tuple[Tensor, int]]:
        """For each state what the slot has [layers, kv heads, capacity, width], and the position of the first place."""
        known = {state.name: tensor for state, tensor in zip(self.states, self.tensors, strict=True)}
        return [(known[state.name][:, slot], self.base(state, slot)) for state in states]

    def move_cut(self, slot: int) -> None:
        """Let what is far of the slot go over into pages, and the tail begin behind it."""
        length = self.lengths[slot]
        for state, (tail, base) in zip(self.states, self.tails(self.states, slot), strict=True):
            if state.pages is not None:
                self.far[state.name].advance(slot, tail[:, :, : length - base], base, length)
                gone = self.base(state, slot) - base
                if gone:
                    tail[:, :, : length - base - gone] = tail[:, :, gone : length - base].clone()
        self.shrink()

    def shrink(self) -> None:
        """Give back what a long prompt took in tensors that hold tails, where most of it is not needed any more."""
        held = [tensor.shape[3] for tensor in self.tensors]
        need = [
            max([FIRST_CAPACITY, *(2 * (length - self.base(state, slot)) for slot, length in enumerate(self.lengths))])
            if state.pages is not None and not state.pages.codec.in_place
            else there
            for state, there in zip(self.states, held, strict=True)
        ]
        if any(2 * less < there for less, there in zip(need, held, strict=True)):
            self.resize(len(self.lengths), [min(less, there) for less, there in zip(need, held, strict=True)])

    def rollback(self, slot: int) -> None:
        """Drop the slot's uncommitted rows."""
        self.pending[slot] = 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget the slot's committed tokens behind the first `length`, and its uncommitted rows.

        Raises StateError where there are fewer.
        """
        check_length(slot, length, max([0, *(one.cuts[slot] for one in self.far.values())]), self.lengths[slot])
        self.lengths[slot], self.pending[slot] = length, 0

    def select(self, states: Sequence[KVState]) -> list[Tensor]:
        """The tensors of these states, by name, as they are at present."""
        names = [state.name for state in self.states]
        return [self.tensors[names.index(state.name)] for state in states]

    def far_inputs(self, states: Sequence[KVState], lengths: Sequence[int] | None = None) -> list[Tensor]:
        """What functions read of these states besides their tensors (KVState.far_inputs), texts having these lengths;
        the committed ones where none are given."""
        found: list[Tensor] = []
        for state in states:
            if state.pages is not None:
                one, bases = self.far[state.name], [self.base(state, slot) for slot in range(len(self.lengths))]
                held = [length - base for length, base in zip(lengths or self.lengths, bases, strict=True)]
                starts = [cut - base for cut, base in zip(one.cuts, bases, strict=True)]
                found += [torch.tensor(column, dtype=torch.int64, device=self.device) for column in (held, starts)]
                found += one.inputs()
        return found

    def resize(self, slots: int, capacities: Sequence[int]) -> None:
        """Reallocate, keeping what is stored; the old tensors stay in place if memory runs out."""
        sizes = list(zip(self.states, capacities, strict=True))
        try:
            grown = [self.allocate(state, slots, capacity) for state, capacity in sizes]
        except (RuntimeError, MemoryError) as error:
            raise StateError(
                "no memory for the KV cache",
                expected=f"{sum(state.tail_bytes_per_token * slots * capacity for state, capacity in sizes)} bytes",
                found=str(error).splitlines()[0],
                remedy="fewer sequences at once, or a shorter context",
            ) from error
        for new, old in zip(grown, self.tensors, strict=True):
            most = min(new.shape[3], old.shape[3])
            new[:, : old.shape[1], :, :most] = old[:, :, :, :most]
        self.tensors = grown

    def allocate(self, state: KVState, slots: int, capacity: int) -> Tensor:
        """Zeros, so that what was never written can be read without harm."""
        shape = (state.layers, slots, state.heads, capacity, state.width)
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
            if held.get(state.name) not in (state, replace(state, pages=None)):
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
        tails = self.store.tails(self.states, slot)
        gather_path(tails, self.length(slot), self.pending.get(slot, 0), path, slot)
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


def gather_path(
    tails: Sequence[tuple[Tensor, int]], length: int, count: int, path: Sequence[int], slot: int
) -> None:
    """Move the rows at these places of the `count` behind `length` tokens to the front of them, in order; `tails` as in
    `KVStore.tails`."""
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
        for tail, base in tails:
            gather(tail[:, :, length - base :], path[stay:], stay)


def check_length(slot: int, length: int, least: int, most: int) -> None:
    """Raise StateError unless the slot can be cut to `length` tokens."""
    if not least <= length <= most:
        raise StateError(
            "the slot cannot be cut to that length",
            expected=f"{least} to {most} tokens",
            found=length,
            where=f"slot {slot}",
        )
