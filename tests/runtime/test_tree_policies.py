"""Shapes of draft trees."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.compiler.drafting import ROOT, Candidates, DraftKind, DraftTree, TreePolicy
from graft.compiler.errors import PlanError
from graft.runtime.tree_policies import BestFirst, Chain, Fixed

Text = tuple[int, ...]
Source = Callable[[Text], Candidates]


def source(seed: int, width: int = 3, depth: int = 6) -> Source:
    """Candidates by a fixed rule; the probabilities of a place add up to less than 1."""

    def candidates(text: Text) -> Candidates:
        if len(text) >= depth:
            return []
        mixed = hash((seed, text)) & 0xFFFF
        shares = [1 + (mixed >> (4 * rank)) % 16 for rank in range(width)]
        rates = sorted((share / (sum(shares) + 1 + mixed % 7) for share in shares), reverse=True)
        return [((mixed + rank) % 97, rate) for rank, rate in enumerate(rates)]

    return candidates


def grow(
    policy: TreePolicy, budget: int, candidates: Source, kind: DraftKind = "deterministic", by_level: bool = False
) -> tuple[DraftTree, int]:
    """The tree, and how often candidates were asked for."""
    tree = DraftTree(kind=kind)
    growth, asked = policy.grow(tree, budget, by_level=by_level), 0
    try:
        nodes = next(growth)
        while True:
            asked += 1
            nodes = growth.send([candidates(text(tree, node)) for node in nodes])
    except StopIteration as grown:
        return grown.value, asked


def text(tree: DraftTree, node: int) -> Text:
    return tuple(tree.tokens[index] for index in tree.path(node))


def reach(tree: DraftTree) -> dict[Text, float]:
    found: dict[Text, float] = {}
    for node in range(len(tree)):
        path = tree.path(node)
        product = 1.0
        for index in path:
            product *= tree.probabilities[index]
        found[text(tree, node)] = product
    return found


POLICIES = st.sampled_from(
    [Chain(), Fixed.branching(2, 2, 1), Fixed(((0,), (1,), (0, 0), (0, 2))), BestFirst(), BestFirst(width=2, floor=0.1)]
)


@given(POLICIES, st.integers(0, 20), st.integers(0, 10**6), st.booleans())
def test_every_policy_grows_a_tree_within_the_budget(policy: TreePolicy, budget: int, seed: int, level: bool) -> None:
    tree, _ = grow(policy, budget, source(seed), by_level=level)
    assert len(tree) <= budget
    assert all(ROOT <= parent < node for node, parent in enumerate(tree.parents))
    siblings = list(zip(tree.parents, tree.tokens, strict=True))
    assert len(set(siblings)) == len(siblings)
    for node in range(len(tree)):
        named = dict(source(seed)(text(tree, node)[:-1]))
        assert named[tree.tokens[node]] == tree.probabilities[node]


@given(st.integers(0, 12), st.integers(0, 10**6))
def test_best_first_takes_the_nodes_that_are_most_probably_reached(budget: int, seed: int) -> None:
    candidates = source(seed, depth=3)
    everything: dict[Text, float] = {}
    level: dict[Text, float] = {(): 1.0}
    for _ in range(3):
        level = {(*path, t): rate * p for path, rate in level.items() for t, p in candidates(path)}
        everything |= level
    best = sorted(everything.values(), reverse=True)[:budget]
    tree, _ = grow(BestFirst(floor=0.0), budget, candidates)
    assert sorted(reach(tree).values(), reverse=True) == pytest.approx(best)
    wide, asked = grow(BestFirst(floor=0.0, width=10**6), budget, candidates, by_level=True)
    assert sorted(reach(wide).values(), reverse=True) == pytest.approx(best)
    assert asked <= 4


@given(st.integers(1, 16), st.integers(0, 10**6))
def test_best_first_adds_nodes_in_the_order_in_which_a_smaller_budget_keeps_them(budget: int, seed: int) -> None:
    large, _ = grow(BestFirst(), budget, source(seed))
    small, _ = grow(BestFirst(), budget - 1, source(seed))
    assert (small.tokens, small.parents) == (large.tokens[: len(small)], large.parents[: len(small)])


def test_best_first_drafts_nothing_below_the_floor() -> None:
    tree, _ = grow(BestFirst(floor=0.2), 16, lambda text: [(1, 0.5), (2, 0.1)])
    assert set(reach(tree)) == {(1,), (1, 1)}


def test_best_first_by_level_asks_once_for_each_level_and_for_no_more_than_its_width() -> None:
    seen: list[int] = []
    tree = DraftTree()
    growth = BestFirst(width=2, floor=0.0).grow(tree, 8, by_level=True)
    nodes = next(growth)
    with pytest.raises(StopIteration):
        for _ in itertools.count():
            seen.append(len(nodes))
            nodes = growth.send([[(1, 0.5), (2, 0.3), (3, 0.1)] for _ in nodes])
    assert seen[0] == 1
    assert max(seen) <= 2


def test_independent_drafts_grow_to_the_budget_however_improbable_they_are() -> None:
    """Leaving out a sample because it is improbable would change the distribution that samples come from."""
    kind: DraftKind = "independent"
    for by_level in (False, True):
        tree, _ = grow(BestFirst(floor=0.5), 4, lambda text: [(len(text), 0.01), (9, 0.9)], kind, by_level)
        assert (tree.tokens, tree.parents) == ([0, 1, 2, 3], [ROOT, 0, 1, 2])
    assert not BestFirst().branches(kind)
    assert BestFirst().branches("deterministic")


def test_a_chain_stops_where_there_is_no_candidate() -> None:
    tree, asked = grow(Chain(), 9, source(3, depth=4))
    assert tree.parents == [ROOT, 0, 1, 2]
    assert asked == 5


def test_a_chain_asks_for_no_candidates_that_it_has_no_room_for() -> None:
    assert grow(Chain(), 3, source(3))[1] == 3
    assert grow(Chain(), 0, source(3))[1] == 0


def test_a_fixed_tree_follows_its_paths_by_rank_and_skips_ranks_that_are_missing() -> None:
    policy = Fixed(((0,), (1,), (5,), (1, 0), (5, 0)))
    tree, asked = grow(policy, 16, lambda text: [(10 + len(text), 0.5), (20 + len(text), 0.2)])
    assert set(reach(tree)) == {(10,), (20,), (20, 11)}
    assert asked == 2


def test_the_full_tree_by_branching_lists_levels_in_order() -> None:
    assert Fixed.branching(2, 1).paths == ((0,), (1,), (0, 0), (1, 0))
    assert Fixed.branching(2).branches("deterministic")
    assert not Fixed.branching(1, 1).branches("deterministic")


@pytest.mark.parametrize("paths", [((0, 0),), ((0,), (0,)), ((-1,),), ((),)])
def test_paths_that_are_no_tree_are_refused(paths: tuple[Text, ...]) -> None:
    with pytest.raises(PlanError, match="do not form a tree"):
        Fixed(paths)


def test_a_selection_keeps_tokens_parents_estimates_and_q() -> None:
    tree, _ = grow(Fixed.branching(2, 2), 6, source(1))
    chosen = tree.select([1, 4, 5])
    assert [text(chosen, node) for node in range(3)] == [text(tree, node) for node in (1, 4, 5)]
    assert chosen.parents == [ROOT, 0, 0]
    assert chosen.probabilities == [tree.probabilities[node] for node in (1, 4, 5)]
