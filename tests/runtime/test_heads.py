"""Heads: what they compute against the published equations, what they propose, and that they change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.compiler.drafting import ROOT, Context, DraftTree, Outcome
from graft.passes.heads.config import HeadsConfig
from graft.runtime.drafters.head_levels import HeadsDrafting, SequentialHeads
from graft.runtime.tree_policies import Fixed
from tests.families import VOCABULARY, build
from tests.heads import HYDRA, MEDUSA, PREFIXED, SMALL, random_tensors, reference_logits, reference_prefix, write

OPTIONS: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
IDS = torch.tensor([[5, 6, 7, 8, 5, 6, 9, 7], [0, 0, 0, 11, 12, 13, 11, 12]])
MASK = (IDS != 0).long()
CONFIGS = {"medusa": MEDUSA, "hydra": HYDRA, "hydra, 40 tokens": SMALL, "hydra++": PREFIXED}
EIGHT = {
    "gemma2": MEDUSA,
    "gpt2": HYDRA,
    "gpt_neox": SMALL,
    "llama": PREFIXED,
    "olmo2": SMALL,
    "phi": MEDUSA,
    "qwen3_moe": HYDRA,
    "deepseek_v3": PREFIXED,
}
"""Families and the heads that are put on them."""


def plan(folder: Path, *others: graft.Drafter, **options: Any) -> graft.Plan:
    drafters = [graft.Heads(folder, **options), *others]
    return graft.Plan(draft=drafters, controller=graft.FixedBudget(), tree=graft.Tree(nodes=8), sample=[range(3, 9)])


def alone(model: Any) -> Tensor:
    """transformers' text for each prompt by itself, padded as the batch is."""
    texts = [model.generate(ids[mask][None], **OPTIONS)[0] for ids, mask in zip(IDS, MASK.bool(), strict=True)]
    return torch.stack([torch.cat([ids[~mask], text]) for ids, mask, text in zip(IDS, MASK.bool(), texts, strict=True)])


def check_interrupted(fast: graft.CompiledModel) -> None:
    """An interrupted call gives every slot back, and the next one runs to its end."""

    class Stop(Exception):
        pass

    def stop(ids: Tensor, scores: object) -> bool:
        if ids.shape[1] > 12:
            raise Stop
        return False

    with pytest.raises(Stop):
        fast.generate(IDS, attention_mask=MASK, stopping_criteria=[stop], **OPTIONS)
    for decoder in (fast.decoder, *fast.decoder.functions.values()):
        assert len(decoder.store.free) == len(decoder.store.lengths)
    assert fast.generate(IDS, attention_mask=MASK, **OPTIONS).shape[1] == IDS.shape[1] + 14


@dataclass(frozen=True)
class Made:
    """Heads on a model in float32."""

    config: HeadsConfig
    tensors: dict[str, Tensor]
    fast: graft.CompiledModel
    model: Any
    folder: Path


@pytest.fixture(scope="module", params=CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    config = CONFIGS[request.param]
    folder = write(tmp_path_factory.mktemp("heads") / "heads", config)
    model = build("llama")
    return Made(config, random_tensors(config), graft.compile(model, plan(folder), backend="aten"), model, folder)


def candidates(made: Made, hidden: Tensor, text: list[int], count: int) -> tuple[list[int], Tensor]:
    """The reference's best tokens behind `text`, whose first token follows the hidden state, and their shares."""
    embedded = [made.model.get_input_embeddings().weight[token][None] for token in text]
    own = made.model.get_output_embeddings().weight
    logits = reference_logits(made.config, made.tensors, len(text) - 1, hidden, embedded, own)[0]
    shares = logits.softmax(-1)
    best = logits.topk(count).indices
    ids = made.tensors["draft_vocabulary"][best] if made.config.reduced else best
    return ids.tolist(), shares[best]


def hidden_states(made: Made, tokens: list[int]) -> Tensor:
    """[tokens, width]: what the heads read, by a forward pass of the target."""
    with torch.no_grad():
        hidden = made.model.model(torch.tensor([tokens])).last_hidden_state[0]
    return reference_prefix(made.config.prefix, made.tensors, hidden) if made.config.prefix else hidden


@torch.no_grad()
def test_every_node_is_what_the_published_equations_give(made: Made) -> None:
    """Over several steps, of which some tokens were accepted, and for two requests at once."""
    target, policy = made.fast.decoder, Fixed.branching(3, 2, 1)
    drafting = graft.Heads(made.folder).open(target, policy)
    assert isinstance(drafting, HeadsDrafting)
    texts = [[5, 6, 7, 8, 9], [21, 22, 23]]
    contexts = [Context([*text, 30 + place], len(text)) for place, text in enumerate(texts)]
    for context, text in zip(contexts, texts, strict=True):
        with torch.no_grad():
            raw = made.model.model(torch.tensor([text])).last_hidden_state[0]
        drafting.begin(context, None, raw)
        drafting.observe(context, Outcome(DraftTree(), [], context.tokens[-1], hidden=raw[-1:]))
    for accepted in (0, 1, 2):
        trees = drafting.propose(contexts, [15, 15])
        for context, tree in zip(contexts, trees, strict=True):
            assert len(tree) == 15
            hidden = hidden_states(made, context.tokens[:-1])[-1:]
            for node, children in tree.children().items():
                text = [context.tokens[-1], *(tree.tokens[above] for above in tree.path(node))]
                ids, shares = candidates(made, hidden, text, len(children))
                assert [tree.tokens[child] for child in children] == ids
                found = torch.tensor([tree.probabilities[child] for child in children])
                torch.testing.assert_close(found, shares, atol=1e-5, rtol=1e-5)
            path = tree.path(len(tree) - 1)[:accepted]
            text = [*context.tokens, *(tree.tokens[node] for node in path)]
            raw = made.model.model(torch.tensor([text])).last_hidden_state[0]
            rows = torch.randn(1 + len(tree), raw.shape[1])
            rows[[0, *(1 + node for node in path)]] = raw[-1 - len(path) :]
            context.tokens[:] = [*text, 40 + accepted]
            drafting.observe(context, Outcome(tree, path, context.tokens[-1], hidden=rows))
    for context in contexts:
        drafting.end(context)
    store = target.functions[next(iter(target.functions))].store
    assert len(store.free) == len(store.lengths)


def test_greedy_text_is_the_models_own_in_a_ragged_batch(made: Made) -> None:
    assert made.fast.generate(IDS, attention_mask=MASK, **OPTIONS).equal(alone(made.model))
    assert made.fast.stats["drafted"] > 20


def test_a_reduced_vocabulary_proposes_only_its_tokens(made: Made) -> None:
    seen: set[int] = set()
    drafting = graft.Heads(made.folder).open(made.fast.decoder, graft.BestFirst(floor=0.0))
    context = Context([5, 6, 7], 2)
    drafting.begin(context, None, torch.randn(2, 64))
    drafting.observe(context, Outcome(DraftTree(), [], 7, hidden=torch.randn(1, 64)))
    for tree in drafting.propose([context], [30]):
        seen |= set(tree.tokens)
    drafting.end(context)
    allowed = made.tensors["draft_vocabulary"].tolist() if made.config.reduced else range(VOCABULARY)
    assert seen and seen <= set(allowed)


def test_a_head_below_the_first_is_asked_while_its_answer_is_worth_its_time(made: Made) -> None:
    drafting = graft.Heads(made.folder).open(made.fast.decoder, Fixed.branching(2, 1, 1))
    context = Context([5, 6, 7], 2)
    drafting.begin(context, None, torch.randn(2, 64))
    drafting.observe(context, Outcome(DraftTree(), [], 7, hidden=torch.randn(1, 64)))
    depths = []
    for pace in (0.0, 1e12, 1e-12):
        context.pace = pace
        (tree,) = drafting.propose([context], [12])
        depths.append(max(len(tree.path(node)) for node in range(len(tree))))
    drafting.end(context)
    assert depths == ([3, 3, 3] if made.config.kind == "medusa" else [3, 1, 3])


def test_a_head_learns_how_often_it_is_right_where_it_was_asked(made: Made) -> None:
    drafting = graft.Heads(made.folder).open(made.fast.decoder, Fixed.branching(2, 1))
    if not isinstance(drafting, SequentialHeads):
        return
    context = Context([5, 6, 7], 2)
    drafting.begin(context, None, torch.randn(2, 64))
    drafting.observe(context, Outcome(DraftTree(), [], 7, hidden=torch.randn(1, 64)))
    (tree,) = drafting.propose([context], [4])
    said = next(node for node in range(len(tree)) if tree.parents[node] == 0)
    missed = next(token for token in range(VOCABULARY) if token not in {tree.tokens[said], *tree.tokens})
    context.tokens += [tree.tokens[0], missed]
    drafting.observe(context, Outcome(tree, [0], missed, hidden=torch.randn(1 + len(tree), 64)))
    drafting.end(context)
    first, second, third = drafting.costs
    assert (first.right, first.asked) == (3, 5) and second.asked == 5 and third.asked == 4
    assert second.pays(0.5, 1.0) and not second.pays(0.5, 1e9)


def test_an_interrupted_call_leaves_nothing_behind(made: Made) -> None:
    check_interrupted(made.fast)


@pytest.mark.parametrize("family", EIGHT)
def test_greedy_text_is_plain_decoding_on_families(family: str, tmp_path: Path) -> None:
    """In float64, merged with a table into one tree."""
    model = build(family, dtype=torch.float64)
    fast = graft.compile(model, plan(write(tmp_path / "heads", EIGHT[family]), graft.Lookup()), backend="aten")
    assert fast.generate(IDS, attention_mask=MASK, **OPTIONS).equal(alone(model))
    assert fast.stats["drafted"] > 0


@pytest.mark.parametrize("config", [SMALL, PREFIXED], ids=["hydra, 40 tokens", "hydra++"])
def test_compiled_heads_draft_what_aten_drafts_and_outlive_their_folder(config: HeadsConfig, tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=True)
    folder = write(tmp_path / "heads", config)
    expected = graft.compile(model, plan(folder), backend="aten")
    text = expected.generate(IDS[:1], **OPTIONS)
    fast = graft.compile(model, plan(folder), backend="cpp")
    assert fast.generate(IDS[:1], **OPTIONS).equal(text)
    assert fast.stats["accepted"] == expected.stats["accepted"]
    fast.save(tmp_path / "saved")
    folder.rename(tmp_path / "gone")
    back = graft.load(tmp_path / "saved")
    assert back.generate(IDS[:1], **OPTIONS).equal(text)
    assert back.stats["accepted"] == fast.stats["accepted"]


def test_sampling_is_the_targets_own(made: Made) -> None:
    """Sample-and-match with the same seed chooses the same tokens whatever is drafted."""
    options = OPTIONS | {"do_sample": True, "temperature": 0.8, "seed": 3}
    plain = graft.compile(made.model, graft.Plan(sample=[range(3, 9)]), backend="aten")
    assert made.fast.generate(IDS[:1], **options).equal(plain.generate(IDS[:1], **options))


def test_heads_that_the_model_was_not_compiled_with_are_refused(made: Made) -> None:
    with pytest.raises(graft.PlanError, match=r"not compiled with these heads[^$]*others_0"):
        graft.Heads(made.folder, "others").open(made.fast.decoder, graft.Chain())
    assert ROOT == -1


def test_options_that_are_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(graft.PlanError, match="candidates"):
        graft.Heads(tmp_path, candidates=0)
    with pytest.raises(graft.PlanError, match="identifier"):
        graft.Heads(tmp_path, "a-b")
