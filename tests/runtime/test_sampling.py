"""Sampling: seeds, and that texts follow the target's distribution exactly, with planted mistakes as control."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from graft.compiler.drafting import DraftTree, Rows, Uniforms, Verifier
from graft.runtime.drafters.draft_model import DraftModel
from graft.runtime.drafters.lookup import Lookup
from graft.runtime.generate import Generator
from graft.runtime.tree_policies import BestFirst, Chain
from graft.runtime.verifiers import Leviathan, SampleAndMatch, draw
from tests.runtime.decoding import (
    DRAFTERS,
    LONG,
    Always,
    bigram,
    bigram_generator,
    decoder,
    generator,
    prompts,
    theirs,
)

drafted = pytest.mark.parametrize("name", DRAFTERS)

SEEDED = {"do_sample": True, "max_new_tokens": 12}


@drafted
def test_the_same_seed_gives_the_same_text_alone_in_company_and_with_any_drafter(name: str) -> None:
    batch = prompts(7, 1, 4)
    drafter = DRAFTERS[name]()
    reference = generator().generate(**batch, **SEEDED, seed=[11, 12, 13])
    together = generator(drafter).generate(**batch, **SEEDED, seed=[11, 12, 13])
    assert torch.equal(together, reference)
    for row, length in enumerate((7, 1, 4)):
        alone = generator(drafter).generate(batch["input_ids"][row : row + 1, 7 - length :], **SEEDED, seed=11 + row)
        assert torch.equal(alone[0, length:], reference[row, 7:])


def test_another_seed_gives_another_text_and_torchs_seed_counts() -> None:
    batch, made = prompts(7), generator()
    assert not torch.equal(made.generate(**batch, **SEEDED, seed=1), made.generate(**batch, **SEEDED, seed=2))
    torch.manual_seed(0)
    first = made.generate(**batch, **SEEDED)
    torch.manual_seed(0)
    assert torch.equal(made.generate(**batch, **SEEDED), first)


def test_top_k_top_p_and_min_p_bound_what_is_sampled() -> None:
    batch, made = prompts(7), generator(Lookup())
    greedy = made.generate(**batch, **LONG)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert torch.equal(made.generate(**batch, **LONG, do_sample=True, seed=5, **options), greedy)


VOCABULARY, NEW, SAMPLES = 4, 3, 2000


def tables() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    target, other = torch.randn(2, VOCABULARY, VOCABULARY, generator=source)
    return target, target + other


def chi_square(made: Generator, target: Tensor) -> float:
    """Of `SAMPLES` texts against the exact distribution over all texts."""
    ids = torch.ones(1, 1, dtype=torch.int64)
    out = made.generate(ids, do_sample=True, top_k=0, max_new_tokens=NEW, num_return_sequences=SAMPLES, seed=3)
    counts = Counter(map(tuple, out[:, 1:].tolist()))
    law = target.double().softmax(-1)
    total = 0.0
    for text in product(range(VOCABULARY), repeat=NEW):
        expected = SAMPLES * math.prod(float(law[a, b]) for a, b in zip((1, *text), text, strict=False))
        total += (counts[text] - expected) ** 2 / expected
    return total


BOUND = 126.0
"""The chi-square distribution of 63 degrees of freedom exceeds it once in 250 000 times."""


@dataclass(frozen=True)
class Redraws(SampleAndMatch):
    """Planted: a sample that is not in the tree is drawn again."""

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        path, _ = super().verify(tree, rows, uniforms, position)
        token = draw(rows.distribution(path[-1] + 1 if path else 0), uniforms.uniform("resample", position + len(path)))
        return path, token


@dataclass(frozen=True)
class WithoutResidual(Leviathan):
    """Planted: after a rejection it draws from p in the place of the residual."""

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        path, token = super().verify(tree, rows, uniforms, position)
        if len(path) < len(tree):
            token = draw(rows.distribution(len(path)), uniforms.uniform("resample", position + len(path)))
        return path, token


@pytest.mark.parametrize(
    ("verifier", "sample", "right"),
    [
        (None, False, True),
        (SampleAndMatch(), True, True),
        (Leviathan(), True, True),
        (Redraws(), False, False),
        (WithoutResidual(), True, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Verifier) else str(value),
)
def test_sampled_texts_follow_the_targets_distribution(verifier: Verifier | None, sample: bool, right: bool) -> None:
    target, other = tables()
    drafter = DraftModel(SimpleNamespace(decoder=bigram(other)), sample=sample)
    policy = Chain() if sample else BestFirst()
    made = bigram_generator(target, drafter, policy=policy, controller=Always(3), verifier=verifier)
    assert (chi_square(made, target) < BOUND) == right
    assert 0 < made.stats["accepted"] < made.stats["drafted"]


def test_plain_sampling_follows_the_targets_distribution() -> None:
    target, other = tables()
    assert chi_square(bigram_generator(target), target) < BOUND < chi_square(bigram_generator(other), target)


def test_a_verifier_for_sampling_leaves_greedy_decoding_to_the_greedy_walk() -> None:
    drafter = DraftModel(SimpleNamespace(decoder=decoder()), sample=True)
    made = generator(drafter, policy=Chain(), verifier=Leviathan())
    arguments = prompts(6) | LONG
    assert torch.equal(made.generate(**arguments), theirs(arguments))
