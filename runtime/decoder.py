"""A compiled model with its KV cache: rows in, logits out, and transactions on what was appended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from graft.codegen.executable import Executable
from graft.compiler.errors import StateError
from graft.compiler.ops import NO_PARENT
from graft.compiler.program import Function
from graft.runtime.kv_overlay import KVOverlay
from graft.runtime.kv_store import KVStore
from graft.runtime.top_tokens import shares_of, top_rows

ALONE_ROWS = 512
"""Tokens that `best_after` looks at in one call."""
OWN_TEXTS, OWN_LENGTH = 32, 128
"""How many texts `own_text` writes at once, and tokens of a text."""
OWN_TEMPERATURE = 0.7
"""Between greedy text, which soon repeats itself, and text that is unlike what is decoded greedily."""


@dataclass
class Rows:
    """Rows of one call: any mix of prefill chunks, single tokens and draft trees; rows of one slot stand together."""

    slots: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add_chain(self, slot: int, tokens: Sequence[int], position: int, want_all: bool = False) -> None:
        """Consecutive tokens of a sequence, the first at `position`; the last one's logits are wanted, or all."""
        first = len(self)
        self.slots += [slot] * len(tokens)
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        self.parents += [NO_PARENT, *range(first, first + len(tokens) - 1)]
        self.wanted += range(first, len(self)) if want_all else [len(self) - 1]

    def add_tree(self, slot: int, root: int, tokens: Sequence[int], parents: Sequence[int], position: int) -> None:
        """The root token at `position` and the tree drafted behind it, parents as in DraftTree; all logits wanted."""
        first = len(self)
        depths = [0]
        for parent in parents:
            depths.append(depths[parent + 1] + 1)
        self.slots += [slot] * len(depths)
        self.tokens += [root, *tokens]
        self.positions += [position + depth for depth in depths]
        self.parents += [NO_PARENT, *(first + 1 + parent for parent in parents)]
        self.wanted += range(first, first + len(depths))


class Decoder:
    """Runs one function over sequences, each in a slot of the KV store.

    A call appends its rows to their slots uncommitted; `commit` keeps a path of them, `rollback` none. A slot's next
    call comes after one of the two.
    """

    def __init__(
        self,
        function: Function,
        executable: Executable,
        vocabulary: int,
        max_positions: int | None,
        store: KVStore | KVOverlay | None = None,
    ) -> None:
        """`store` holds the function's states, perhaps among others; None for one of its own."""
        self.function, self.executable = function, executable
        self.vocabulary, self.max_positions = vocabulary, max_positions
        self.device = function.device
        self.paged = any(state.pages is not None for state in function.states)
        self.store = KVStore(function.states, self.device) if store is None else store
        self.shared: dict[str, object] = {}
        """State of drafters that outlives a generate() call (compiler.drafting.Target)."""
        self.first_token: int | None = None
        """What texts start with, where the model has such a token."""
        self.functions: dict[str, Decoder] = {}
        """Of the target: what runs the functions that draft, by name."""
        self.keeps_hidden = False
        """Whether `hidden` is wanted."""
        self.hidden: Tensor | None = None
        """[rows, width]: the second result of the latest call, of a target the final hidden states of every row."""

    def share_threads(self, beside: Decoder) -> None:
        """Let this model and what drafts for it work with another's threads, whose calls alternate with its own."""
        for one in (self, *self.functions.values()):
            one.executable.share_threads(beside.executable)

    def open(self, prompt: int = 0) -> int:
        """A free slot for a new sequence, whose prompt has so many tokens if that is known."""
        return self.store.open(prompt)

    def room(self, slot: int) -> int | None:
        """How many positions rows may take behind the slot's committed tokens in one call; None where any number."""
        trigger = self.store.trigger(slot)
        return None if trigger is None else trigger - self.length(slot)

    def close(self, slot: int) -> None:
        """Give the slot back; its tokens are forgotten. Closing twice is an error."""
        self.store.close(slot)

    def length(self, slot: int) -> int:
        """Committed tokens of the slot."""
        return self.store.lengths[slot]

    def forward(self, rows: Rows, *own: Tensor) -> Tensor:
        """float32 logits [len(rows.wanted), vocabulary]; the rows are appended to their slots, uncommitted.

        `own` are the function's row inputs (compiler.program.Function.row_inputs), one value for each row.
        """
        if not rows.tokens:
            raise StateError("a call needs at least one row", found="none")
        self.store.append(rows.slots)
        try:
            with torch.inference_mode():
                columns = [rows.tokens, rows.positions, rows.slots, rows.parents, self.store.lengths, rows.wanted]
                inputs = [torch.tensor(column, dtype=torch.int64, device=self.device) for column in columns]
                states = self.function.states
                far = self.store.far_inputs(states) if self.paged else []
                logits, hidden = self.executable(*inputs, *own, *self.store.select(states), *far)
        except BaseException:
            for slot in set(rows.slots):
                self.store.rollback(slot)
            raise
        self.hidden = hidden if self.keeps_hidden else None
        return logits

    def top(self, logits: Tensor, count: int) -> Tensor:
        """int64 [rows, count]: the ids of the best tokens of each row of logits, best first."""
        found = self.executable.top(logits, count)
        return top_rows(logits, count) if found is None else found

    def best(self, logits: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
        """[rows, count] of at most so many best tokens of each row of logits, best first: ids, and probabilities."""
        tokens = self.top(logits, min(count, logits.shape[1]))
        return tokens.cpu().numpy(), shares_of(logits, tokens)

    def best_after(self, tokens: Sequence[int], count: int) -> np.ndarray:
        """See `compiler.drafting.Target`. A text starts with the model's first token where it has one."""
        slot, found = self.open(), []
        start = [] if self.first_token is None else [self.first_token]
        try:
            if start:
                self.forward(Rows([slot], [*start], [0], [NO_PARENT], [0]))
                self.commit(slot, [0])
            for first in range(0, len(tokens), ALONE_ROWS):
                some = list(tokens[first : first + ALONE_ROWS])
                rows = len(some)
                places, parents = [len(start)] * rows, [NO_PARENT] * rows
                logits = self.forward(Rows([slot] * rows, some, places, parents, list(range(rows))))
                found.append(self.top(logits, count).cpu().numpy())
                self.rollback(slot)
        finally:
            self.close(slot)
        return np.concatenate(found)

    def own_text(self, tokens: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `compiler.drafting.Target`. Every text begins with another token, the likeliest first. What follows is
        drawn among the `count` best by a fixed seed. The KV cache is one of its own, which is gone afterwards."""
        alone = Decoder(self.function, self.executable, self.vocabulary, self.max_positions)
        start = [] if self.first_token is None else [self.first_token]
        length = OWN_LENGTH if self.max_positions is None else min(OWN_LENGTH, self.max_positions - len(start))
        number = -(-tokens // length)
        first = list(range(min(number, self.vocabulary)))
        if start:
            row, slot = Rows(), alone.open()
            row.add_chain(slot, start, 0)
            first = alone.top(alone.forward(row), len(first))[0].tolist()
            alone.close(slot)
        draws = np.random.default_rng(0)
        openings = [[*start, first[text % len(first)]] for text in range(number)]
        groups = [openings[begin : begin + OWN_TEXTS] for begin in range(0, number, OWN_TEXTS)]
        parts = [alone.write(group, length, count, draws) for group in groups]
        return np.concatenate([texts for texts, _ in parts]), np.concatenate([best for _, best in parts])

    def write(
        self, texts: Sequence[list[int]], length: int, count: int, draws: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Go on with texts, which are equally long, drawing among the `count` best next tokens: int64 [texts, length]
        from their last tokens on, and int64 [texts, length, count], the best next tokens there."""
        slots = [self.open() for _ in texts]
        chains = list(texts)
        written: list[list[int]] = []
        best: list[np.ndarray] = []
        while len(written) < length:
            rows = Rows()
            for slot, chain in zip(slots, chains, strict=True):
                rows.add_chain(slot, chain, self.length(slot))
            logits = self.forward(rows)
            ids = self.top(logits, count)
            scores = logits.gather(1, ids).double().cpu().numpy() / OWN_TEMPERATURE
            written.append([chain[-1] for chain in chains])
            best.append(ids.cpu().numpy())
            for slot, chain in zip(slots, chains, strict=True):
                self.commit(slot, range(len(chain)))
            # The greatest score with Gumbel noise is a draw from their softmax.
            drawn = (scores + draws.gumbel(size=scores.shape)).argmax(1)
            chains = [[token] for token in best[-1][np.arange(len(slots)), drawn].tolist()]
        for slot in slots:
            self.close(slot)
        return np.array(written, np.int64).T, np.stack(best, 1)

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep these of the slot's uncommitted rows, named by their place among them, in order; drop the others."""
        self.store.commit(slot, path)

    def rollback(self, slot: int) -> None:
        """Drop the slot's uncommitted rows."""
        self.store.rollback(slot)

    def truncate(self, slot: int, length: int) -> None:
        """Forget the slot's tokens behind the first `length`."""
        self.store.truncate(slot, length)
