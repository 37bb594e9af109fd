"""Lookup, Recycle and Trie: what they propose, learn and forget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.compiler.drafting import ROOT, Context, Drafter, Drafting, DraftTree, Outcome
from graft.compiler.errors import PlanError
from graft.runtime.drafters.lookup import Lookup, LookupTable
from graft.runtime.drafters.recycle import ANY, Recycle, RecycleTable, Rows, rows_of
from graft.runtime.drafters.tables import TableDrafter, Trust
from graft.runtime.drafters.trie import Branches, Trie
from graft.runtime.tree_policies import BestFirst, Chain
from tests.runtime.decoding import decoder, tiny

TEXTS = st.lists(st.integers(0, 4), min_size=2, max_size=60)


class Model:
    """`Target`."""

    vocabulary = 100
    max_positions = None

    def __init__(self) -> None:
        self.shared: dict[str, object] = {}

    def best_after(self, tokens: Sequence[int], count: int) -> np.ndarray:
        """Token t is followed by t + 1, t + 2, ..."""
        return np.array([[(token + rank + 1) % self.vocabulary for rank in range(count)] for token in tokens])

    def own_text(self, tokens: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """One text that counts up by twos from 70; its best next tokens are those of `best_after`, backwards."""
        text = np.arange(70, 70 + 2 * tokens, 2)[None]
        return text, self.best_after(text[0].tolist(), count)[None, :, ::-1]


def follow(drafting: Drafting, context: Context, tokens: Sequence[int], budget: int = 8, k: int = 0) -> list[DraftTree]:
    """Decode `tokens` greedily with the drafter; the target's best at every row is (next token, 50, 51, ...)."""
    trees = []
    while tokens:
        (tree,) = drafting.propose([context], [budget])
        path: list[int] = []
        children = tree.children()
        while len(path) < len(tokens) - 1:
            below = children.get(path[-1] if path else ROOT, [])
            hit = [child for child in below if tree.tokens[child] == tokens[len(path)]]
            if not hit:
                break
            path.append(hit[0])
        best = np.array([[60, *range(50, 50 + k - 1)]] * (len(tree) + 1)) if k else None
        if best is not None:
            for depth, row in enumerate([0, *(node + 1 for node in path)]):
                best[row, 0] = tokens[depth]
        next_token = tokens[len(path)]
        context.tokens += [*(tree.tokens[node] for node in path), next_token]
        drafting.observe(context, Outcome(tree, path, next_token, best))
        tokens = tokens[len(path) + 1 :]
        trees.append(tree)
    return trees


def opened(drafter: Drafter, prompt: Sequence[int], policy: object = None) -> tuple[Drafting, Context]:
    drafting, context = drafter.open(Model(), policy or BestFirst()), Context(list(prompt), len(prompt))  # type: ignore[arg-type]
    drafting.begin(context, None)
    return drafting, context


def followers(text: Sequence[int], suffix: Sequence[int]) -> list[int]:
    """What followed the suffix, latest first, by looking at every place."""
    size = len(suffix)
    return [text[end] for end in range(len(text) - 1, size - 1, -1) if list(text[end - size : end]) == list(suffix)]


def brute_force(text: Sequence[int], suffix: Sequence[int], longest: int, shortest: int) -> list[int]:
    found: dict[int, None] = {}
    for size in range(min(longest, len(suffix)), shortest - 1, -1):
        found |= dict.fromkeys(followers(text, suffix[len(suffix) - size :]))
    return list(found)


@given(TEXTS, TEXTS, st.integers(1, 6), st.integers(1, 3))
def test_the_incremental_index_equals_a_search_of_the_whole_text(
    prompt: list[int], more: list[int], longest: int, shortest: int
) -> None:
    spec = Lookup(longest=max(longest, shortest), shortest=shortest, occurrences=1000)
    context = Context(list(prompt), len(prompt))
    table = LookupTable(spec, context)
    state = table.start(context)
    for token in more:
        state = table.step(state, token)
        context.tokens.append(token)
        table.observe(context, Outcome(DraftTree(), [], token))
        expected = brute_force(context.tokens, context.tokens, spec.longest, spec.shortest)
        assert list(table.candidates(state)) == expected


@given(TEXTS, st.lists(st.integers(0, 4), max_size=4))
def test_inside_the_draft_the_drafted_tokens_are_part_of_the_suffix(prompt: list[int], drafted: list[int]) -> None:
    spec, context = Lookup(occurrences=1000), Context(prompt, len(prompt))
    table = LookupTable(spec, context)
    state = table.start(context)
    for token in drafted:
        state = table.step(state, token)
    expected = brute_force(prompt, [*prompt, *drafted], spec.longest, spec.shortest)
    assert list(table.candidates(state)) == expected


def test_lookup_continues_the_longest_match_and_branches_where_the_text_did() -> None:
    drafting, context = opened(Lookup(), [1, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3])
    (tree,) = drafting.propose([context], [12])
    assert tree.tokens[0] == 4
    texts = {tuple(tree.tokens[index] for index in tree.path(node)) for node in range(len(tree))}
    assert {(4, 9), (5, 8)} <= texts


def test_lookup_proposes_nothing_after_a_token_that_is_new() -> None:
    drafting, context = opened(Lookup(), [1, 2, 1, 2, 7])
    assert len(drafting.propose([context], [8])[0]) == 0


@given(st.lists(st.integers(0, 2), min_size=2, max_size=300))
@settings(max_examples=20)
def test_the_index_of_lookup_is_bounded_by_its_window_and_forgets_the_oldest_first(text: list[int]) -> None:
    spec = Lookup(longest=2, occurrences=3, window=40)
    context = Context(text, len(text))
    table = LookupTable(spec, context)
    assert sum(map(len, table.followers.values())) <= 2 * spec.window
    assert all(len(held) <= 3 for held in table.followers.values())
    fresh = LookupTable(spec, Context(text[-spec.window // 2 :], 0))
    assert set(fresh.followers) <= set(table.followers)


def test_recycle_proposes_what_the_target_thought_after_the_token_last_time() -> None:
    drafting, context = opened(Recycle(k=3), [1, 3])
    assert len(drafting.propose([context], [8])[0]) == 0
    follow(drafting, context, [4, 5, 3], k=3)
    (tree,) = drafting.propose([context], [8])
    assert {tree.tokens[child] for child in tree.children()[ROOT]} == {4, 50, 51}
    assert tree.tokens[:2] == [4, 5]


def test_recycle_asks_the_last_two_tokens_before_the_last_one_and_then_the_prompt() -> None:
    known = Rows(pairs=10)
    table = RecycleTable(2, known, [9, 4, 9, 6, 9, 4], np.array([[20, 21]] * 7), {})
    assert list(table.candidates((1, 9)).items()) == [(4, 8), (6, 9)]
    known.put([(1, 5, [11, 13]), (2, 5, [12, 13])])
    assert list(table.candidates((1, 5)).items()) == [(11, 0), (13, 1), (12, 4)]
    assert list(table.candidates((3, 5)).items()) == [(12, 4), (13, 5)]
    assert list(table.candidates((1, 8)).items()) == []
    assert list(table.candidates((1, 6)).items()) == [(9, 8), (20, 10), (21, 11)]


def test_of_the_models_own_text_two_tokens_come_before_what_the_request_showed_of_one() -> None:
    known = Rows(pairs=10)
    written = {(1, 5): [31, 32], (ANY, 5): [33, 31], (ANY, 6): [34, 35]}
    table = RecycleTable(2, known, [6, 4], np.array([[20, 21]] * 7), written)
    assert list(table.candidates((1, 5)).items()) == [(31, 2), (32, 3)]
    assert list(table.candidates((2, 5)).items()) == [(33, 6), (31, 7)]
    assert list(table.candidates((2, 6)).items()) == [(34, 6), (35, 7)]
    known.put([(1, 5, [11, 31]), (2, 5, [12, 13])])
    assert list(table.candidates((1, 5)).items()) == [(11, 0), (31, 1), (32, 2)]
    assert list(table.candidates((3, 5)).items()) == [(12, 4), (13, 5)]
    assert list(table.candidates((2, 5)).items()) == [(12, 0), (13, 1)]


def test_rows_of_a_text_are_by_one_token_and_by_two_and_a_rank_counts_less_the_further_down() -> None:
    texts = np.array([[1, 2, 1, 2], [3, 2, 9, 9]])
    best = np.array([[[5, 6], [7, 8], [6, 5], [8, 4]], [[5, 6], [4, 8], [1, 2], [2, 1]]])
    rows = {(before, last): best for before, last, *best in rows_of(texts, best, 2).tolist()}
    assert rows == {
        (ANY, 1): [5, 6],
        (2, 1): [6, 5],
        (ANY, 2): [8, 4],
        (1, 2): [8, 7],
        (3, 2): [4, 8],
        (ANY, 3): [5, 6],
        (ANY, 9): [1, 2],
        (2, 9): [1, 2],
        (9, 9): [2, 1],
    }


def test_after_what_the_model_wrote_itself_it_is_proposed_again_from_the_first_step_on() -> None:
    drafter = Recycle(k=3, seed_text=4)
    drafting, context = opened(drafter, [1, 72])
    (tree,) = drafting.propose([context], [8])
    assert [tree.tokens[child] for child in tree.children()[ROOT]] == [75, 74, 73]
    assert tree.children()[tree.tokens.index(74)], "74 stands in the text"
    assert tree.tokens.index(75) not in tree.children(), "75 does not"
    target = drafting.target  # type: ignore[attr-defined]
    assert target.shared[drafter.text_key].dtype == np.int32
    assert drafter.written(target) is drafter.written(target)


@pytest.mark.parametrize("first", [None, 7])
def test_a_model_writes_the_same_text_again_and_says_of_it_what_transformers_says(
    monkeypatch: pytest.MonkeyPatch, first: int | None
) -> None:
    monkeypatch.setattr("graft.runtime.decoder.OWN_TEXTS", 2)
    monkeypatch.setattr("graft.runtime.decoder.OWN_LENGTH", 6)
    model, _ = tiny("llama")
    made = decoder("llama")
    made.first_token = first
    texts, best = made.own_text(15, 4)
    assert texts.shape == (3, 6) and best.shape == (3, 6, 4)
    assert len(set(texts[:, 0].tolist())) == 3
    assert all(text[place + 1] in best[row, place] for row, text in enumerate(texts) for place in range(5))
    start = np.full((3, int(first is not None)), first, np.int64)
    with torch.no_grad():
        logits = model(torch.from_numpy(np.concatenate([start, texts], 1))).logits
    assert best.tolist() == logits[:, start.shape[1] :].topk(4).indices.tolist()
    again = made.own_text(15, 4)
    assert (again[0] == texts).all() and (again[1] == best).all()
    assert made.store.lengths == []


def test_after_a_token_that_is_new_what_the_model_said_of_it_alone_is_proposed() -> None:
    drafting, context = opened(Recycle(k=3, seed_vocabulary=50), [1, 3])
    (tree,) = drafting.propose([context], [8])
    assert [tree.tokens[child] for child in tree.children()[ROOT]] == [4, 5, 6]
    assert drafting.target.shared["recycle: the best 3 after each token alone"].shape == (50, 3)  # type: ignore[attr-defined]
    context.tokens.append(60)
    drafting.observe(context, Outcome(DraftTree(), [], 60, np.array([[60, 61, 62]])))
    assert len(drafting.propose([context], [8])[0]) == 0


def test_what_the_model_says_after_each_token_alone_is_what_transformers_says() -> None:
    model, _ = tiny("llama")
    made = decoder("llama")
    for first, start in ((None, []), (7, [7])):
        made.first_token = first
        found = made.best_after(range(5, 40), 3)
        with torch.no_grad():
            expected = [model(torch.tensor([[*start, token]])).logits[0, -1].topk(3).indices for token in range(5, 40)]
        assert found.tolist() == torch.stack(expected).tolist()
        assert made.store.pending == [0] * len(made.store.pending) and len(made.store.free) == len(made.store.lengths)


def test_the_rows_by_two_tokens_are_bounded_and_the_oldest_goes_first() -> None:
    known = Rows(pairs=3)
    known.put((token, 1, [token]) for token in range(3))
    known.put([(0, 1, [7]), (5, 1, [5])])
    assert set(known.after_two) == {(2, 1), (0, 1), (5, 1)}
    assert known.after == {1: [5]}


def test_recycle_learns_from_rows_that_were_rejected() -> None:
    drafting, context = opened(Recycle(k=2), [1])
    tree = DraftTree([8], [ROOT], [0.5])
    context.tokens.append(3)
    drafting.observe(context, Outcome(tree, [], 3, np.array([[3, 4], [6, 7]])))
    context.tokens.append(8)
    drafting.observe(context, Outcome(DraftTree(), [], 8, np.array([[8, 9]])))
    (found,) = drafting.propose([context], [2])
    assert found.tokens[0] == 6


def test_of_a_token_twice_in_a_tree_the_row_on_the_accepted_path_is_kept_whatever_the_order() -> None:
    for order in ([0, 1], [1, 0]):
        drafting, context = opened(Recycle(k=2), [1, 2])
        tokens = [5, 6]
        tree = DraftTree([tokens[order[0]], tokens[order[1]], 9, 9], [ROOT, ROOT, 0, 1], [0.5] * 4)
        good = order.index(0)
        best = np.array([[5, 0], [0, 0], [0, 0], [0, 0], [0, 0]])
        best[good + 1] = [9, 0]
        best[good + 3] = [77, 78]
        best[2 - good + 2] = [13, 14]
        context.tokens += [5, 9, 77]
        drafting.observe(context, Outcome(tree, [good, good + 2], 77, best))
        context.tokens.append(9)
        drafting.observe(context, Outcome(DraftTree(), [], 9, np.array([[9, 0]])))
        assert drafting.propose([context], [1])[0].tokens == [77]


def test_recycle_seeded_from_the_prompt_knows_every_prompt_token() -> None:
    drafter = Recycle(k=2, seed_prompt=True)
    assert drafter.observes_prompt
    assert not Recycle().observes_prompt
    drafting, context = drafter.open(Model(), Chain()), Context([1, 2, 1], 3)
    drafting.begin(context, np.array([[2, 3], [1, 3], [4, 3]]))
    assert drafting.propose([context], [4])[0].tokens == [4]
    context.tokens.append(2)
    drafting.observe(context, Outcome(DraftTree(), [], 2, np.array([[2, 3]])))
    assert drafting.propose([context], [3])[0].tokens == [1, 2, 1]


@pytest.mark.parametrize("drafter", [Recycle(shared=True), Trie(shared=True)])
def test_a_shared_table_carries_over_to_the_next_request_and_an_own_one_does_not(drafter: TableDrafter) -> None:
    for spec, expected in ((drafter, True), (type(drafter)(), False)):
        target = Model()
        for attempt in range(2):
            drafting, context = spec.open(target, BestFirst()), Context([1, 2, 3], 3)
            drafting.begin(context, None)
            trees = follow(drafting, context, [4, 5, 6, 7], k=spec.observes)
            drafting.end(context)
            assert any(len(tree) for tree in trees) is (expected and attempt == 1)
        assert bool(target.shared) is expected


@given(TEXTS)
def test_the_trie_ranks_what_followed_the_longest_suffix_by_frequency(text: list[int]) -> None:
    drafter = Trie(branch=4)
    context = Context(text, len(text))
    table = drafter.table(context, None, Model())
    found = list(table.candidates(table.start(context)))
    expected: list[int] = []
    for size in range(min(3, len(text)), 0, -1):
        after = followers(text, text[len(text) - size :])
        expected += [token for token in after if token not in expected]
    counts = [followers(text, text[len(text) - size :]) for size in (3, 2, 1)]
    # Of equally frequent ones any may come first.
    assert set(found) == set(expected)
    longest = next((after for after in counts if after), [])
    ranked = [longest.count(token) for token in found[: len(set(longest))]]
    assert ranked == sorted(ranked, reverse=True)
    assert set(found[: len(set(longest))]) == set(longest)


@given(st.lists(st.integers(0, 30), min_size=200, max_size=600))
@settings(max_examples=15)
def test_the_trie_is_bounded_and_keeps_what_is_frequent(text: list[int]) -> None:
    trie = Branches(branch=5, limit=200)
    place: list = []
    for token in [99, 98] * 20 + text + [99, 98] * 20:
        place = trie.insert(place, token)
        assert trie.size <= 200
    stack, size = [trie.root], 0
    while stack:
        node = stack.pop()
        size += len(node.children)
        stack += node.children.values()
    assert size == trie.size
    assert 98 in trie.root.children[99].children


DRAFTERS = [Lookup(), Recycle(k=3), Trie()]


@pytest.mark.parametrize("drafter", DRAFTERS)
@given(text=st.lists(st.integers(0, 5), min_size=4, max_size=80), budget=st.integers(0, 12))
@settings(max_examples=25)
def test_a_proposal_is_a_tree_within_the_budget_and_repeats_itself(
    drafter: TableDrafter, text: list[int], budget: int
) -> None:
    runs = []
    for _ in range(2):
        drafting, context = opened(drafter, text[:2])
        runs.append(follow(drafting, context, text[2:], budget, drafter.observes))
        drafting.end(context)
        assert context.data == {}
    for tree, again in zip(*runs, strict=True):
        assert len(tree) <= budget
        assert all(ROOT <= parent < node for node, parent in enumerate(tree.parents))
        siblings = list(zip(tree.parents, tree.tokens, strict=True))
        assert len(set(siblings)) == len(siblings)
        assert all(0 <= p <= 1 for p in tree.probabilities)
        for node, below in tree.children().items():
            assert sum(tree.probabilities[child] for child in below) <= 1, node
        assert (tree.tokens, tree.parents) == (again.tokens, again.parents)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_requests_do_not_see_each_other(drafter: TableDrafter) -> None:
    together = drafter.open(Model(), BestFirst())
    contexts = [Context([1, 2, 3, 1, 2], 5), Context([1, 2, 9, 1, 2], 5)]
    for context in contexts:
        together.begin(context, None)
    both = together.propose(contexts, [6, 6])
    for context, tree in zip(contexts, both, strict=True):
        alone, own = opened(drafter, context.tokens)
        assert alone.propose([own], [6])[0] == tree


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_repeating_text_is_soon_drafted_as_far_as_the_budget_goes(drafter: TableDrafter) -> None:
    drafting, context = opened(drafter, [1, 2, 3, 4])
    trees = follow(drafting, context, [5, 6, 1, 2, 3, 4] * 12, 8, drafter.observes)
    assert len(trees) < 35
    assert max(map(len, map(trees[-2].path, range(len(trees[-2]))))) >= 4


def test_trust_moves_from_the_prior_to_what_is_seen_and_follows_a_change() -> None:
    trust, first, second = Trust([[0.5, 0.2]]), 2, 3
    assert (trust[first], trust[second]) == (0.5, 0.2)
    for _ in range(400):
        trust.learn([first, second], second)
    assert trust[first] < 0.05
    assert trust[second] > 0.95
    assert max(trust.seen.values()) <= Trust.MEMORY
    for _ in range(150):
        trust.learn([first, second], first)
    assert trust[first] > 0.5 > trust[second]


def test_candidates_that_tables_agree_on_are_learnt_apart_from_those_that_stand_alone() -> None:
    """Digits: 0 for a table that is silent, 1 for one that names others, 2 for its only class."""
    trust = Trust([[0.5], [0.4]])
    alone, against, both = 2, 2 + 3, 2 + 3 * 2
    assert [trust[cell] for cell in (alone, against, both, 1 + 3 * 2)] == [0.5, 0.5, 0.5, 0.4]
    for _ in range(100):
        trust.learn([both, 1 + 3 * 2], both)
        trust.learn([against, 1 + 3 * 2], None)
    assert trust[both] > 0.8
    assert trust[against] < 0.2
    assert trust[alone] == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lookup(longest=0),
        lambda: Lookup(longest=2, shortest=3),
        lambda: Lookup(occurrences=0),
        lambda: Lookup(window=3),
        lambda: Recycle(k=0),
        lambda: Recycle(k=65),
        lambda: Recycle(pairs=0),
        lambda: Recycle(seed_text=-1),
        lambda: Trie(branch=1),
        lambda: Trie(nodes=3),
    ],
)
def test_options_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(PlanError):
        make()  # type: ignore[operator]
