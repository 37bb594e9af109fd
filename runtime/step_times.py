"""How long one target step takes over T rows on this machine: predicted from the costs of its kernels, or measured
where they do not say, when first asked; refined by real steps."""

from __future__ import annotations

import time
from bisect import bisect_left
from statistics import median

from graft.runtime.decoder import Decoder, Rows
from graft.runtime.top_tokens import argmax_rows

ANCHORS = (1, 2, 4, 8, 16, 32, 64)
"""Row counts that are measured; others are interpolated, and more than the last extrapolated from the last two."""
CONTEXT = 256
"""Tokens of context at which steps are predicted; what real steps show corrects for theirs."""
RUNS = 5
"""Runs of one measurement, after one that is not counted."""
MEMORY = 32
"""Real steps that a running mean goes back, so that it follows a growing context and a drifting clock."""
DRIFT = (0.25, 4.0)
"""A real step counts as at most so much faster or slower than measured; more was not the step but an interruption."""


class StepTimes:
    """t(T) of one decoder.

    A measurement runs short sequences. Real steps have longer ones, so each is compared with the measurement and the
    ratios are kept as running means: one for each anchor, and one for all, used where an anchor has too few.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.measured: dict[int, float] = {}
        self.ratios: dict[int, tuple[int, float]] = {}
        self.common: tuple[int, float] = (0, 1.0)
        self.spent = 0.0
        """Seconds that measuring itself has taken."""
        self.drafting: tuple[int, float] = (0, 0.0)

    def seconds(self, rows: int) -> float:
        """Seconds of one step over `rows` rows, the roots included; measures on the decoder where it must.

        A step must not be under way in the decoder. Raises StateError if there is no memory for one more sequence.
        """
        low, high, share = bracket(rows)
        return max(0.0, self.anchor(low) * (1 - share) + self.anchor(high) * share)

    def draft_seconds(self) -> float:
        """What drafting has taken lately, by request and step in which it drafted."""
        return self.drafting[1]

    def observe_drafting(self, requests: int, seconds: float) -> None:
        """Learn from a step in which so many requests drafted."""
        self.drafting = running(self.drafting, seconds / requests)

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a real step."""
        low, high, share = bracket(rows)
        if low not in self.measured or high not in self.measured or rows > ANCHORS[-1]:
            return
        expected = self.measured[low] * (1 - share) + self.measured[high] * share
        ratio = min(max(seconds / expected, DRIFT[0]), DRIFT[1])
        self.common = running(self.common, ratio)
        nearest = high if share > 0.5 else low
        self.ratios[nearest] = running(self.ratios.get(nearest, (0, 1.0)), ratio)

    def anchor(self, rows: int) -> float:
        """Seconds at an anchor, measured on first need and corrected by what real steps showed."""
        if rows not in self.measured:
            start = time.perf_counter()
            prediction = self.decoder.executable.prediction if self.decoder is not None else None
            self.measured[rows] = prediction.seconds(rows, CONTEXT) if prediction else measure(self.decoder, rows)
            self.spent += time.perf_counter() - start
        count, ratio = self.ratios.get(rows, (0, 1.0))
        return self.measured[rows] * (ratio if count >= 4 else self.common[1])


def bracket(rows: int) -> tuple[int, int, float]:
    """The anchors around `rows` and how far it lies from the first to the second; beyond the last, more than 1."""
    place = min(max(bisect_left(ANCHORS, rows), 1), len(ANCHORS) - 1)
    low, high = ANCHORS[place - 1], ANCHORS[place]
    return low, high, (max(rows, 1) - low) / (high - low)


def running(mean: tuple[int, float], value: float) -> tuple[int, float]:
    """A mean over all values at first, over about the last `MEMORY` later."""
    count = min(mean[0] + 1, MEMORY)
    return count, mean[1] + (value - mean[1]) / count


def measure(decoder: Decoder, rows: int) -> float:
    """Median seconds of a step over a chain of `rows` tokens in a slot of its own, the argmax included."""
    count = rows if decoder.max_positions is None else min(rows, decoder.max_positions)
    slot = decoder.open()
    spent = []
    try:
        for _ in range(RUNS + 1):
            step = Rows()
            step.add_chain(slot, [0] * count, 0, want_all=True)
            start = time.perf_counter()
            argmax_rows(decoder.forward(step))
            spent.append(time.perf_counter() - start)
            decoder.rollback(slot)
    finally:
        decoder.close(slot)
    return median(spent[1:])
