"""A target cut in two behind a layer (passes/split.py): a step runs each part once for each row.

Drafting runs the layers below the exit and keeps the hidden states. A step then runs them for the rows that were not
drafted so: prompt chunks, the last token of a draft, what other drafters proposed. The layers above run for all rows,
over the hidden states, and write the KV of their layers beside that of the layers below.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graft.compiler.host import exit_questions
from graft.compiler.ops import NO_PARENT
from graft.runtime.decoder import Decoder, Rows


@dataclass
class Held:
    """What drafting left of one slot: a chain of rows behind the committed tokens, the root first."""

    layer: int
    tokens: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    """[1, width] for each of them."""


@dataclass
class Seconds:
    """Running means of what calls took, by the number of their rows."""

    mean: dict[int, float] = field(default_factory=dict)

    WEIGHT = 0.2
    """Of a new value; the first of a number of rows counts whole."""

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a call."""
        self.mean[rows] = self.mean.get(rows, seconds) + self.WEIGHT * (seconds - self.mean.get(rows, seconds))

    def at(self, rows: int) -> float:
        """Of a call over so many rows: that of the nearest number seen; 0 where none was."""
        return self.mean[min(self.mean, key=lambda known: abs(known - rows))] if self.mean else 0.0


class SplitTarget:
    """The parts of a target for every exit that it has. The shallow ones keep rows of their own behind the committed
    tokens (KVOverlay); the deep ones append to the target's store, so that commit and rollback are the target's."""

    def __init__(self, target: Decoder) -> None:
        self.target = target
        self.shallow: dict[int, Decoder] = {}
        self.deep: dict[int, Decoder] = {}
        for layer in exit_questions(target.functions):
            self.shallow[layer] = target.functions[f"shallow_{layer}"]
            self.shallow[layer].keeps_hidden = True
            above = target.functions[f"deep_{layer}"]
            self.deep[layer] = Decoder(
                above.function, above.executable, above.vocabulary, above.max_positions, target.store
            )
        self.layer = next(iter(self.shallow))
        """The exit of the present step."""
        self.held: dict[int, Held] = {}
        self.tokens: dict[str, int] = dict.fromkeys([*self.functions], 0)
        """Function -> rows that it has run, all calls together."""
        self.seconds: dict[str, Seconds] = {name: Seconds() for name in self.functions}

    @property
    def functions(self) -> list[str]:
        """Names of the parts."""
        return [f"{part}_{layer}" for layer in self.shallow for part in ("shallow", "deep")]

    def primitives(self) -> dict[str, Any]:
        """What the host program calls (compiler.host.split_host)."""
        found: dict[str, Any] = {}
        for layer, question in exit_questions(self.functions).items():
            found[f"shallow_{layer}"] = lambda rows, layer=layer: self.run_shallow(layer, rows)
            found[f"deep_{layer}"] = lambda rows, hidden, layer=layer: self.run_deep(layer, rows, hidden)
            found[question] = lambda requests, layer=layer: self.layer == layer
        return found

    def draft(self, layer: int, rows: Rows) -> Tensor:
        """Early logits of rows that go on a chain in each slot; what they leave is kept for the step."""
        logits = self.call(f"shallow_{layer}", self.shallow[layer], rows)
        hidden = self.shallow[layer].hidden
        assert hidden is not None
        for row, (slot, token) in enumerate(zip(rows.slots, rows.tokens, strict=True)):
            held = self.held.setdefault(slot, Held(layer))
            held.tokens.append(token)
            held.hidden.append(hidden[row : row + 1])
        return logits

    def forget(self, slot: int) -> None:
        """Drop what drafting left of the slot."""
        held = self.held.pop(slot, None)
        if held is not None:
            self.shallow[held.layer].close(slot)

    def run_shallow(self, layer: int, rows: Rows) -> Tensor:
        """The stream behind the layers below, [rows, width]; only rows that drafting did not leave are run."""
        rest, known = Rows(), dict[int, Tensor]()
        places: list[int] = []
        first = 0
        while first < len(rows):
            slot = rows.slots[first]
            count = sum(other == slot for other in rows.slots)
            held = self.held.get(slot)
            shared = self.shared_rows(held, rows, first, count) if held and held.layer == layer else 0
            if not shared:
                self.forget(slot)
            elif held is not None:
                below = self.shallow[layer]
                below.truncate(slot, self.target.length(slot) + shared)
                known |= {first + place: held.hidden[place] for place in range(shared)}
            behind = first + shared - 1
            moved = {behind: NO_PARENT, NO_PARENT: NO_PARENT}
            for row in range(first + shared, first + count):
                moved[row] = len(rest)
                places.append(row)
                rest.slots.append(slot)
                rest.tokens.append(rows.tokens[row])
                rest.positions.append(rows.positions[row])
                rest.parents.append(moved[rows.parents[row]])
            first += count
        parts = known
        if places:
            try:
                self.call(f"shallow_{layer}", self.shallow[layer], rest)
            finally:
                for slot in set(rows.slots):
                    self.shallow[layer].close(slot)
            hidden = self.shallow[layer].hidden
            assert hidden is not None
            if not known:
                self.drop(rows)
                return hidden
            parts = known | {row: hidden[place : place + 1] for place, row in enumerate(places)}
        self.drop(rows)
        return torch.cat([parts[row] for row in range(len(rows))])

    def drop(self, rows: Rows) -> None:
        """The step takes over what drafting left."""
        for slot in set(rows.slots):
            self.forget(slot)

    def shared_rows(self, held: Held, rows: Rows, first: int, count: int) -> int:
        """How many rows of a step, from `first` on, drafting has run: those of the chain that all others go on from."""
        shared = 0
        for place in range(min(len(held.tokens), count)):
            row = first + place
            parent = NO_PARENT if place == 0 else row - 1
            if rows.tokens[row] != held.tokens[place] or rows.parents[row] != parent:
                break
            shared += 1
        branches = [rows.parents[row] for row in range(first + shared, first + count)]
        while shared and any(parent < first + shared - 1 for parent in branches):
            shared -= 1
            branches.insert(0, rows.parents[first + shared])
        return shared

    def run_deep(self, layer: int, rows: Rows, hidden: Tensor) -> Tensor:
        """The target's logits for the wanted rows; all rows are appended to the target's store, uncommitted."""
        self.deep[layer].keeps_hidden = self.target.keeps_hidden
        logits = self.call(f"deep_{layer}", self.deep[layer], rows, hidden)
        self.target.hidden = self.deep[layer].hidden
        return logits

    def call(self, name: str, decoder: Decoder, rows: Rows, *own: Tensor) -> Tensor:
        """A call of a part, counted."""
        start = time.perf_counter()
        logits = decoder.forward(rows, *own)
        self.tokens[name] += len(rows)
        self.seconds[name].observe(len(rows), time.perf_counter() - start)
        return logits


def split_of(target: Any) -> SplitTarget:
    """The parts of a split target; made when first asked for, and kept with it."""
    shared: dict[str, Any] = target.shared
    if "split target" not in shared:
        shared["split target"] = SplitTarget(target)
    found = shared["split target"]
    assert isinstance(found, SplitTarget)
    return found
