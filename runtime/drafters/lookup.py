"""Lookup: what followed the longest suffix of the text when it occurred before, in the prompt or in the output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graft.compiler.drafting import Context, Outcome, Target
from graft.compiler.errors import PlanError
from graft.runtime.drafters.tables import Evidence, Table, TableDrafter


@dataclass(frozen=True)
class Lookup(TableDrafter):
    """Prompt lookup (github.com/apoorvumang/prompt-lookup-decoding) as a tree.

    Every place in the draft asks anew, longest suffix first: first what followed its last `longest` tokens, then what
    followed one fewer, down to `shortest`; of equal length, the latest first.
    """

    longest: int = 5
    shortest: int = 1
    occurrences: int = 8
    """How many of the latest places are kept for each n-gram."""
    window: int = 32768
    """How many tokens are indexed at most; then the older half is forgotten."""

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest or self.occurrences < 1 or self.window <= self.longest:
            raise PlanError(
                "The options of lookup do not go together.",
                expected="1 <= shortest <= longest < window and occurrences >= 1",
                found=self,
                where="Lookup",
            )

    def table(self, context: Context, prompt_best: np.ndarray | None, target: Target) -> LookupTable:
        """See `TableDrafter.table`."""
        return LookupTable(self, context)


class LookupTable(Table[tuple[int, ...]]):
    """N-gram -> what followed it, latest last. The state of a place is its last `longest` tokens.

    The class of a candidate is the longest match at its place, and its rank there up to the fifth.
    """

    def __init__(self, spec: Lookup, context: Context) -> None:
        self.spec = spec
        self.lengths = range(spec.longest, spec.shortest - 1, -1)
        self.priors = [rate for length in range(spec.longest + 1) for rate in (_first(length), *_LATER)]
        self.followers: dict[tuple[int, ...], list[int]] = {}
        self.first = self.learnt = 0
        self._learn(context.tokens)

    def start(self, context: Context) -> tuple[int, ...]:
        """See `Table.start`."""
        return tuple(context.tokens[-self.spec.longest :])

    def step(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        """See `Table.step`."""
        return (*state, token)[-self.spec.longest :]

    def candidates(self, state: tuple[int, ...]) -> Evidence:
        """See `Table.candidates`."""
        found: Evidence = {}
        kind = last = 0
        for length in self.lengths:
            followers = self.followers.get(state[-length:])
            if followers is None:
                continue
            if not found:
                kind = length * _RANKS
                last = kind + _RANKS - 1
            for token in reversed(followers):
                if token not in found:
                    found[token] = kind
                    if kind < last:
                        kind += 1
        return found

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Table.observe`."""
        self._learn(context.tokens)

    def _learn(self, tokens: list[int]) -> None:
        longest, shortest, keep = self.spec.longest, self.spec.shortest, self.spec.occurrences
        followers = self.followers
        if len(tokens) - self.first > self.spec.window:
            self.first = self.learnt = len(tokens) - self.spec.window // 2
            followers.clear()
        for place in range(max(self.learnt, self.first + 1), len(tokens)):
            token = tokens[place]
            gram = tuple(tokens[max(place - longest, self.first) : place])
            for start in range(len(gram) - shortest + 1):
                held = followers.get(gram[start:])
                if held is None:
                    followers[gram[start:]] = [token]
                else:
                    held.append(token)
                    if len(held) > keep:
                        del held[0]
        self.learnt = len(tokens)


_RANKS = 5
_LATER = (0.12, 0.07, 0.04, 0.02)


def _first(length: int) -> float:
    return 1.0 - 0.75 * 0.7 ** (length - 1)
