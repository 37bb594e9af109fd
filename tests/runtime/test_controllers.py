"""How much to draft."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from graft.compiler.drafting import ROOT, Context, DraftTree, Outcome
from graft.compiler.errors import PlanError
from graft.runtime.controllers import Adaptive, AdaptiveControl, FixedBudget, by_reach


def outcome(nodes: int, accepted: int) -> Outcome:
    """A chain of which the first tokens are accepted."""
    tree = DraftTree([7] * nodes, [ROOT, *range(nodes - 1)][:nodes], [0.9] * nodes)
    return Outcome(tree, list(range(min(accepted, nodes))), 1)


def drive(accept: Callable[[int], int], seconds: Callable[[int], float], steps: int, nodes: int = 16) -> list[int]:
    """The budgets of some steps, where step s would accept that many tokens of a chain."""
    control, context = Adaptive().open(nodes, seconds), Context([1, 2, 3], 3)
    budgets = []
    for step in range(steps):
        budgets.append(control.budget(context))
        control.observe(context, outcome(budgets[-1], accept(step)))
    return budgets


def flat(rows: int) -> float:
    return 1.0


def linear(rows: int) -> float:
    return float(rows)


def test_a_fixed_budget_is_what_it_says_but_no_more_than_the_tree_has() -> None:
    context = Context([1], 1)
    assert [FixedBudget(n).open(16, flat).budget(context) for n in (0, 5, 40)] == [0, 5, 16]
    assert FixedBudget().open(12, flat).budget(context) == 12
    with pytest.raises(PlanError, match="negative"):
        FixedBudget(-1)


def test_where_rows_are_free_and_tokens_are_accepted_the_whole_tree_is_drafted() -> None:
    assert drive(lambda step: 16, flat, 60)[-20:] == [16] * 20


def test_where_a_row_costs_as_much_as_a_step_and_little_is_accepted_drafting_is_switched_off() -> None:
    chance = random.Random(0)
    budgets = drive(lambda step: int(chance.random() < 0.3), linear, 400)
    assert sum(budget == 0 for budget in budgets[100:]) > 0.9 * 300


def test_switched_off_it_tries_again_with_a_small_tree_and_ever_less_often() -> None:
    tried = [(step, budget) for step, budget in enumerate(drive(lambda step: 0, linear, 3000)) if budget and step > 100]
    assert tried
    assert {budget for _, budget in tried} == {Adaptive().probe}
    waits = [b - a for (a, _), (b, _) in pairwise(tried)]
    assert waits == sorted(waits)
    assert waits[-1] <= 16 * Adaptive().explore + 1


def test_it_switches_on_again_when_the_text_becomes_easy() -> None:
    budgets = drive(lambda step: 0 if step < 300 else 16, lambda rows: 1.0 + 0.05 * rows, 1200)
    assert sum(budgets[200:300]) < 40
    assert budgets[-1] == 16


def test_it_stops_drafting_where_the_depth_that_is_accepted_ends() -> None:
    """Always three tokens, and rows that cost: the best tree has exactly those."""
    budgets = drive(lambda step: 3, lambda rows: 1.0 + 0.1 * rows, 300)
    assert max(set(budgets[100:]), key=budgets[100:].count) == 3


def test_the_decision_is_the_best_ratio_of_expected_tokens_to_expected_seconds() -> None:
    def seconds(rows: int) -> float:
        return 1.0 + 0.2 * max(0, rows - 4) ** 1.5

    control = Adaptive().open(8, seconds)
    assert isinstance(control, AdaptiveControl)
    chance = random.Random(1)
    context = Context([1], 1)
    for _ in range(50):
        control.observe(context, outcome(control.budget(context), chance.choice([0, 1, 1, 2, 5])))
        rates = control._rates(context)
        goodput = []
        for nodes in range(9):
            whole = 1 + sum(rates.drafted[:nodes])
            low, share = int(whole), whole - int(whole)
            time = (1 - share) * seconds(low) + share * seconds(low + 1)
            goodput.append((1 + sum(rates.accepted[:nodes])) / time)
        assert goodput[control.best(rates)] == pytest.approx(max(goodput))


def test_a_tree_smaller_than_the_budget_costs_only_the_rows_that_it_has() -> None:
    """A drafter that is seldom sure, and right when it is, stays on although it is right in one step of eight."""
    control, context, budgets = Adaptive().open(4, lambda rows: 1.0 + 0.5 * rows), Context([1], 1), []
    for step in range(600):
        budgets.append(control.budget(context))
        control.observe(context, outcome(budgets[-1] if step % 8 == 0 else 0, 4))
    assert budgets[-100:] == [4] * 100


def test_requests_learn_by_themselves_and_their_state_does_not_grow() -> None:
    control = Adaptive().open(16, lambda rows: 1.0 + 0.3 * rows)
    good, bad = Context([1], 1), Context([2], 1)
    for _ in range(500):
        for context, accepted in ((good, 16), (bad, 0)):
            control.observe(context, outcome(control.budget(context), accepted))
    assert control.budget(good) == 16
    assert control.budget(bad) <= Adaptive().probe
    rates = control._rates(good)  # type: ignore[attr-defined]
    assert len(rates.accepted) == len(rates.drafted) == len(rates.steps) == 16
    assert max(rates.steps) <= Adaptive().memory


def test_without_nodes_nothing_is_drafted_or_measured() -> None:
    def never(rows: int) -> float:
        raise AssertionError

    control, context = Adaptive().open(0, never), Context([1], 1)
    assert control.budget(context) == 0
    control.observe(context, outcome(0, 0))
    assert context.data == {}


def test_nodes_are_ranked_by_reach_with_parents_first() -> None:
    tree = DraftTree([1, 2, 3, 4], [ROOT, ROOT, 0, 1], [0.3, 0.6, 1.0, 0.9])
    assert by_reach(tree) == [1, 3, 0, 2]


@pytest.mark.parametrize("option", ["memory", "explore", "probe"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(PlanError, match="out of range"):
        Adaptive(**{option: 0})
