"""Errors and interruptions: what is named, and that the model can be used afterwards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from graft.compiler.drafting import DraftTree
from graft.compiler.errors import GenerationError
from graft.runtime.drafters.draft_model import DraftModel
from tests.runtime.decoding import (
    DRAFTERS,
    Fixture,
    OracleDrafting,
    Recorder,
    all_slots_free,
    bigram_generator,
    generator,
    oracle,
    prompts,
    theirs,
)


@pytest.mark.parametrize("name", ["plain", "lookup", "another model"])
def test_an_interrupted_call_leaves_the_model_usable(name: str) -> None:
    arguments = prompts(6) | {"max_new_tokens": 20}
    drafter = DRAFTERS[name]()
    made = generator(drafter)
    with pytest.raises(KeyboardInterrupt):
        made.generate(**arguments, streamer=Recorder(fail_after=8))
    assert all_slots_free(made)
    if isinstance(drafter, DraftModel):
        own = drafter.other.decoder.store
        assert len(own.free) == len(own.lengths)
    assert torch.equal(made.generate(**arguments), theirs(arguments))


def test_a_call_interrupted_inside_the_model_leaves_it_usable() -> None:
    made = generator()
    executable, calls = made.decoder.executable, []

    def failing(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return executable(*inputs)

    made.decoder.executable = failing  # type: ignore[assignment]
    arguments = prompts(6, 3) | {"max_new_tokens": 9}
    with pytest.raises(KeyboardInterrupt):
        made.generate(**arguments)
    assert all_slots_free(made)
    assert torch.equal(made.generate(**arguments), theirs(arguments))


def test_a_drafter_is_told_the_end_of_every_request_that_it_was_told_the_beginning_of() -> None:
    arguments = prompts(6, 3)
    drafting = OracleDrafting(oracle(arguments).texts)

    def fail(ids: Tensor, scores: object) -> bool:
        if ids.shape[1] == 12:
            raise RuntimeError("a broken criterion")
        return False

    made = generator(Fixture(drafting))
    with pytest.raises(RuntimeError, match="broken"):
        made.generate(**arguments, max_new_tokens=20, stopping_criteria=StoppingCriteriaList([fail]))
    assert (drafting.begun, drafting.ended) == (2, 2)
    made.generate(**arguments, max_new_tokens=4)
    assert (drafting.begun, drafting.ended) == (4, 4)


@pytest.mark.parametrize("tree", [DraftTree([999], [-1]), DraftTree([-1], [-1]), DraftTree([5] * 20, [-1] * 20)])
def test_a_drafter_that_proposes_what_cannot_be_run_is_refused(tree: DraftTree) -> None:
    drafting = OracleDrafting(())
    drafting.propose = lambda contexts, budgets: [tree]  # type: ignore[method-assign]
    made = generator(Fixture(drafting))
    with pytest.raises(GenerationError, match="cannot be verified"):
        made.generate(**prompts(6), max_new_tokens=9)
    assert all_slots_free(made)


def test_nan_logits_are_named_by_sequence_and_token() -> None:
    table = torch.zeros(6, 6)
    table[torch.arange(6), (torch.arange(6) + 1) % 6] = 5.0
    table[4] = math.nan
    made = bigram_generator(table)
    ids = torch.tensor([[0, 0], [1, 2]])
    with pytest.raises(GenerationError) as error:
        made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    assert "found: NaN" in str(error.value)
    assert "sequence 1, new token 3, position 4" in str(error.value)
    assert all_slots_free(made)


@pytest.mark.parametrize("options", [{"do_sample": True}, {"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 3}])
def test_nan_logits_are_named_under_sampling_and_processors_too(options: dict[str, Any]) -> None:
    table = torch.full((6, 6), math.nan)
    with pytest.raises(GenerationError, match="sequence 0, new token 1"):
        bigram_generator(table).generate(torch.tensor([[3, 4]]), max_new_tokens=5, **options)


def test_remove_invalid_values_survives_nan_logits() -> None:
    table = torch.zeros(6, 6)
    table[:, 2] = math.nan
    out = bigram_generator(table).generate(torch.tensor([[3, 4]]), max_new_tokens=3, remove_invalid_values=True)
    assert out.tolist() == [[3, 4, 0, 0, 0]]
