"""From a model to the function that decodes, and calls of it, as the tests of families need them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graft.compiler.capture import capture
from graft.compiler.checker import check
from graft.compiler.ops import NO_PARENT
from graft.compiler.passing import View
from graft.compiler.program import DENSE, Function, Program
from graft.passes.canonicalise import Canonicalise
from graft.passes.common_subexpression import CommonSubexpression
from graft.passes.dead_code import DeadCode
from graft.passes.kv_cache import KVCache
from graft.passes.merge_linears import MergeLinears


def dense_program(model: PreTrainedModel) -> Program:
    """The captured model in canonical form, checked."""
    captured = capture(model)
    program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
    for one in (Canonicalise(), DeadCode(), CommonSubexpression()):
        one.run(View(program, one.pass_name()))
    check(program, "after capture")
    return program


def flat_program(dense: Program) -> Program:
    """A copy on flat ragged rows with a KV cache, linears merged, checked."""
    program = dense.copy()
    for one in (KVCache(), MergeLinears()):
        one.run(View(program, one.pass_name()))
    check(program, "after merge-linears")
    return program


def dense_logits(program: Program, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits [batch, length, vocabulary] of int64 tokens [batch, length]."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) if positions is None else positions
    with torch.no_grad():
        return program["forward"].copy().module()(tokens, positions.contiguous())[0]


class Decoder:
    """A flat function and its KV states: `slots` sequences of at most `capacity` tokens."""

    def __init__(self, program: Program, slots: int = 3, capacity: int = 48) -> None:
        function = program["forward"].copy()
        self.run = function.module()
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        self.states = [  # garbage where nothing has been written yet: reading it would show
            torch.full((s.layers, slots, s.heads, capacity, s.key_dim + s.value_dim), 1e4, dtype=s.dtype)
            for s in function.states
        ]

    def step(self, rows: Sequence[tuple[int, Sequence[int]]], parents: Sequence[int] | None = None) -> list[Tensor]:
        """Run rows, given as (slot, its tokens), in one call and commit them; logits for each group of rows.

        `parents`: for one slot only, each row's parent among the rows; then nothing is committed.
        """
        slots, tokens, positions, before = [], [], [], []
        for slot, group in rows:
            for index, token in enumerate(group):
                parent = (index - 1 if index else NO_PARENT) if parents is None else parents[index]
                first = len(tokens) - index
                before.append(parent if parent == NO_PARENT else first + parent)
                positions.append(int(self.lengths[slot]) if parent == NO_PARENT else positions[first + parent] + 1)
                slots.append(slot)
                tokens.append(int(token))
        integers = [torch.tensor(values, dtype=torch.int64) for values in (tokens, positions, slots, before)]
        with torch.no_grad():
            wanted = torch.arange(len(tokens))
            logits, _, *states = self.run(*integers, self.lengths, wanted, *self.states)
        if parents is None:
            self.states = states
            for slot, group in rows:
                self.lengths[slot] += len(group)
        return list(logits.split([len(group) for _, group in rows]))
