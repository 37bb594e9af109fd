"""Several drafters, one tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.compiler.drafting import ROOT, Context, Drafter, Drafting, DraftKind, DraftTree, Outcome, Target, TreePolicy
from graft.compiler.errors import PlanError
from graft.runtime.drafters.lookup import Lookup
from graft.runtime.drafters.merge import Merge, join
from graft.runtime.drafters.recycle import Recycle
from graft.runtime.drafters.tables import TableDrafting
from graft.runtime.drafters.trie import Trie
from graft.runtime.tree_policies import BestFirst
from tests.runtime.test_drafters import Model, follow


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Any tree with distinct siblings whose estimates add up to at most 1."""
    tree = DraftTree()
    left: dict[int, float] = {}
    for _ in range(draw(st.integers(0, 10))):
        parent, token = draw(st.integers(ROOT, len(tree) - 1)), draw(st.integers(0, 4))
        if (parent, token) not in zip(tree.parents, tree.tokens, strict=True):
            rate = draw(st.floats(0.01, 0.9)) * left.get(parent, 1.0)
            left[parent] = left.get(parent, 1.0) - rate
            tree.add(token, parent, rate)
    return tree


def texts(tree: DraftTree) -> set[tuple[int, ...]]:
    return {tuple(tree.tokens[index] for index in tree.path(node)) for node in range(len(tree))}


def union(forest: list[DraftTree], budget: int) -> DraftTree:
    return join(forest, [tree.probabilities for tree in forest], budget, "deterministic")


@given(st.lists(trees(), min_size=1, max_size=4))
def test_with_room_for_all_the_union_has_every_path_of_every_tree_and_no_other(forest: list[DraftTree]) -> None:
    assert texts(union(forest, 100)) == set().union(*map(texts, forest))


@given(st.lists(trees(), min_size=1, max_size=4), st.integers(0, 12))
def test_the_union_is_a_tree_within_the_budget(forest: list[DraftTree], budget: int) -> None:
    joined = union(forest, budget)
    assert len(joined) == min(budget, len(set().union(*map(texts, forest))))
    assert all(ROOT <= parent < node for node, parent in enumerate(joined.parents))
    assert len(texts(joined)) == len(joined)
    for below in joined.children().values():
        assert sum(joined.probabilities[child] for child in below) <= 1


@given(trees(), st.integers(0, 12))
def test_merging_a_tree_with_itself_keeps_it(tree: DraftTree, budget: int) -> None:
    assert texts(union([tree, tree], 100)) == texts(tree)
    assert texts(union([tree], budget)) <= texts(tree)


def test_a_node_that_both_name_is_more_probable_than_either_says() -> None:
    one, two = DraftTree([5, 6], [ROOT, ROOT], [0.3, 0.4]), DraftTree([5], [ROOT], [0.3])
    joined = union([one, two], 1)
    assert joined.tokens == [5]
    assert joined.probabilities == [pytest.approx(0.51)]


@dataclass(frozen=True)
class Says(Drafter):
    """Proposes a fixed chain with a fixed estimate."""

    tokens: tuple[int, ...]
    estimate: float
    drawn: bool = False
    wants: int = 0

    @property
    def kind(self) -> DraftKind:
        return "independent" if self.drawn else "deterministic"

    @property
    def observes(self) -> int:
        return self.wants

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        return Saying(self)


class Saying:
    """The `Drafting` of `Says`; counts what is open."""

    def __init__(self, spec: Says) -> None:
        self.spec = spec
        self.live = 0
        self.fails = False

    def begin(self, context: Context, prompt_best: object, prompt_hidden: object = None) -> None:
        self.live += 1

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        found = []
        for budget in budgets:
            size = min(budget, len(self.spec.tokens))
            found.append(DraftTree(list(self.spec.tokens[:size]), [*range(-1, size - 1)], [self.spec.estimate] * size))
        return found

    def observe(self, context: Context, outcome: Outcome) -> None:
        pass

    def end(self, context: Context) -> None:
        self.live -= 1
        if self.fails:
            raise RuntimeError


def test_a_drafter_that_overestimates_loses_its_rows_to_one_that_is_right() -> None:
    boaster, honest = Says((8, 8, 8, 8), 0.9), Says((3, 3, 3, 3), 0.5)
    drafting, context = Merge((boaster, honest)).open(Model(), BestFirst()), Context([1, 2], 2)
    drafting.begin(context, None)
    (before,) = drafting.propose([context], [4])
    assert before.tokens.count(8) > before.tokens.count(3)
    follow(drafting, context, [3] * 120, 4)
    (after,) = drafting.propose([context], [4])
    assert after.tokens == [3, 3, 3, 3]


def test_tables_that_are_merged_continue_each_other() -> None:
    """Only lookup knows that 2 follows 1, only recycling that 8 follows 2: together they draft past the seam."""

    def proposed(*drafters: Drafter) -> set[tuple[int, ...]]:
        drafting, context = Merge(drafters).open(Model(), BestFirst()), Context([7, 1, 2, 6], 4)
        drafting.begin(context, None)
        for token in (3, 2, 9, 1):
            best = np.array([[token, 8 if context.tokens[-1] == 2 else 40]])
            context.tokens.append(token)
            drafting.observe(context, Outcome(DraftTree(), [], token, best))
        return texts(drafting.propose([context], [40])[0])

    assert (2,) in proposed(Lookup())
    assert (2, 8) not in proposed(Lookup())
    assert (2,) in proposed(Lookup(), Recycle(k=2))
    assert (2, 8) in proposed(Lookup(), Recycle(k=2))


def test_one_drafter_stays_itself_and_tables_need_no_union() -> None:
    single = Merge((Says((1,), 0.5, drawn=True),))
    assert isinstance(single.open(Model(), BestFirst()), Saying)
    assert single.kind == "independent"
    assert isinstance(Merge((Lookup(), Recycle(), Trie())).open(Model(), BestFirst()), TableDrafting)


def test_the_kind_of_a_merged_tree_is_deterministic_only_if_every_part_is() -> None:
    assert Merge((Lookup(), Says((1,), 0.5))).kind == "deterministic"
    mixed = Merge((Lookup(), Says((1,), 0.5, drawn=True)))
    assert mixed.kind == "mixed"
    drafting, context = mixed.open(Model(), BestFirst()), Context([1, 2], 2)
    drafting.begin(context, None)
    assert drafting.propose([context], [4])[0].kind == "mixed"


def test_a_merge_observes_what_its_parts_ask_for() -> None:
    assert Merge((Lookup(), Recycle(k=5), Says((1,), 0.5, wants=3))).observes == 5
    assert Merge((Lookup(), Recycle(seed_prompt=True))).observes_prompt
    assert not Merge((Lookup(), Recycle())).observes_prompt
    assert Merge((Lookup(),)).observes == 0


def test_every_part_is_ended_even_if_one_raises() -> None:
    parts = Says((1,), 0.5), Says((2,), 0.5)
    drafting, context = Merge(parts).open(Model(), BestFirst()), Context([1], 1)
    drafting.begin(context, None)
    sayings: list[Saying] = drafting.parts  # type: ignore[attr-defined]
    sayings[0].fails = sayings[1].fails = True
    with pytest.raises(RuntimeError):
        drafting.end(context)
    assert [saying.live for saying in sayings] == [0, 0]
    assert context.data == {}


@pytest.mark.parametrize("drafters", [(), (Lookup(), Lookup())])
def test_nothing_to_merge_and_the_same_twice_are_refused(drafters: tuple[Drafter, ...]) -> None:
    with pytest.raises(PlanError, match="cannot be merged"):
        Merge(drafters)
