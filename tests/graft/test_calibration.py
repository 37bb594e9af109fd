"""Calibration: agreement of grouped layers, and the search for a draft by predicted tokens per second."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import graft
from graft.calibration.layer_parallel import disjoint
from graft.calibration.self_draft import best_length, default_drafts
from graft.compiler.evaluate import agreement, logits_of
from tests.families import build
from tests.passes.test_layer_parallel import TEXT, grouped
from tests.programs import TIDY, program_of


def test_agreement_is_the_share_of_equal_best_tokens() -> None:
    old = torch.tensor([[1.0, 2, 0], [3, 0, 0], [0, 0, 1]])
    new = torch.tensor([[5.0, 6, 0], [0, 1, 0], [0, 0, 9]])
    assert agreement([old, old[:1]], [new, new[:1]]) == pytest.approx(3 / 4)


def test_groupings_are_measured_alone_and_together_and_sorted() -> None:
    found = graft.calibrate_layer_parallel(
        build("llama", num_hidden_layers=4), TEXT, sizes=(2,), keep_first=0, keep_last=0
    )
    assert [one.agreement for one in found] == sorted((one.agreement for one in found), reverse=True)
    plain = logits_of(program_of("llama", TIDY, num_hidden_layers=4)["forward"], TEXT)
    by_change = {one.change: one.agreement for one in found}
    for change in (
        graft.LayerParallel(2, 0, 0),
        graft.LayerParallel(2, 0, 0, "layer"),
        graft.LayerParallel(groups=((1, 2),)),
    ):
        assert by_change[change] == pytest.approx(agreement(plain, logits_of(grouped("llama", change), TEXT)))
    assert {graft.LayerParallel(groups=((at, at + 1),)) for at in (0, 1, 2)} <= by_change.keys()


def test_pairs_that_overlap_with_a_better_one_are_left_out() -> None:
    assert disjoint([(3, 4), (4, 5), (0, 1), (1, 2), (5, 6)]) == [(3, 4), (0, 1), (5, 6)]


@dataclass
class Times:
    base: float
    row: float

    def seconds(self, rows: int, context: int) -> float:
        return self.base + rows * self.row


@pytest.mark.parametrize("once", [0, 1])
def test_the_length_is_the_one_with_the_most_tokens_per_second(once: int) -> None:
    drafter = graft.LayerSkip(1)
    below, above = Times(0.0, 0.1), Times(0.9, 0.1)
    found = best_length(drafter, 0.8, below, above, 8, once)
    speeds = [
        sum(0.8**place for place in range(length + 1)) / ((length + once) * 0.1 + 0.9 + 0.1 * (length + 1))
        for length in range(1, 9)
    ]
    assert found.length == 1 + speeds.index(max(speeds))
    assert found.tokens_per_second == pytest.approx(max(speeds))
    assert (found.agreement, found.draft_seconds) == (0.8, 0.1)


def test_a_search_says_what_it_tried_and_proposes_the_best() -> None:
    drafts = (graft.SelfDraft(graft.DropBlock((1,))), graft.LayerSkip(2))
    found = graft.search_self_draft(build("llama"), TEXT, drafts=drafts, nodes=4)
    assert {one.drafter for one in found.tried} == set(drafts)
    speeds = [one.tokens_per_second for one in found.tried]
    assert speeds == sorted(speeds, reverse=True) and all(1 <= one.length <= 4 for one in found.tried)
    assert found.best == (found.tried[0].drafter if speeds[0] > found.plain else None)
    assert "layer-skip{layer=2}" in str(found) and "self-draft{changes=drop-block{index=1}}" in str(found)


def test_the_drafts_that_are_tried_by_default_exist_for_shallow_and_deep_models() -> None:
    assert graft.LayerSkip(15) in default_drafts(30) and len(default_drafts(30)) > 8
    assert default_drafts(3) == [graft.LayerSkip(1), graft.LayerSkip(2)]
    with pytest.raises(graft.PlanError, match="needs texts"):
        graft.search_self_draft(build("llama"), [])
