"""Drafting with a function on the target's KV: the law of sampled texts by enumeration, chains and trees of rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import LogitsProcessorList

from graft.compiler.drafting import Context, DraftTree, Uniforms
from graft.compiler.program import FLAT, Function
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.drafters.early_exits import ExitDrafting
from graft.runtime.drafters.self_draft import SelfDrafting
from graft.runtime.kv_overlay import KVOverlay
from graft.runtime.kv_store import KVStore
from graft.runtime.request import SAMPLING, SLOT, Sampling
from graft.runtime.tree_policies import Chain, Fixed
from graft.runtime.verifiers import Leviathan
from tests.runtime.decoding import Bigram, decoder, same_rows
from tests.runtime.enumeration import Model, Text
from tests.runtime.test_lossless import output_law


class Shifted:
    """Random numbers of a text that begins one token later."""

    def __init__(self, below: Uniforms) -> None:
        self.below = below

    def uniform(self, stream: str, counter: int) -> float:
        return self.below.uniform(stream, counter - 1)


class Drafts:
    """Samples of our drafting, over a bigram model, behind a start token 0."""

    def __init__(self, model: Model, depth: int, split: bool) -> None:
        counts = torch.tensor([model.counts((token,)) for token in range(model.vocabulary)], dtype=torch.float64)
        function = Function("forward", fx.Graph(), nn.Linear(1, 1), FLAT)
        self.store, self.depth = KVStore((), torch.device("cpu")), depth
        self.slot = self.store.open()
        held = Decoder(function, Bigram(counts.log()), model.vocabulary, None, KVOverlay(self.store, ()))
        parts: Any = SimpleNamespace(layer=1, shallow={1: held}, draft=lambda layer, rows: held.forward(rows))
        self.drafting: SelfDrafting = SelfDrafting(held, Chain(), candidates=1, kind="independent")
        if split:
            self.drafting = ExitDrafting(parts, 1, 0.0, sample=True)
        self.held = held

    def __call__(self, text: Text, uniforms: Uniforms) -> DraftTree:
        sampling = Sampling(0, 1, LogitsProcessorList(), True, 0)
        sampling.uniforms = Shifted(uniforms)
        self.store.lengths[self.slot] = len(text)
        context = Context([0, *text], 1, {SAMPLING: sampling, SLOT: self.slot})
        (tree,) = self.drafting.propose([context], [self.depth])
        self.held.close(self.slot)
        assert tree.kind == "independent" and len(tree) == self.depth
        return tree


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("pair", range(3))
def test_sampled_texts_keep_the_targets_law(pair: int, split: bool) -> None:
    target, draft = Model(2 * pair, 3, 3), Model(2 * pair + 1, 3, 3)
    assert output_law(Leviathan(), Drafts(draft, 2, split), target, 2) == target.law(2)


def overlaid() -> tuple[Decoder, SelfDrafting, Any]:
    """A decoder, a draft on its KV by the same function, and the rows that the draft ran, call by call."""
    target = decoder()
    overlay = KVOverlay(target.store, target.function.states)
    held = Decoder(target.function, target.executable, target.vocabulary, target.max_positions, overlay)
    drafting, ran = SelfDrafting(held, Chain(), candidates=4, kind="deterministic"), []
    forward = held.forward

    def counted(rows: Rows) -> torch.Tensor:
        ran.append(list(rows.tokens))
        return forward(rows)

    held.forward = counted  # type: ignore[method-assign, assignment]
    return target, drafting, ran


def committed(target: Decoder, tokens: list[int]) -> int:
    slot, rows = target.open(), Rows()
    rows.add_chain(slot, tokens, 0)
    target.forward(rows)
    target.commit(slot, range(len(tokens)))
    return slot


def test_a_chain_runs_each_token_once_and_leaves_the_targets_rows_alone() -> None:
    target, drafting, ran = overlaid()
    slot, other = committed(target, [5, 6, 7]), committed(target, [5, 6, 7])
    (tree,) = drafting.propose([Context([5, 6, 7, 8], 3, {SLOT: slot})], [4])
    # The draft is the target here, so its chain is the target's text; the last token is not run.
    assert ran == [[8], [tree.tokens[0]], [tree.tokens[1]], [tree.tokens[2]]]
    assert same_rows(target, target.store.tensors, slot, other)
    assert drafting.decoder.store.lengths[slot] == 3
    texts = [[5, 6, 7, 8, *tree.tokens[:count]] for count in range(4)]
    for text, token in zip(texts, tree.tokens, strict=True):
        fresh, rows = target.open(), Rows()
        rows.add_chain(fresh, text, 0)
        assert int(target.forward(rows).argmax()) == token
        target.rollback(fresh)


class Guesses:
    """What drafts for the draft: the same tokens everywhere, in a chain."""

    def __init__(self, tokens: dict[int, int]) -> None:
        self.tokens = tokens

    def go_on(self, context: Context, tokens: list[int], budget: int) -> DraftTree:
        tree, last = DraftTree(), tokens[-1]
        while len(tree) < budget and last in self.tokens:
            last = self.tokens[last]
            tree.add(last, len(tree) - 1, 0.5)
        return tree


@pytest.mark.parametrize("wrong", [None, 1, 3])
def test_a_chain_whose_tokens_are_guessed_takes_fewer_calls_and_is_the_same(wrong: int | None) -> None:
    target, drafting, ran = overlaid()
    slot, other = committed(target, [5, 6, 7]), committed(target, [5, 6, 7])
    context = Context([5, 6, 7, 8], 3, {SLOT: slot})
    (plain,) = drafting.propose([context], [6])
    assert len(set(plain.tokens)) == 6 and len(ran) == 6  # or guessing by the token before would be no guess
    ran.clear()
    after = dict(zip(plain.tokens, plain.tokens[1:], strict=False))
    if wrong is not None:
        after[plain.tokens[wrong]] = 99
    drafting.below = Guesses(after)  # type: ignore[assignment]
    (tree,) = drafting.propose([context], [6])
    assert (tree.tokens, tree.parents) == (plain.tokens, plain.parents)
    tokens = plain.tokens
    if wrong is None:
        assert ran == [[8], tokens[:5]]
    else:
        assert ran == [[8], [*tokens[: wrong + 1], 99], tokens[wrong + 1 : 5]]
    assert same_rows(target, target.store.tensors, slot, other) and drafting.decoder.store.lengths[slot] == 3


def test_where_a_tree_branches_the_nodes_above_run_again() -> None:
    target, drafting, ran = overlaid()
    drafting.policy = Fixed(((0,), (0, 0), (1,), (0, 0, 0), (1, 0)))
    slot = committed(target, [5, 6, 7])
    (tree,) = drafting.propose([Context([5, 6, 7, 8], 3, {SLOT: slot})], [5])
    assert len(tree) == 5 and ran[0] == [8]
    # Level by level: both children of the root, then the grandchild with the node above it.
    assert [len(tokens) for tokens in ran] == [1, 2, 2]
    for node in range(5):
        text = [5, 6, 7, 8, *(tree.tokens[above] for above in tree.path(node)[:-1])]
        fresh, rows = target.open(), Rows()
        rows.add_chain(fresh, text, 0)
        assert tree.tokens[node] in target.forward(rows)[0].topk(2).indices.tolist()
        target.rollback(fresh)
    assert drafting.decoder.store.lengths[slot] == 3
