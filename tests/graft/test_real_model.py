"""SmolLM2-135M-Instruct in float32: the same token ids as transformers, whatever drafts."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import pytest
import torch

import graft
from graft.compiled import CompiledModel
from graft.compiler.host import plain_host, speculative_host
from graft.compiling import assembled
from tests.conftest import Prompt, RealModel

pytestmark = pytest.mark.real

PROMPTS, NEW_TOKENS, BATCH = 20, 128, 5
TOGETHER = 10
"""Prompts that transformers runs in one batch."""
NEAR_TIE = 1e-4
"""Two best logits closer than this may change places in float32."""


@dataclass(frozen=True)
class Expected:
    """The prompts as one left-padded batch, and transformers' new ids for each."""

    ids: torch.Tensor
    mask: torch.Tensor
    texts: list[list[int]]


@pytest.fixture(scope="module")
def expected(smollm2: RealModel, prompts: list[Prompt]) -> Expected:
    """The shorter half of the prompts, evenly spread; transformers runs them by length, with little padding."""
    tokenizer = smollm2.tokenizer
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.turns[0]}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    half = sorted(texts, key=len)[: max(PROMPTS, len(texts) // 2)]
    chosen = [half[index * len(half) // PROMPTS] for index in range(PROMPTS)]

    def padded(some: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = tokenizer(some, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        return batch["input_ids"], batch["attention_mask"]

    found: list[list[int]] = []
    for start in range(0, PROMPTS, TOGETHER):
        ids, mask = padded(chosen[start : start + TOGETHER])
        out = smollm2.model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        found += out[:, ids.shape[1] :].tolist()
    return Expected(*padded(chosen), found)


DRAFTS = {
    "plain": [],
    "lookup": [graft.Lookup()],
    "recycle": [graft.Recycle()],
    "recycle seeded by the prompt": [graft.Recycle(seed_prompt=True)],
    "trie": [graft.Trie()],
    "all merged": [graft.Lookup(), graft.Recycle(), graft.Trie()],
}


@pytest.fixture(scope="module")
def plain(smollm2: RealModel) -> CompiledModel:
    return graft.compile(smollm2.model)


def drafting(plain: CompiledModel, drafters: list[graft.Drafter]) -> CompiledModel:
    """What compile() makes of a plan with these drafters, without compiling the same functions again."""
    plan = graft.Plan(draft=drafters, tree=graft.Tree(nodes=6), controller=graft.FixedBudget())
    program = dataclasses.replace(plain.program, host=speculative_host() if drafters else plain_host())
    return assembled(program, plan, plain.decoder, plain.generator.face)


@pytest.mark.parametrize("drafters", DRAFTS.values(), ids=DRAFTS)
def test_greedy_ids_are_transformers(
    smollm2: RealModel, plain: CompiledModel, expected: Expected, drafters: list[graft.Drafter]
) -> None:
    fast = drafting(plain, drafters)
    ids, mask = expected.ids, expected.mask
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    excused = []
    for row, text in enumerate(expected.texts):
        new = out[row, ids.shape[1] :].tolist()
        length = max(len(new), len(text))
        pad = [smollm2.model.generation_config.pad_token_id]
        found, wanted = new + pad * (length - len(new)), text + pad * (length - len(text))
        if found != wanted:
            excused.append(gap_where_they_part(smollm2, ids[row][mask[row].bool()].tolist(), found, wanted))
    assert all(gap < NEAR_TIE for gap in excused) and len(excused) <= 1, excused
    assert not drafters or fast.stats["tokens_per_step"] > 1.2


def gap_where_they_part(smollm2: RealModel, prompt: list[int], found: list[int], expected: list[int]) -> float:
    """The distance of the two best logits at the first token that differs, from one run of transformers' model."""
    at = next(index for index, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    with torch.no_grad():
        logits = smollm2.model(torch.tensor([prompt + expected[:at]]), use_cache=False).logits[0, -1]
    best = logits.topk(2).values
    return float(best[0] - best[1])


def test_speculation_in_bfloat16_gives_the_ids_of_plain_decoding(smollm2: RealModel, expected: Expected) -> None:
    half = copy.deepcopy(smollm2.model).bfloat16()
    plain = graft.compile(half, release=True)
    ids, mask = expected.ids[:BATCH], expected.mask[:BATCH]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    rows = zip(ids[:, None], mask[:, None], strict=True)
    alone = [plain.generate(row, attention_mask=seen, **options) for row, seen in rows]
    fast = drafting(plain, [graft.Lookup(), graft.Recycle()])
    together = fast.generate(ids, attention_mask=mask, **options)
    for row, text in zip(together, alone, strict=True):
        assert row[: text.shape[1]].tolist() == text[0].tolist()
    assert fast.stats["tokens_per_step"] > 1.2
