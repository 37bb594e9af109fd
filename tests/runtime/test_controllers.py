"""How much to draft."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from graft.compiler.drafting import ROOT, Context, Control, DraftKind, DraftTree, Outcome
from graft.compiler.errors import PlanError
from graft.runtime.controllers import Adaptive, AdaptiveControl, Correction, FixedBudget, by_reach

KINDS: tuple[DraftKind, ...] = ("deterministic", "independent")


def chain(nodes: int, kind: DraftKind, probability: float = 0.9) -> DraftTree:
    """A chain whose tokens the drafter is sure of."""
    return DraftTree([7] * nodes, [ROOT, *range(nodes - 1)][:nodes], [probability] * nodes, kind)


def step_of(control: Control, context: Context, offered: int, accepted: int, kind: DraftKind) -> int:
    """One step in which the drafter offers at most that many nodes; how many were verified."""
    tree = control.keep(context, chain(min(offered, control.budget(context)), kind))
    control.observe(context, Outcome(tree, list(range(min(accepted, len(tree)))), 1))
    return len(tree)


def drive(
    accept: Callable[[int], int], seconds: Callable[[int], float], steps: int, kind: DraftKind, nodes: int = 16
) -> list[int]:
    """How many nodes were verified in each of some steps, where step s would accept that many tokens of a chain."""
    control, context = Adaptive().open(nodes, seconds, free), Context([1, 2, 3], 3)
    return [step_of(control, context, nodes, accept(step), kind) for step in range(steps)]


def flat(rows: int) -> float:
    return 1.0


def linear(rows: int) -> float:
    return float(rows)


def free() -> float:
    return 0.0


def test_a_fixed_budget_is_what_it_says_but_no_more_than_the_tree_has() -> None:
    context = Context([1], 1)
    assert [FixedBudget(n).open(16, flat, free).budget(context) for n in (0, 5, 40)] == [0, 5, 16]
    assert FixedBudget().open(12, flat, free).budget(context) == 12
    with pytest.raises(PlanError, match="negative"):
        FixedBudget(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_where_rows_are_free_and_tokens_are_accepted_the_whole_tree_is_drafted(kind: DraftKind) -> None:
    assert drive(lambda step: 16, flat, 60, kind)[-20:] == [16] * 20


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_row_costs_as_much_as_a_step_and_little_is_accepted_drafting_is_switched_off(kind: DraftKind) -> None:
    chance = random.Random(0)
    budgets = drive(lambda step: int(chance.random() < 0.3), linear, 400, kind)
    assert sum(budget == 0 for budget in budgets[100:]) > 0.9 * 300


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_it_tries_again_with_a_small_tree_and_ever_less_often(kind: DraftKind) -> None:
    kept = drive(lambda step: 0, linear, 3000, kind)
    tried = [(step, nodes) for step, nodes in enumerate(kept) if nodes and step > 100]
    assert tried
    assert {nodes for _, nodes in tried} == {Adaptive().probe}
    waits = [b - a for (a, _), (b, _) in pairwise(tried)]
    assert waits == sorted(waits)
    assert waits[-1] <= 16 * Adaptive().explore + 1


@pytest.mark.parametrize("kind", KINDS)
def test_it_switches_on_again_when_the_text_becomes_easy(kind: DraftKind) -> None:
    budgets = drive(lambda step: 0 if step < 300 else 16, lambda rows: 1.0 + 0.05 * rows, 1200, kind)
    assert sum(budgets[200:300]) < 40
    assert budgets[-1] == 16


@pytest.mark.parametrize("kind", KINDS)
def test_drafting_that_takes_longer_than_it_saves_is_switched_off(kind: DraftKind) -> None:
    for seconds, share in ((0.5, 0.95), (5.0, 0.1)):
        control, context = Adaptive().open(8, flat, lambda seconds=seconds: seconds), Context([1], 1)  # type: ignore[misc]
        kept = [step_of(control, context, 8, 2, kind) for _ in range(400)]
        drafted = sum(nodes > 0 for nodes in kept[100:]) / 300
        assert drafted > share if share > 0.5 else drafted < share


@pytest.mark.parametrize("kind", KINDS)
def test_drafting_that_takes_many_steps_time_is_switched_off_after_the_first(kind: DraftKind) -> None:
    control, context = Adaptive().open(8, flat, lambda: 20.0), Context([1], 1)
    kept = [step_of(control, context, 8, 1, kind) for _ in range(16)]
    assert kept == [8] + [0] * 15


@pytest.mark.parametrize("kind", KINDS)
def test_it_stops_drafting_where_the_depth_that_is_accepted_ends(kind: DraftKind) -> None:
    """Always three tokens, and rows that cost. Drawn drafts are told apart by their depth; of deterministic ones the
    drafter says the same of all, so that what it says is corrected for all."""
    kept = drive(lambda step: 3, lambda rows: 1.0 + 0.1 * rows, 300, kind)
    assert max(set(kept[100:]), key=kept[100:].count) == (3 if kind == "independent" else 4)


def test_the_decision_is_the_best_ratio_of_expected_tokens_to_expected_seconds() -> None:
    def seconds(rows: int) -> float:
        return 1.0 + 0.2 * max(0, rows - 4) ** 1.5

    control = Adaptive().open(8, seconds, free)
    assert isinstance(control, AdaptiveControl)
    chance = random.Random(1)
    context = Context([1], 1)
    for _ in range(50):
        step_of(control, context, 8, chance.choice([0, 1, 1, 2, 5]), "independent")
        rates = control._rates(context)
        goodput = []
        for nodes in range(9):
            whole = 1 + sum(rates.drafted[:nodes])
            low, share = int(whole), whole - int(whole)
            time = (1 - share) * seconds(low) + share * seconds(low + 1)
            goodput.append((1 + sum(rates.accepted[:nodes])) / time)
        assert goodput[control.best(rates)] == pytest.approx(max(goodput))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_smaller_than_the_budget_costs_only_the_rows_that_it_has(kind: DraftKind) -> None:
    """A drafter that is seldom sure, and right when it is, stays on although it is right in one step of eight."""
    control, context, kept = Adaptive().open(4, lambda rows: 1.0 + 0.5 * rows, free), Context([1], 1), []
    for step in range(600):
        kept.append(step_of(control, context, 4 if step % 8 == 0 else 0, 4, kind))
    assert kept[-96:] == [4, 0, 0, 0, 0, 0, 0, 0] * 12


@pytest.mark.parametrize("kind", KINDS)
def test_requests_learn_by_themselves_and_their_state_does_not_grow(kind: DraftKind) -> None:
    control = Adaptive().open(16, lambda rows: 1.0 + 0.3 * rows, free)
    good, bad = Context([1], 1), Context([2], 1)
    for _ in range(500):
        for context, accepted in ((good, 16), (bad, 0)):
            step_of(control, context, 16, accepted, kind)
    assert control.budget(good) == 16
    assert control.budget(bad) <= Adaptive().probe
    rates = control._rates(good)  # type: ignore[attr-defined]
    assert len(rates.accepted) == len(rates.drafted) == len(rates.steps) == 16
    assert max(rates.steps) <= Adaptive().memory


def test_of_a_deterministic_tree_the_nodes_that_pay_are_kept() -> None:
    """At one token a second, a row is worth its tenth of a second from an estimate of a tenth on."""
    control, context = Adaptive().open(16, lambda rows: 1.5 + 0.1 * (rows - 1), free), Context([1], 1)
    tree = DraftTree([1, 2, 3, 4, 5], [ROOT, ROOT, 0, 1, 2], [0.6, 0.12, 0.5, 0.5, 0.2])
    kept = control.keep(context, tree)
    assert (kept.tokens, kept.parents) == ([1, 2, 3], [ROOT, ROOT, 0])


def test_what_is_kept_of_drawn_drafts_does_not_depend_on_their_estimates() -> None:
    control, context = Adaptive().open(16, linear, free), Context([1], 1)
    for probability in (0.001, 0.999):
        tree = chain(5, "independent", probability)
        assert control.keep(context, tree) is tree


def test_estimates_are_corrected_by_how_often_they_came_true() -> None:
    correction = Correction()
    for trial in range(4000):
        correction.learn(0.3, trial % 10 == 0)
        correction.learn(0.6, trial % 10 != 0)
    assert correction.of(0.3) == pytest.approx(0.1, rel=0.2)
    assert correction.of(0.6) == pytest.approx(0.9, rel=0.2)
    assert correction.of(0.99) == 0.99
    assert max(correction.hoped) <= correction.MEMORY


def test_without_nodes_nothing_is_drafted_or_measured() -> None:
    def never(rows: int) -> float:
        raise AssertionError

    control, context = Adaptive().open(0, never, free), Context([1], 1)
    assert control.budget(context) == 0
    control.observe(context, Outcome(DraftTree(), [], 1))
    assert context.data == {}


def test_nodes_are_ranked_by_reach_with_parents_first() -> None:
    tree = DraftTree([1, 2, 3, 4], [ROOT, ROOT, 0, 1], [0.3, 0.6, 1.0, 0.9])
    assert by_reach(tree) == [1, 3, 0, 2]


@pytest.mark.parametrize("option", ["memory", "explore", "probe"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(PlanError, match="out of range"):
        Adaptive(**{option: 0})
