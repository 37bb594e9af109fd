"""DraftModel: proposals, its cache, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from graft.compiler.drafting import Context, Outcome
from graft.compiler.errors import PlanError
from graft.runtime.decoder import Decoder
from graft.runtime.drafters import draft_model as module
from graft.runtime.drafters.draft_model import DraftModel, ModelDrafting
from graft.runtime.request import SAMPLING, Sampling
from graft.runtime.tree_policies import Chain, Fixed
from tests.runtime.decoding import bigram, decoder, same_cache_as_fresh_prefill, tiny


def drafting(held: Decoder, policy: object = None, **options: object) -> ModelDrafting:
    spec = DraftModel(SimpleNamespace(decoder=held), **options)  # type: ignore[arg-type]
    opened = spec.open(held, policy or Chain())  # type: ignore[arg-type]
    assert isinstance(opened, ModelDrafting)
    return opened


def context(*tokens: int, sample: bool = False, seed: int = 0, temperature: float | None = None) -> Context:
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)] if temperature else [])
    return Context(list(tokens), len(tokens), {SAMPLING: Sampling(0, len(tokens), processors, sample, seed)})


def continuation(tokens: list[int], count: int) -> list[int]:
    model, _ = tiny()
    out = model.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    text: list[int] = out[0, len(tokens) :].tolist()
    return text


def test_a_chain_is_the_models_own_greedy_continuation_for_ragged_requests() -> None:
    held = decoder()
    opened = drafting(held)
    contexts = [context(5, 6, 7, 8), context(9), context(3, 4)]
    for one in contexts:
        opened.begin(one, None)
    trees = opened.propose(contexts, [4, 2, 5])
    for one, tree, length in zip(contexts, trees, [4, 2, 5], strict=True):
        assert tree.tokens == continuation(one.tokens, length)
        assert all(0 < probability < 1 for probability in tree.probabilities)


def test_every_node_of_a_tree_is_a_best_token_after_its_path() -> None:
    held = decoder()
    model, _ = tiny()
    opened = drafting(held, Fixed.branching(3, 2, 1))
    one = context(5, 6, 7)
    opened.begin(one, None)
    (tree,) = opened.propose([one], [15])
    assert len(tree) == 15
    for node, children in tree.children().items():
        text = one.tokens + [tree.tokens[above] for above in tree.path(node)]
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0, -1]
        assert [tree.tokens[child] for child in children] == logits.topk(len(children)).indices.tolist()
        shares = logits.softmax(-1)
        for child in children:
            assert tree.probabilities[child] == pytest.approx(float(shares[tree.tokens[child]]), rel=1e-6)


@pytest.mark.parametrize("accepted", [0, 2, 5])
def test_the_cache_holds_committed_text_alone_whatever_was_accepted(accepted: int) -> None:
    held = decoder()
    opened = drafting(held)
    one = context(5, 6, 7, 8)
    opened.begin(one, None)
    slot = opened.held(one).slot
    for _ in range(3):
        (tree,) = opened.propose([one], [5])
        assert held.length(slot) == len(one.tokens)
        assert same_cache_as_fresh_prefill(held, slot, one.tokens)
        path = list(range(accepted))
        one.tokens += [*tree.tokens[:accepted], 11]
        opened.observe(one, Outcome(tree, path, 11))
    assert opened.propose([one], [3])[0].tokens == continuation(one.tokens, 3)


def test_a_long_prompt_is_run_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROMPT_ROWS", 5)
    opened = drafting(decoder())
    contexts = [context(*range(3, 20)), context(*range(30, 37))]
    for one in contexts:
        opened.begin(one, None)
    trees = opened.propose(contexts, [3, 3])
    assert [tree.tokens for tree in trees] == [continuation(one.tokens, 3) for one in contexts]


def test_a_text_that_outgrows_the_draft_models_positions_gets_no_draft() -> None:
    held = decoder("gpt2")
    opened = drafting(held)
    for length, nodes in ((126, 3), (127, 2), (128, 1), (129, 0)):
        one = context(*([7] * length))
        opened.begin(one, None)
        (tree,) = opened.propose([one], [8])
        assert len(tree) == nodes
        opened.end(one)


def test_samples_follow_q_which_is_the_processed_distribution() -> None:
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(2))
    opened = drafting(bigram(table), sample=True)
    counts = torch.zeros(5)
    for seed in range(2000):
        one = context(1, 3, sample=True, seed=seed, temperature=2.0)
        opened.begin(one, None)
        (tree,) = opened.propose([one], [2])
        assert tree.kind == "independent" and tree.parents == [-1, 0]
        expected = (table[[3, tree.tokens[0]]].double() / 2.0).softmax(-1)
        assert torch.allclose(torch.tensor(tree.q[-1]), expected[0], atol=1e-6)
        assert torch.allclose(torch.tensor(tree.q[0]), expected[1], atol=1e-6)
        counts[tree.tokens[0]] += 1
        opened.end(one)
    expected = 2000 * (table[3] / 2.0).softmax(-1)
    # The chi-square distribution of 4 degrees of freedom exceeds 27 once in 50 000 times.
    assert float(((counts - expected) ** 2 / expected).sum()) < 27
    assert float(((counts - 2000 * table[3].softmax(-1)) ** 2 / expected).sum()) > 27


def test_a_sample_depends_on_seed_and_place_alone() -> None:
    opened = drafting(decoder(), sample=True)
    first, second = context(5, 6, sample=True, seed=4), context(5, 6, sample=True, seed=5)
    for one in (first, second):
        opened.begin(one, None)
    both = opened.propose([first, second], [4, 4])
    (alone,) = opened.propose([first], [2])
    assert both[0].tokens != both[1].tokens
    assert alone.tokens == both[0].tokens[:2]


def test_another_vocabulary_is_refused_with_both_sizes() -> None:
    spec = DraftModel(SimpleNamespace(decoder=decoder("llama", vocab_size=140)))
    with pytest.raises(PlanError) as error:
        spec.open(decoder(), Chain())
    assert "131" in str(error.value) and "140" in str(error.value)


def test_the_kind_follows_from_sample() -> None:
    other = SimpleNamespace(decoder=None)
    assert DraftModel(other).kind == "deterministic"
    assert DraftModel(other, sample=True).kind == "independent"
    assert DraftModel(other, sample=True, replacement=False).kind == "without-replacement"


def test_ending_gives_the_slot_back_and_ending_twice_does_no_harm() -> None:
    held = decoder()
    opened = drafting(held)
    one = context(5, 6)
    opened.begin(one, None)
    opened.propose([one], [3])
    opened.end(one)
    opened.end(one)
    assert len(held.store.free) == len(held.store.lengths)
