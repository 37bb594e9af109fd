"""Functions on flat rows and calls of them, for tests of what executes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from graft.compiler.program import Function
from tests.families import VOCABULARY

SLOTS, CAPACITY = 4, 96

Call = tuple[list[Tensor], list[int]]
"""The inputs of FLAT in their order, and the slot of each row."""


def call_of(trees: Sequence[tuple[int, Sequence[int]]], lengths: Sequence[int], seed: int = 0) -> Call:
    """A call of random tokens. `trees` has for each sequence its slot and its rows' parents, counted within the
    sequence, -1 for what follows the committed tokens. The logits of every row are wanted."""
    generator = torch.Generator().manual_seed(seed)
    positions: list[int] = []
    sequences: list[int] = []
    parents: list[int] = []
    for slot, above in trees:
        first = len(positions)
        for parent in above:
            parents.append(first + parent if parent >= 0 else -1)
            positions.append(positions[first + parent] + 1 if parent >= 0 else lengths[slot])
            sequences.append(slot)
    tokens = torch.randint(3, VOCABULARY, (len(positions),), generator=generator)
    columns = (positions, sequences, parents, lengths, range(len(positions)))
    return [tokens, *(torch.tensor(list(column), dtype=torch.int64) for column in columns)], sequences


def random_states(
    function: Function, seed: int = 0, slots: int = SLOTS, capacity: int = CAPACITY
) -> list[Tensor]:
    """States full of random numbers, the places beyond the committed tokens included."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            s.layers, slots, s.heads, capacity, s.key_dim + s.value_dim, generator=generator, dtype=torch.float64
        ).to(s.dtype)
        for s in function.states
    ]


@st.composite
def calls(draw: st.DrawFn, longest: int = 12, rows: int = 6) -> Call:
    """Rows of one to three slots, each with committed tokens and a random tree behind them; some logits wanted."""
    slots = draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=3, unique=True))
    lengths = draw(st.lists(st.integers(0, longest), min_size=SLOTS, max_size=SLOTS))
    trees = []
    for slot in slots:
        count = draw(st.integers(1, rows))
        trees.append((slot, [draw(st.integers(-1, row - 1)) if row else -1 for row in range(count)]))
    inputs, sequences = call_of(trees, lengths, draw(st.integers(0, 2**16)))
    wanted = draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=len(sequences)))
    return [*inputs[:5], torch.tensor(wanted)], sequences
