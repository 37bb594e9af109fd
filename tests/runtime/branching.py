"""The exact law of a random procedure, by following every comparison of its random numbers both ways.

A uniform number that was compared with 0.3 is known to lie below or not; each way is followed with its probability, so
that numbers matter exactly as far as they are looked at, whatever the probabilities they are compared with. The module
enumeration does the same on a grid, in fractions; here weights are floats, and laws agree to about 1e-12.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from graft.compiler.drafting import Uniforms

Result = TypeVar("Result", bound=Hashable)


class Interval:
    """A uniform number, of which is known that it lies in [low, high)."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.low, self.high = walk, 0.0, 1.0

    def below(self, bound: float) -> bool:
        """Whether it is below; where that is open, as the walk decides."""
        if not self.low < bound < self.high:
            return bound >= self.high
        share = (bound - self.low) / (self.high - self.low)
        if self.walk.turn(share):
            self.high = bound
            return True
        self.low = bound
        return False


class Number:
    """A positive multiple of an `Interval`, as far as the code under test calculates with one."""

    def __init__(self, interval: Interval, scale: float = 1.0) -> None:
        self.interval, self.scale = interval, scale

    def __mul__(self, factor: float) -> Number:
        return Number(self.interval, self.scale * float(factor))

    def __lt__(self, other: float) -> bool:
        return self.interval.below(float(other) / self.scale)


class Walk:
    """One way through the comparisons: the turns of a script, and the first ones beyond its end."""

    def __init__(self, script: list[bool], fixed: Mapping[str, Callable[[int], float]]) -> None:
        self.script, self.fixed, self.taken, self.weight = script, fixed, 0, 1.0
        self.known: dict[tuple[str, int], Interval] = {}

    def turn(self, share: float) -> bool:
        if self.taken == len(self.script):
            self.script.append(True)
        way = self.script[self.taken]
        self.taken += 1
        self.weight *= share if way else 1.0 - share
        return way

    def uniform(self, stream: str, counter: int) -> float:
        if stream in self.fixed:
            return self.fixed[stream](counter)
        return Number(self.known.setdefault((stream, counter), Interval(self)))  # type: ignore[return-value]


def law(
    run: Callable[[Uniforms], Result], fixed: Mapping[str, Callable[[int], float]] | None = None
) -> dict[Result, float]:
    """The distribution of what `run` returns; the streams in `fixed` are given numbers in the place of random ones."""
    found: dict[Result, float] = {}
    script: list[bool] = []
    while True:
        walk = Walk(script, fixed or {})
        result = run(walk)
        found[result] = found.get(result, 0.0) + walk.weight
        del script[walk.taken :]
        while script and not script[-1]:
            script.pop()
        if not script:
            return found
        script[-1] = False


def distance(left: Mapping[Result, float], right: Mapping[Result, float]) -> float:
    """Total variation."""
    return sum(abs(left.get(key, 0.0) - right.get(key, 0.0)) for key in {**left, **right}) / 2
