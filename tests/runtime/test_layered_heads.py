"""EAGLE-3 and Clover-2: every node against the published equations, KV against a fresh prefill, text against plain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.compiler.drafting import Context, DraftTree, Outcome
from graft.compiler.errors import PassError
from graft.passes.heads.clover import CloverConfig
from graft.passes.heads.config import Described
from graft.passes.heads.eagle import EagleConfig
from graft.runtime.drafters.feature_heads import FeatureHeads
from graft.runtime.drafters.head_levels import RecurrentHeads
from graft.runtime.tree_policies import Fixed
from tests.families import build
from tests.heads import MEDUSA, random_tensors, write
from tests.heads_layered import CLOVER, EAGLE, SMALL_CLOVER, WIDE, clover_logits, eagle_logits
from tests.runtime.test_heads import IDS, MASK, OPTIONS, alone, check_interrupted, plan

CONFIGS = {
    "eagle-3": EAGLE,
    "eagle-3, a norm of all streams": replace(EAGLE, stream_norms="all"),
    "eagle-3, every option": WIDE,
    "clover-2": CLOVER,
    "clover-2, 40 tokens": SMALL_CLOVER,
}
FAMILIES = {"gemma3_text": EAGLE, "gpt_neox": CLOVER, "phi": WIDE, "gemma2": SMALL_CLOVER}
"""Families and the heads that are put on them."""


@dataclass(frozen=True)
class Made:
    """Heads on a llama in float32."""

    config: Described
    tensors: dict[str, Tensor]
    fast: graft.CompiledModel
    model: Any
    folder: Path

    @torch.no_grad()
    def streams(self, tokens: Sequence[int]) -> list[Tensor]:
        """[tokens, width] each: what goes into every layer, and into the last norm."""
        seen: list[Tensor] = []
        layers = self.model.model.layers
        hooks = [one.register_forward_pre_hook(lambda _, given: seen.append(given[0][0])) for one in layers]
        hooks.append(self.model.model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0][0])))
        self.model(torch.tensor([list(tokens)]))
        for hook in hooks:
            hook.remove()
        return seen

    def hidden(self, tokens: Sequence[int]) -> Tensor:
        """What the compiled target hands out of a text: final hidden states and the tapped streams."""
        streams = self.streams(tokens)
        taps = (self.config.taps or ()) if isinstance(self.config, EagleConfig) else (len(streams) - 1,)
        with torch.no_grad():
            last = self.model.model.norm(streams[-1])
        return torch.cat([last, *(streams[tap] for tap in taps)], -1)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], drafted: int) -> Tensor:
        """The reference's, behind a text whose last tokens are drafted."""
        streams = self.streams(tokens[: len(tokens) - drafted - 1])
        table, unembedding = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        if isinstance(self.config, EagleConfig):
            read = [streams[tap] for tap in self.config.taps or ()]
            return eagle_logits(self.config, self.tensors, read, tokens, drafted, table)[-1]
        assert isinstance(self.config, CloverConfig)
        return clover_logits(self.config, self.tensors, streams[-1], tokens, drafted, unembedding)


@pytest.fixture(scope="module", params=CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    config = CONFIGS[request.param]
    folder = write(tmp_path_factory.mktemp("heads") / "heads", config)
    model = build("llama")
    return Made(config, random_tensors(config), graft.compile(model, plan(folder), backend="aten"), model, folder)


def open_drafting(made: Made) -> FeatureHeads | RecurrentHeads:
    drafting = graft.Heads(made.folder).open(made.fast.decoder, Fixed.branching(3, 2, 1))
    assert isinstance(drafting, (FeatureHeads, RecurrentHeads))
    return drafting


def rows_of(drafting: FeatureHeads | RecurrentHeads, context: Context) -> list[Tensor]:
    """What the heads' KV holds of the request."""
    decoder, slot = drafting.text.decoder, drafting.text.held(context).slot
    length = decoder.length(slot)
    return [kv[:, slot, :, :length].clone() for kv in decoder.store.select(decoder.function.states)]


def start(made: Made, drafting: FeatureHeads | RecurrentHeads, tokens: Sequence[int]) -> Context:
    """A request whose prompt is all tokens but the last, which follows it."""
    context = Context(list(tokens), len(tokens) - 1)
    hidden = made.hidden(tokens[:-1])
    drafting.begin(context, None, hidden)
    drafting.observe(context, Outcome(DraftTree(), [], tokens[-1], hidden=hidden[-1:]))
    return context


@torch.no_grad()
def test_every_node_is_what_the_published_equations_give_and_the_kv_is_a_fresh_prefills(made: Made) -> None:
    """Over several steps, of which some tokens were accepted, and for two requests at once."""
    drafting = open_drafting(made)
    contexts = [start(made, drafting, [*text, 30]) for text in ([5, 6, 7, 8, 9], [21, 22, 23])]
    for accepted in (0, 1, 2):
        trees = drafting.propose(contexts, [15, 15])
        for context, tree in zip(contexts, trees, strict=True):
            assert len(tree) == 15
            for node, children in tree.children().items():
                path = [tree.tokens[above] for above in tree.path(node)]
                logits = made.logits([*context.tokens, *path], len(path))
                best = logits.topk(len(children)).indices
                ids = made.tensors["draft_vocabulary"][best] if made.config.reduced else best
                assert [tree.tokens[child] for child in children] == ids.tolist()
                found = torch.tensor([tree.probabilities[child] for child in children])
                torch.testing.assert_close(found, logits.softmax(-1)[best], atol=1e-5, rtol=1e-5)
            fresh = start(made, drafting, context.tokens)
            drafting.propose([fresh], [1])
            for kept, new in zip(rows_of(drafting, context), rows_of(drafting, fresh), strict=True):
                assert kept.shape[2] == len(context.tokens) - 1
                torch.testing.assert_close(kept, new, atol=1e-5, rtol=1e-5)
            drafting.end(fresh)
            path = tree.path(len(tree) - 1)[:accepted]
            hidden = made.hidden([*context.tokens, *(tree.tokens[node] for node in path)])
            rows = torch.randn(1 + len(tree), hidden.shape[1])
            rows[[0, *(1 + node for node in path)]] = hidden[-1 - len(path) :]
            context.tokens += [*(tree.tokens[node] for node in path), 40 + accepted]
            drafting.observe(context, Outcome(tree, path, context.tokens[-1], hidden=rows))
    for context in contexts:
        drafting.end(context)
    store = drafting.text.decoder.store
    assert len(store.free) == len(store.lengths)


def test_greedy_text_is_the_models_own_in_a_ragged_batch(made: Made) -> None:
    assert made.fast.generate(IDS, attention_mask=MASK, **OPTIONS).equal(alone(made.model))
    assert made.fast.stats["drafted"] > 20


def test_an_interrupted_call_leaves_nothing_behind(made: Made) -> None:
    check_interrupted(made.fast)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_plain_decoding_on_families(family: str, tmp_path: Path) -> None:
    """In float64, in one tree with other heads, which read the first part of the tapped rows, and with a table."""
    model = build(family, dtype=torch.float64)
    medusa = graft.Heads(write(tmp_path / "medusa", MEDUSA), "medusa")
    drafters = plan(write(tmp_path / "heads", FAMILIES[family]), medusa, graft.Lookup())
    fast = graft.compile(model, drafters, backend="aten")
    assert fast.generate(IDS, attention_mask=MASK, **OPTIONS).equal(alone(model))
    assert fast.stats["drafted"] > 0


def test_compiled_heads_draft_what_aten_drafts_and_outlive_their_folders(tmp_path: Path) -> None:
    """Both in one tree, which tap the target one behind the other."""
    model = build("gemma3_text")
    folders = [write(tmp_path / "eagle", EAGLE), write(tmp_path / "clover", SMALL_CLOVER)]
    both = plan(folders[0], graft.Heads(folders[1], "clover"))
    expected = graft.compile(model, both, backend="aten")
    text = expected.generate(IDS[:1], **OPTIONS)
    assert text.equal(model.generate(IDS[:1], **OPTIONS))
    fast = graft.compile(model, both, backend="cpp")
    assert fast.generate(IDS[:1], **OPTIONS).equal(text)
    assert fast.stats["accepted"] == expected.stats["accepted"]
    fast.save(tmp_path / "saved")
    for folder in folders:
        folder.rename(folder.with_name(f"{folder.name} gone"))
    back = graft.load(tmp_path / "saved")
    assert back.generate(IDS[:1], **OPTIONS).equal(text)
    assert back.stats["accepted"] == fast.stats["accepted"]


def test_streams_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    """Of three layers there are none in front of 2, 3 // 2 and 0, in ascending order, but they are what is meant."""
    folder = write(tmp_path / "heads", replace(EAGLE, taps=(0, 2, 5)))
    with pytest.raises(PassError, match=r"stream that the model does not have[^$]*0 to 3[^$]*5"):
        graft.compile(build("llama"), plan(folder), backend="aten")


@pytest.mark.parametrize("order", [1, -1])
def test_a_target_that_is_cut_in_two_is_not_tapped(order: int, tmp_path: Path) -> None:
    drafters = (graft.Heads(write(tmp_path / "heads", EAGLE)), graft.LayerSkip(1))[::order]
    with pytest.raises(PassError, match="leave one of the two drafters out"):
        graft.compile(build("llama"), graft.Plan(draft=drafters, sample=[range(3, 9)]), backend="aten")
