"""The owner of the KV cache's bytes, and the transaction on it: append, then commit a path or roll back.

Rows are appended behind the committed tokens of their slot. Commit gathers the accepted rows to the front of the
uncommitted ones, one operation per state whatever the number of layers, and only then do they count. Nothing but
committed tokens may ever be scored, encoded or evicted.

A draft function that shares the target's KV runs on a `KVOverlay`: the same tensors, lengths of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from graft.codegen.huge_pages import zeros
from graft.compiler.errors import StateError
from graft.compiler.program import KVState
from graft.runtime.kv_pages import FarTokens

FIRST_CAPACITY = 256
"""Tokens per slot at first; capacity doubles when a slot needs more."""


class KVStore:
    """One tensor [layers, slots, kv heads, capacity, width] for each state, and pages for those that have them."""

    def __init__(self, states: Sequence[KVState], device: torch.device) -> None:
        self.states, self.device = tuple(states), device
        self.tensors = [self.allocate(state, 0, FIRST_CAPACITY) for state in self.states]
        self.least = FIRST_CAPACITY
        """Tokens that every tensor has room for in a slot."""
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
        for slot, count in counts.items() if self.far else ():
            trigger = self.trigger(slot)
            if trigger is not None and self.lengths[slot] + count >= trigger:
                for one in self.far.values():
                    one.reserve(slot, trigger)
        for slot, count in counts.items():
            self.pending[slot] = count

    def reserve(self, lengths: Mapping[int, int]) -> None:
        """Make room for so many tokens, by slot. Raises StateError if memory runs out; then nothing has changed."""
        if max(lengths.values()) <= self.least:
            return
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
        moved = first_moved(path, self.pending[slot], slot)
        if moved < len(path):
            gather_path(self.tails(self.states, slot), self.lengths[slot], path, moved)
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
        self.tensors, self.least = grown, min(capacities, default=0)

    def allocate(self, state: KVState, slots: int, capacity: int) -> Tensor:
        """Zeros, so that what was never written can be read without harm."""
        shape = (state.layers, slots, state.heads, capacity, state.width)
        return zeros(shape, state.dtype, self.device)


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


def first_moved(path: Sequence[int], count: int, slot: int) -> int:
    """The first index in a path, places among `count` uncommitted rows, whose row is not in its place already.

    Raises StateError unless the places rise.
    """
    outside = any(not 0 <= place < count for place in path)
    if outside or any(second <= first for first, second in pairwise(path)):
        raise StateError(
            "a commit names rows that were not appended in that order",
            expected=f"rising places below {count}",
            found=list(path),
            where=f"slot {slot}",
        )
    return next((index for index, place in enumerate(path) if place != index), len(path))


def gather_path(tails: Sequence[tuple[Tensor, int]], length: int, path: Sequence[int], moved: int) -> None:
    """Move the rows at these places behind `length` tokens to the front, in order, from index `moved` of the path on;
    `tails` as in `KVStore.tails`."""
    for tail, base in tails:
        gather(tail[:, :, length - base :], path[moved:], moved)


def check_length(slot: int, length: int, least: int, most: int) -> None:
    """Raise StateError unless the slot can be cut to `length` tokens."""
    if not least <= length <= most:
        raise StateError(
            "the slot cannot be cut to that length",
            expected=f"{least} to {most} tokens",
            found=length,
            where=f"slot {slot}",
        )
