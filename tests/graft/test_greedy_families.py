"""Every captured family as C++, in float64: its steps against ATen's, its greedy text against transformers'."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import PreTrainedModel

import graft
from graft.codegen.cpp.executable import CppExecutable
from tests.codegen.compiled import LENGTHS as LENGTHS_OF_SLOTS
from tests.codegen.compiled import TREES, assert_same_step
from tests.codegen.functions import call_of
from tests.families import CAPTURED, VOCABULARY, build

NEW_TOKENS = 20
LENGTHS = (11, 1, 6)
"""Prompts of one batch: ragged, one of a single token; the longest goes beyond the families' sliding window."""


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def reference(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """transformers' own text for one prompt alone."""
    ids = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", CAPTURED)
def test_greedy_text_is_transformers_with_drafts_in_a_ragged_batch(family: str) -> None:
    model = build(family, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", graft.PassWarning)
        fast = graft.compile(
            model,
            graft.Plan(
                draft=[graft.Lookup(), graft.Recycle(), graft.Trie()],
                tree=graft.Tree(nodes=6),
                controller=graft.FixedBudget(),
                sample=[range(3, 9)],
            ),
        )
    assert isinstance(fast.decoder.executable, CppExecutable)
    assert_same_step(fast.decoder.executable, fast.program["forward"], call_of(TREES, LENGTHS_OF_SLOTS))
    texts = [reference(model, prompt) for prompt in prompts()]
    eos = texts[0][NEW_TOKENS // 2]
    width = max(LENGTHS)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts()])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts()])
    for end in (None, eos):
        found = fast.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=0
        )
        for row, text in enumerate(texts):
            # A text that ends early is the same up to its first end.
            expected = text[: text.index(end) + 1] if end in text else text
            new = found[row, width:].tolist()
            assert new[: len(expected)] == expected
            assert set(new[len(expected) :]) <= {0}
    assert fast.stats["drafted"] > 0
