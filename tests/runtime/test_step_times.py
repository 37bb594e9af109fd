"""Step times: measured when first asked, interpolated, and refined by real steps."""

from __future__ import annotations

import pytest

from graft.runtime import step_times
from graft.runtime.controllers import Adaptive
from graft.runtime.decoder import Decoder
from graft.runtime.drafters.lookup import Lookup
from graft.runtime.step_times import ANCHORS, StepTimes
from tests.runtime.decoding import decoder, generator, prompts


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> StepTimes:
    """A machine on which a step takes 10 s and 1 s for each row."""

    def measured(held: Decoder, rows: int) -> float:
        return 10.0 + rows

    monkeypatch.setattr(step_times, "measure", measured)
    return StepTimes(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 16, 33, 64, 100])
def test_times_between_and_beyond_anchors_lie_on_the_lines_through_them(times: StepTimes, rows: int) -> None:
    assert times.seconds(rows) == pytest.approx(10.0 + rows)


def test_only_the_anchors_that_are_needed_are_measured(times: StepTimes) -> None:
    times.seconds(5)
    assert sorted(times.measured) == [4, 8]


def test_real_steps_refine_the_anchor_near_them_and_scale_the_others(times: StepTimes) -> None:
    before = times.seconds(64)
    times.seconds(8)
    for _ in range(20):
        times.observe(8, 36.0)
    assert times.seconds(8) == pytest.approx(36.0)
    assert times.seconds(64) == pytest.approx(2 * before)


def test_an_interrupted_step_counts_as_four_times_slower_at_most(times: StepTimes) -> None:
    times.seconds(8)
    for _ in range(20):
        times.observe(8, 1e6)
    assert times.seconds(8) == pytest.approx(4 * 18.0)


def test_the_mean_forgets(times: StepTimes) -> None:
    times.seconds(8)
    for seconds in [36.0] * 200 + [18.0] * 200:
        times.observe(8, seconds)
    assert times.seconds(8) == pytest.approx(18.0, rel=0.01)


def test_what_is_kept_is_bounded(times: StepTimes) -> None:
    for rows in range(1, 300):
        times.seconds(rows)
        times.observe(rows, 1.0)
    assert set(times.measured) == set(ANCHORS)
    assert set(times.ratios) <= set(ANCHORS)


def test_a_measurement_runs_the_decoder_and_leaves_it_as_it_was() -> None:
    held = decoder()
    slot = held.open()
    assert StepTimes(held).seconds(3) > 0
    held.close(slot)
    assert len(held.store.free) == len(held.store.lengths)
    assert not any(held.store.pending)


def test_measuring_is_told_apart_from_drafting() -> None:
    made = generator(Lookup(), controller=Adaptive())
    made.generate(**prompts(6), max_new_tokens=12)
    assert made.stats["calibration_seconds"] == pytest.approx(made.step_times.spent) != 0
    made.generate(**prompts(6), max_new_tokens=12)
    assert made.stats["draft_seconds"] >= 0
