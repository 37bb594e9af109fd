"""SmolLM2-135M-Instruct with a compressed KV cache: speculation and company change no token."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import graft
from graft.compiler.host import speculative_host
from graft.compiling import assembled
from tests.conftest import Prompt, RealModel

pytestmark = pytest.mark.real
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def texts(smollm2: RealModel, prompts: list[Prompt]) -> list[torch.Tensor]:
    """Two prompts, [1, n] each, of some hundred tokens."""
    known = sorted((prompt.turns[0] for prompt in prompts), key=len)
    chosen = [known[len(known) * 7 // 10], known[len(known) * 8 // 10]]
    return [
        smollm2.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for text in chosen
    ]


def test_drafting_for_a_compressed_target_gives_the_tokens_of_plain_decoding_with_it(
    smollm2: RealModel, texts: list[torch.Tensor]
) -> None:
    one = graft.CompressKV(graft.Affine(), selection=graft.DoubleSparsity(), recent=16, prompt="dense")
    plain = graft.compile(smollm2.model, graft.Plan(target=[one]))
    alone = [plain.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False) for ids in texts]
    plan = graft.Plan(target=[one], draft=[graft.Lookup(), graft.Recycle()], controller=graft.FixedBudget())
    program = dataclasses.replace(plain.program, host=speculative_host())
    fast = assembled(program, plan, plain.decoder, plain.generator.face)
    width = max(ids.shape[1] for ids in texts)
    padded = torch.cat([torch.nn.functional.pad(ids, (width - ids.shape[1], 0)) for ids in texts])
    mask = torch.stack([torch.arange(width) >= width - ids.shape[1] for ids in texts]).long()
    together = fast.generate(padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    for row, ids, text in zip(together, texts, alone, strict=True):
        assert row[width : width + text.shape[1] - ids.shape[1]].tolist() == text[0, ids.shape[1] :].tolist()
    assert fast.stats["accepted"] > 0
    pages = fast.decoder.store.bytes["pages"]
    assert 0 < pages < 0.2 * sum(ids.shape[1] for ids in texts) * 46080


def test_a_draft_that_reads_an_eighth_of_the_cache_changes_nothing(
    smollm2: RealModel, texts: list[torch.Tensor]
) -> None:
    retrieval = graft.SelfDraft(graft.CompressKV(selection=graft.PageMeans(unit=8)))
    plan = graft.Plan(draft=[retrieval], tree=graft.Tree(nodes=3, policy=graft.Chain()), controller=graft.FixedBudget())
    fast = graft.compile(smollm2.model, plan)
    with torch.no_grad():
        expected = smollm2.model.generate(texts[0], max_new_tokens=24, do_sample=False)
    assert torch.equal(fast.generate(texts[0], max_new_tokens=24, do_sample=False), expected)
    assert fast.stats["accepted"] > 0.5 * fast.stats["drafted"]
