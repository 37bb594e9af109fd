"""Acceptance rules, one case at a time; their law is the business of test_lossless."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.compiler.acceptance import check_lossless, is_lossless, is_lossy
from graft.compiler.drafting import ROOT, Drafter, Drafting, DraftKind, DraftTree, Target, TreePolicy, Verifier
from graft.compiler.errors import GenerationError, PlanError
from graft.runtime.random import Streams
from graft.runtime.tree_policies import BestFirst, Chain, Fixed
from graft.runtime.verifiers import GreedyWalk, Leviathan, LossyTypical, SampleAndMatch, default_verifier, draw
from tests.runtime.enumeration import Model, ModelRows, Text


class Fixture:
    """`Rows` with given distributions."""

    def __init__(self, *rows: list[float]) -> None:
        self.rows = [np.array(row, dtype=np.float64) for row in rows]

    def argmax(self, row: int) -> int:
        return int(self.rows[row].argmax())

    def distribution(self, row: int) -> np.ndarray:
        return self.rows[row]


class Fixed01:
    """`Uniforms` by stream."""

    def __init__(self, **numbers: float) -> None:
        self.numbers = numbers

    def uniform(self, stream: str, counter: int) -> float:
        return self.numbers[stream]


def chain(token: int, q: list[float]) -> DraftTree:
    tree = DraftTree(kind="independent", q={ROOT: np.array(q)})
    tree.add(token, ROOT, 0.5)
    return tree


@st.composite
def trees(draw_: st.DrawFn, vocabulary: int = 4) -> DraftTree:
    """Any tree with distinct siblings."""
    tree = DraftTree()
    for _ in range(draw_(st.integers(0, 14))):
        parent = draw_(st.integers(ROOT, len(tree) - 1))
        token = draw_(st.integers(0, vocabulary - 1))
        if all((p, t) != (parent, token) for p, t in zip(tree.parents, tree.tokens, strict=True)):
            tree.add(token, parent, 0.5)
    return tree


def decoded(verifier: Verifier, forest: list[DraftTree], model: Model, length: int, seed: int) -> Text:
    text: Text = ()
    steps = 0
    while len(text) < length:
        tree = forest[steps % len(forest)]
        path, token = verifier.verify(tree, ModelRows(model, text, tree), Streams(seed), len(text))
        assert tree.path(path[-1] if path else ROOT) == path
        text += (*(tree.tokens[node] for node in path), token)
        steps += 1
    return text[:length]


@given(st.lists(trees(), min_size=1, max_size=4), st.integers(0, 50))
def test_the_greedy_walk_gives_what_plain_decoding_gives_for_any_tree(forest: list[DraftTree], seed: int) -> None:
    model = Model(seed, 4, 24)
    assert decoded(GreedyWalk(), forest, model, 10, 0) == decoded(GreedyWalk(), [DraftTree()], model, 10, 0)


@given(st.lists(trees(), min_size=1, max_size=4), st.integers(0, 50), st.integers(0, 2**64 - 1))
def test_sample_and_match_gives_what_plain_sampling_with_the_seed_gives_for_any_tree(
    forest: list[DraftTree], model_seed: int, seed: int
) -> None:
    model = Model(model_seed, 4, 24)
    plain = decoded(SampleAndMatch(), [DraftTree()], model, 10, seed)
    assert decoded(SampleAndMatch(), forest, model, 10, seed) == plain


@given(trees(), st.integers(0, 50))
@settings(max_examples=50)
def test_a_walk_goes_as_deep_as_the_tree_follows_the_target(tree: DraftTree, seed: int) -> None:
    model = Model(seed, 4, 24)
    rows = ModelRows(model, (), tree)
    path, token = GreedyWalk().verify(tree, rows, Streams(0), 0)
    last = path[-1] if path else ROOT
    assert token == rows.argmax(last + 1)
    assert all((p, t) != (last, token) for p, t in zip(tree.parents, tree.tokens, strict=True))


def test_an_empty_tree_under_leviathan_is_plain_sampling() -> None:
    model = Model(1, 4, 24)
    assert decoded(Leviathan(), [DraftTree()], model, 8, 5) == decoded(SampleAndMatch(), [DraftTree()], model, 8, 5)


def test_leviathan_accepts_just_below_the_ratio_and_rejects_at_it() -> None:
    rows = Fixture([0.25, 0.75], [0.0, 1.0])
    tree = chain(0, [0.5, 0.5])
    below = Leviathan().verify(tree, rows, Fixed01(accept=np.nextafter(0.5, 0), sample=0.5, resample=0.5), 0)
    at = Leviathan().verify(tree, rows, Fixed01(accept=0.5, sample=0.5, resample=0.5), 0)
    assert (below, at) == (([0], 1), ([], 1))


def test_where_p_and_q_are_nearly_equal_a_rejection_draws_from_p() -> None:
    """The residual's mass is 0, or rounding noise; dividing by it is a NaN in the standard rule of transformers."""
    p = [0.1, 0.2, 0.7]
    q = list(np.array(p) * (1 + 1e-15))
    for equal in (p, q):
        path, token = Leviathan().verify(
            chain(0, equal), Fixture(p, p), Fixed01(accept=1.0, sample=0.0, resample=0.5), 0
        )
        assert (path, token) == ([], 2)


def test_a_token_that_p_rules_out_is_never_accepted() -> None:
    rows = Fixture([0.0, 1.0], [1.0, 0.0])
    path, token = Leviathan().verify(chain(0, [1.0, 0.0]), rows, Fixed01(accept=0.0, sample=0.0, resample=0.0), 0)
    assert (path, token) == ([], 1)


def test_a_drafted_token_that_q_rules_out_is_an_error() -> None:
    with pytest.raises(GenerationError, match="probability 0"):
        Leviathan().verify(chain(0, [0.0, 1.0]), Fixture([0.5, 0.5], [0.5, 0.5]), Streams(0), 0)


@pytest.mark.parametrize("kind", ["deterministic", "without-replacement", "mixed"])
def test_leviathan_refuses_a_tree_that_was_not_drawn_independently(kind: DraftKind) -> None:
    tree = chain(0, [0.5, 0.5])
    tree.kind = kind
    with pytest.raises(PlanError, match="Leviathan"):
        Leviathan().verify(tree, Fixture([0.5, 0.5], [0.5, 0.5]), Streams(0), 0)


def test_leviathan_refuses_a_tree_that_branches() -> None:
    tree = chain(0, [0.5, 0.5])
    tree.add(1, ROOT, 0.5)
    with pytest.raises(PlanError, match="chain"):
        Leviathan().verify(tree, Fixture(*[[0.5, 0.5]] * 3), Streams(0), 0)


def test_verifying_leaves_the_distributions_as_they_are() -> None:
    rows = Fixture([0.25, 0.25, 0.5], [0.5, 0.25, 0.25])
    before = [row.copy() for row in rows.rows]
    tree = chain(2, [0.0, 0.0, 1.0])
    for verifier in (Leviathan(), SampleAndMatch(), GreedyWalk()):
        for seed in range(5):
            verifier.verify(tree, rows, Streams(seed), 0)
    assert all((a == b).all() for a, b in zip(rows.rows, before, strict=True))
    assert tree.q[ROOT].tolist() == [0.0, 0.0, 1.0]


def test_of_two_siblings_with_the_same_token_the_first_is_followed() -> None:
    tree = DraftTree(kind="independent")
    for _ in range(2):
        tree.add(1, ROOT, 0.5)
    assert SampleAndMatch().verify(tree, Fixture([0.0, 1.0], [1.0, 0.0], [0.0, 1.0]), Streams(0), 0) == ([0], 0)


@given(
    st.lists(st.sampled_from([0.0, 1e-300, 1e-9, 0.1, 0.3, 1.0]), min_size=1, max_size=8).filter(any),
    st.floats(0, 1, exclude_max=True),
)
def test_a_drawn_token_has_weight_and_stands_where_the_number_falls(weights: list[float], uniform: float) -> None:
    token = draw(np.array(weights), uniform)
    below = sum(weights[:token])
    assert weights[token] > 0
    assert below <= uniform * sum(weights) * (1 + 1e-12)
    assert uniform * sum(weights) <= (below + weights[token]) * (1 + 1e-12)


def test_the_greatest_number_below_one_draws_the_last_token_with_weight() -> None:
    assert draw(np.array([0.1, 0.2, 0.7, 0.0]), np.nextafter(1.0, 0)) == 2


@pytest.mark.parametrize("weights", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_weights_from_which_nothing_can_be_drawn_are_an_error(weights: list[float]) -> None:
    with pytest.raises(GenerationError, match="cannot be drawn"):
        draw(np.array(weights), 0.5)


class Draws(Drafter):
    """A drafter of a given kind."""

    def __init__(self, kind: DraftKind) -> None:
        object.__setattr__(self, "own", kind)

    @property
    def kind(self) -> DraftKind:
        return self.own  # type: ignore[attr-defined, no-any-return]

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        raise NotImplementedError


BRANCHING = Fixed.branching(2)
KINDS: tuple[DraftKind, ...] = ("deterministic", "independent", "without-replacement", "mixed")


def lossless(verifier: Verifier, kind: DraftKind, policy: TreePolicy, sampling: bool) -> bool:
    try:
        check_lossless(verifier, [Draws(kind)], policy, sampling=sampling)
    except PlanError:
        return False
    return True


@pytest.mark.parametrize("policy", [Chain(), BestFirst(), BRANCHING])
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_verifier_takes_every_draft(kind: DraftKind, policy: TreePolicy) -> None:
    for sampling in (False, True):
        assert lossless(default_verifier(sampling=sampling), kind, policy, sampling)


def test_leviathan_takes_chains_of_independent_samples_alone() -> None:
    taken = {
        (kind, type(policy).__name__)
        for kind in KINDS
        for policy in (Chain(), BestFirst(), BRANCHING)
        if lossless(Leviathan(), kind, policy, sampling=True)
    }
    assert taken == {("independent", "Chain"), ("independent", "BestFirst")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_greedy_walk_does_not_sample_and_the_sampling_rules_are_not_greedy(kind: DraftKind) -> None:
    assert not lossless(GreedyWalk(), kind, Chain(), sampling=True)
    assert not lossless(SampleAndMatch(), kind, Chain(), sampling=False)
    assert not lossless(Leviathan(), kind, Chain(), sampling=False)


def test_the_type_check_names_both_why_and_what_would_do() -> None:
    with pytest.raises(PlanError) as caught:
        check_lossless(Leviathan(), [Draws("deterministic")], BestFirst(), sampling=True)
    message = str(caught.value)
    assert "leviathan" in message
    assert "draws" in message
    assert "deterministic" in message
    assert "sample-and-match" in message


def test_drafters_that_each_go_with_a_verifier_need_not_together() -> None:
    check_lossless(Leviathan(), [Draws("independent")], Chain())
    with pytest.raises(PlanError, match="mixed"):
        check_lossless(Leviathan(), [Draws("independent"), Draws("independent")], Chain())
    check_lossless(SampleAndMatch(), [Draws("independent"), Draws("deterministic")], Chain(), sampling=True)


def test_typical_acceptance_takes_what_exceeds_its_threshold_and_the_deepest_path() -> None:
    tree = DraftTree()
    tree.add(0, ROOT, 0.5)
    tree.add(1, ROOT, 0.5)
    tree.add(1, 1, 0.5)
    flat, sharp = [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]
    # A flat distribution allows p > 0.3 / 4, a sharp one p > 0.09.
    assert LossyTypical().verify(tree, Fixture(flat, sharp, flat, sharp), Streams(0), 0) == ([1, 2], 0)
    assert LossyTypical().verify(tree, Fixture(sharp, flat, flat, flat), Streams(0), 0) == ([0], 0)
    assert LossyTypical(delta=1.0, epsilon=0.3).verify(tree, Fixture(flat, flat, flat, flat), Streams(0), 0) == ([], 0)


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"delta": 1.5}])
def test_thresholds_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="out of range"):
        LossyTypical(**options)


def test_a_lossy_rule_says_so_by_its_name_and_is_lossless_for_nothing() -> None:
    assert is_lossy(LossyTypical())
    assert not any(lossless_for(LossyTypical(), kind) for kind in KINDS)
    check_lossless(LossyTypical(), [Draws("mixed")], BRANCHING, sampling=True)


def lossless_for(verifier: Verifier, kind: DraftKind) -> bool:
    return any(is_lossless(verifier, kind, branches=False, sampling=mode) for mode in (True, False))
