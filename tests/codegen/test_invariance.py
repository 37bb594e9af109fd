"""A row's result is the same bits in any company: what makes speculative decoding equal plain decoding.

The reference is plain decoding, one token at a time and alone on one thread. Against it: chunks of several tokens,
trees of which the text is one path, other texts in the same call in any order, several threads.
"""

from __future__ import annotations

import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graft.codegen.cpp.isa import Isa, runnable
from tests.codegen.compiled import compiled, function_of
from tests.codegen.functions import SLOTS, call_of, random_states
from tests.families import VOCABULARY

SLOT, COUNT = 1, 7
"""Where the text lies, and how many tokens of it are decoded."""

Decoded = tuple[Tensor, Tensor, list[Tensor]]
"""Logits [COUNT, vocabulary], hidden [COUNT, width], and the states' rows of these tokens."""

# A window, softcap and two kinds of layers; another rotary layout; key dim unlike value dim and a router through ATen;
# sinks; biases and learned positions.
CASES: list[tuple[str, torch.dtype, Isa | None]] = [
    *(("gemma2", dtype, isa) for dtype in (torch.float32, torch.bfloat16) for isa in runnable()),
    *((family, torch.float32, None) for family in ("llama", "deepseek_v3", "gpt_oss")),
    *((family, torch.bfloat16, None) for family in ("llama", "mixtral", "opt")),
]


def named(case: tuple[str, torch.dtype, Isa | None]) -> str:
    family, dtype, isa = case
    return " ".join([family, str(dtype).removeprefix("torch."), *([isa.name] if isa else [])])


def tokens_of(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (COUNT,), generator=torch.Generator().manual_seed(length))


def rows_of(states: list[Tensor], length: int) -> list[Tensor]:
    return [state[:, SLOT, :, length : length + COUNT].clone() for state in states]


@functools.cache
def plain(case: tuple[str, torch.dtype, Isa | None], length: int) -> Decoded:
    """One token at a time behind `length` committed ones."""
    family, dtype, isa = case
    executable, states = compiled(family, dtype, isa, threads=1), random_states(function_of(family, dtype))
    lengths, found = [0] * SLOTS, []
    for done, token in enumerate(tokens_of(length)):
        lengths[SLOT] = length + done
        inputs, _ = call_of([(SLOT, [-1])], lengths)
        inputs[0][0] = token
        found.append(executable(*inputs, *states))
    logits, hidden = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits, hidden, rows_of(states, length)


def tree_around(draw: st.DrawFn, count: int) -> tuple[list[int], list[int]]:
    """Parents of a tree with a chain of `count` rows in it, and which rows those are."""
    parents: list[int] = []
    chain: list[int] = []
    while len(chain) < count:
        if draw(st.integers(0, 2)) == 2:
            parents.append(draw(st.integers(-1, len(parents) - 1)) if parents else -1)
        else:
            parents.append(chain[-1] if chain else -1)
            chain.append(len(parents) - 1)
    return parents, chain


@st.composite
def ways(draw: st.DrawFn) -> tuple[int, list[list[tuple[int, list[int], list[int]]]]]:
    """Threads, and for each step its texts in order: slot, parents, and for SLOT the rows that are the chain's."""
    steps = []
    left = COUNT
    while left:
        count = left - draw(st.integers(0, left - 1))
        left -= count
        texts = [(SLOT, *tree_around(draw, count))]
        for slot in draw(st.lists(st.sampled_from([0, 2, 3]), max_size=3, unique=True)):
            generator = random.Random(draw(st.integers(0, 99)))
            rows = draw(st.sampled_from([1, 2, 5, 17]))
            texts.append((slot, [generator.randint(-1, row - 1) if row else -1 for row in range(rows)], []))
        steps.append(draw(st.permutations(texts)))
    return draw(st.sampled_from([1, 2, 3])), steps


@pytest.mark.parametrize("case", CASES, ids=named)
@settings(max_examples=12, deadline=None)
@given(way=ways(), length=st.sampled_from([0, 3, 14, 29, 61, 64]), seed=st.integers(0, 99))
def test_a_text_is_decoded_to_the_same_bits_in_any_company(
    case: tuple[str, torch.dtype, Isa | None],
    way: tuple[int, list[list[tuple[int, list[int], list[int]]]]],
    length: int,
    seed: int,
) -> None:
    threads, steps = way
    family, dtype, isa = case
    executable, states = compiled(family, dtype, isa, threads), random_states(function_of(family, dtype))
    lengths, tokens, done = [5, length, 0, 33], tokens_of(length), 0
    logits, hidden = [], []
    for texts in steps:
        inputs, sequences = call_of([(slot, parents) for slot, parents, _ in texts], lengths, seed + done)
        first = sequences.index(SLOT)
        (chain,) = [torch.tensor(chain) for slot, _, chain in texts if slot == SLOT]
        inputs[0][first + chain] = tokens[done : done + len(chain)]
        # Logits in another order than rows, and of rows that nobody asked for before.
        inputs[5] = inputs[5].flip(0)
        all_logits, all_hidden = executable(*inputs, *states)
        logits.append(all_logits.flip(0)[first + chain])
        hidden.append(all_hidden[first + chain])
        for state in states:  # what the store does when these rows are committed
            place = lengths[SLOT]
            state[:, SLOT, :, place : place + len(chain)] = state[:, SLOT, :, place + chain]
        lengths[SLOT] += len(chain)
        done += len(chain)
    expected_logits, expected_hidden, expected_rows = plain(case, length)
    assert torch.equal(torch.cat(hidden), expected_hidden)
    assert torch.equal(torch.cat(logits), expected_logits)
    assert all(map(torch.equal, rows_of(states, length), expected_rows))
