"""The KV store's transaction: append, then commit a path or roll back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from graft.compiler.errors import StateError
from graft.compiler.program import KVState
from graft.runtime.kv_overlay import KVOverlay
from graft.runtime.kv_store import FIRST_CAPACITY, KVStore

STATES = (KVState("kv_0", 2, 1, 2, 2, torch.float32), KVState("kv_1", 1, 3, 4, 1, torch.float32))


class Store(RuleBasedStateMachine):
    """The store against lists of the values that its rows were written with."""

    def __init__(self) -> None:
        super().__init__()
        self.store = KVStore(STATES, torch.device("cpu"))
        self.committed: dict[int, list[int]] = {}
        self.pending: dict[int, list[int]] = {}
        self.next_value = 1

    @rule()
    def open_a_slot(self) -> None:
        slot = self.store.open()
        assert slot not in self.committed
        self.committed[slot], self.pending[slot] = [], []

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def close_a_slot(self, data: Any) -> None:
        slot = data.draw(st.sampled_from(sorted(self.committed)))
        self.store.close(slot)
        del self.committed[slot], self.pending[slot]

    @precondition(lambda self: any(not rows for rows in self.pending.values()))
    @rule(data=st.data(), count=st.integers(1, 150))
    def append_rows(self, data: Any, count: int) -> None:
        slot = data.draw(st.sampled_from(sorted(s for s, rows in self.pending.items() if not rows)))
        self.store.append([slot] * count)
        for row in range(count):
            for tensor in self.store.tensors:
                tensor[:, slot, :, self.store.lengths[slot] + row] = self.next_value
            self.pending[slot].append(self.next_value)
            self.next_value += 1

    @precondition(lambda self: any(self.pending.values()))
    @rule(data=st.data())
    def commit_a_path(self, data: Any) -> None:
        slot = data.draw(st.sampled_from(sorted(s for s, rows in self.pending.items() if rows)))
        places = range(len(self.pending[slot]))
        path = sorted(data.draw(st.sets(st.sampled_from(places), max_size=6)))
        self.store.commit(slot, path)
        self.committed[slot] += [self.pending[slot][place] for place in path]
        self.pending[slot] = []

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def roll_back(self, data: Any) -> None:
        slot = data.draw(st.sampled_from(sorted(self.pending)))
        self.store.rollback(slot)
        self.pending[slot] = []

    @invariant()
    def it_holds_the_committed_rows_in_order(self) -> None:
        for slot, values in self.committed.items():
            assert self.store.lengths[slot] == len(values)
            for tensor in self.store.tensors:
                found = tensor[:, slot, :, : len(values)]
                assert torch.equal(found, torch.tensor(values)[None, None, :, None].float().expand_as(found))


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


class Overlaid(Store):
    """The same with a draft that keeps rows behind the committed ones, on one of the states."""

    def __init__(self) -> None:
        super().__init__()
        self.overlay = KVOverlay(self.store, STATES[1:])
        self.kept: dict[int, list[int]] = {}

    @precondition(lambda self: any(not rows for rows in self.pending.values()))
    @rule(data=st.data(), count=st.integers(1, 150), keep=st.booleans())
    def grow_a_chain(self, data: Any, count: int, keep: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(s for s, rows in self.pending.items() if not rows)))
        self.overlay.append([slot] * count)
        values = list(range(self.next_value, self.next_value + count))
        start = self.overlay.lengths[slot]
        for row, value in enumerate(values):
            for tensor in self.overlay.select(STATES[1:]):
                tensor[:, slot, :, start + row] = value
        self.next_value += count
        path = sorted(data.draw(st.sets(st.sampled_from(range(count)), max_size=6))) if keep else []
        self.overlay.commit(slot, path) if keep else self.overlay.rollback(slot)
        self.kept.setdefault(slot, []).extend(values[place] for place in path)

    @precondition(lambda self: any(self.kept.get(slot) for slot in self.committed))
    @rule(data=st.data())
    def cut_it_back(self, data: Any) -> None:
        slot = data.draw(st.sampled_from(sorted(slot for slot in self.committed if self.kept.get(slot))))
        left = data.draw(st.integers(0, len(self.kept[slot])))
        self.overlay.truncate(slot, self.store.lengths[slot] + left)
        del self.kept[slot][left:]

    @rule(data=st.data(), count=st.integers(1, 150))
    @precondition(lambda self: any(not rows for rows in self.pending.values()))
    def append_rows(self, data: Any, count: int) -> None:
        for slot in self.committed:
            self.forget(slot)
        super().append_rows(data, count)

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def close_a_slot(self, data: Any) -> None:
        for slot in self.committed:
            self.forget(slot)
        super().close_a_slot(data)

    def forget(self, slot: int) -> None:
        self.overlay.close(slot)
        self.kept.pop(slot, None)

    @invariant()
    def it_shows_the_kept_rows_behind_the_committed_ones(self) -> None:
        for slot, values in self.committed.items():
            shown = [*values, *self.kept.get(slot, [])]
            assert self.overlay.lengths[slot] == len(shown)
            (tensor,) = self.overlay.select(STATES[1:])
            found = tensor[:, slot, :, : len(shown)]
            assert torch.equal(found, torch.tensor(shown)[None, None, :, None].float().expand_as(found))


TestOverlaid = Overlaid.TestCase
TestOverlaid.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_an_overlay_refuses_other_layouts_and_rows_that_are_not_decided() -> None:
    store = KVStore(STATES, torch.device("cpu"))
    with pytest.raises(StateError, match="does not have in that layout"):
        KVOverlay(store, [KVState("kv_1", 1, 3, 4, 2, torch.float32)])
    overlay = KVOverlay(store, STATES)
    slot = store.open()
    store.append([slot])
    with pytest.raises(StateError, match="slot 0 of the store below"):
        overlay.append([slot])
    store.commit(slot, [0])
    overlay.append([slot])
    with pytest.raises(StateError, match="slot 0 of the overlay"):
        overlay.append([slot])
    with pytest.raises(StateError, match="expected: 1 to 1 tokens"):
        overlay.truncate(slot, 0)


def test_appending_twice_without_a_decision_is_refused() -> None:
    store = KVStore(STATES, torch.device("cpu"))
    slot = store.open()
    store.append([slot])
    with pytest.raises(StateError, match="uncommitted rows"):
        store.append([slot])
    store.rollback(slot)
    store.append([slot])


@pytest.mark.parametrize("path", [[2], [-1], [1, 0], [0, 0]])
def test_a_commit_of_rows_that_were_not_appended_is_refused(path: list[int]) -> None:
    store = KVStore(STATES, torch.device("cpu"))
    slot = store.open()
    store.append([slot, slot])
    with pytest.raises(StateError, match="not appended in that order"):
        store.commit(slot, path)
    assert store.lengths[slot] == 0 and store.pending[slot] == 2


def test_closing_a_slot_twice_is_refused() -> None:
    store = KVStore(STATES, torch.device("cpu"))
    slot = store.open()
    store.close(slot)
    with pytest.raises(StateError, match="not open"):
        store.close(slot)


def test_memory_that_runs_out_is_said_before_anything_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    store = KVStore(STATES, torch.device("cpu"))
    slot = store.open()
    store.append([slot])
    store.tensors[0][:, slot, :, 0] = 7.0
    store.commit(slot, [0])

    def full(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory: you tried to allocate too much")

    with monkeypatch.context() as patch:
        patch.setattr(store, "allocate", full)
        with pytest.raises(StateError, match="no memory for the KV cache"):
            store.append([slot] * (FIRST_CAPACITY + 1))
    assert store.lengths[slot] == 1 and store.pending[slot] == 0
    assert (store.tensors[0][:, slot, :, 0] == 7.0).all()
    store.append([slot])
    store.commit(slot, [0])
    assert store.lengths[slot] == 2


def test_its_bytes_are_those_of_its_tensors() -> None:
    store = KVStore(STATES, torch.device("cpu"))
    store.open()
    per_token = sum(state.bytes_per_token for state in STATES)
    assert store.nbytes == per_token * FIRST_CAPACITY
