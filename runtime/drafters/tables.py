"""What drafters without a model share: tables that name possible next tokens, and how far to trust each of them.

A table does not give probabilities. It sorts its candidates into a few classes of evidence ("continues a match of three
tokens", "rank 0 of the recycled row"), and `Trust` learns per request how often each class came true. That makes the
estimates of different tables comparable, which is what a tree from several of them needs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from graft.compiler.drafting import ROOT, Candidates, Context, Drafter, DraftTree, Outcome, Target, TreePolicy

State = TypeVar("State")
"""A table's view of a place in the text, a function of the tokens up to it."""

Evidence = list[tuple[int, int]]
"""(token, class of evidence), no token twice."""


class Table(Protocol[State]):
    """The table of one request. `step` follows a token without learning it; only `observe` changes the table."""

    priors: Sequence[float]
    """For each class of evidence, how often its candidates are right on ordinary text."""

    def start(self, context: Context) -> State:
        """The state after the last token of a context whose tokens have all been learnt."""
        ...

    def step(self, state: State, token: int) -> State:
        """The state one token on."""
        ...

    def candidates(self, state: State) -> Evidence:
        """What may come next."""
        ...

    def observe(self, context: Context, outcome: Outcome) -> None:
        """Learn from a decided step; see `Drafting.observe`."""
        ...


@dataclass
class Trust:
    """How often the candidates of each class were right, as a posterior mean of Beta-distributed rates.

    `right` and `seen` start as the prior, worth `WEIGHT` trials, and are halved when `seen` passes `MEMORY`, so that
    the estimate follows the text and the state is bounded.
    """

    right: list[float]
    seen: list[float]
    rates: list[float]

    WEIGHT = 12.0
    MEMORY = 128.0

    @classmethod
    def of(cls, priors: Sequence[float]) -> Trust:
        """Trust that has seen nothing but the priors."""
        return cls([cls.WEIGHT * prior for prior in priors], [cls.WEIGHT] * len(priors), list(priors))

    def learn(self, evidence: Evidence, token: int) -> None:
        """The target's token was `token` where the table had named `evidence`."""
        right, seen, rates = self.right, self.seen, self.rates
        for candidate, kind in evidence:
            if candidate == token:
                right[kind] += 1.0
            seen[kind] += 1.0
            if seen[kind] > self.MEMORY:
                seen[kind] *= 0.5
                right[kind] *= 0.5
            rates[kind] = right[kind] / seen[kind]


class Tables(Generic[State]):
    """The tables of one request, read together: the state of the union is the list of their states."""

    def __init__(self, tables: Sequence[Table[State]], context: Context) -> None:
        self.tables = tables
        self.trust = [Trust.of(table.priors) for table in tables]
        self.root = [table.start(context) for table in tables]

    def step(self, states: list[State], token: int) -> list[State]:
        """The states one token on."""
        return [table.step(state, token) for table, state in zip(self.tables, states, strict=True)]

    def candidates(self, states: list[State]) -> Candidates:
        """All tables' candidates with their estimates, best first; noisy-or where several name the same token."""
        misses: dict[int, float] = {}
        for table, trust, state in zip(self.tables, self.trust, states, strict=True):
            rates = trust.rates
            for token, kind in table.candidates(state):
                misses[token] = misses.get(token, 1.0) * (1.0 - rates[kind])
        found = sorted(misses.items(), key=_second)
        total = sum(1.0 - miss for _, miss in found)
        scale = min(1.0, CERTAIN / total) if total else 1.0
        return [(token, (1.0 - miss) * scale) for token, miss in found]

    def observe(self, context: Context, outcome: Outcome) -> None:
        """Compare what the tables said along the decided path with what the target said, then let them learn it."""
        states = self.root
        tokens = outcome.tree.tokens
        for token in [*(tokens[node] for node in outcome.path), outcome.next_token]:
            for table, trust, state in zip(self.tables, self.trust, states, strict=True):
                trust.learn(table.candidates(state), token)
            states = self.step(states, token)
        for table in self.tables:
            table.observe(context, outcome)
        self.root = states


CERTAIN = 0.98
"""The most that the candidates of one place may add up to."""


def _second(pair: tuple[int, float]) -> float:
    return pair[1]


@dataclass(frozen=True)
class TableDrafter(Drafter):
    """A drafter that is a table: what it proposes is a function of the tokens so far."""

    @abstractmethod
    def table(self, context: Context, prompt_best: np.ndarray | None, target: Target) -> Table:
        """The table of a request that starts; `prompt_best` as in `Drafting.begin`."""

    def open(self, target: Target, policy: TreePolicy) -> TableDrafting:
        """See `Drafter.open`."""
        return TableDrafting([self], target, policy)


@dataclass
class TableDrafting:
    """The `Drafting` of one or several table drafters, which grow one tree together, node by node."""

    drafters: Sequence[TableDrafter]
    target: Target
    policy: TreePolicy
    key: str = field(init=False)

    def __post_init__(self) -> None:
        self.key = "tables: " + ", ".join(map(repr, self.drafters))

    def begin(self, context: Context, prompt_best: np.ndarray | None) -> None:
        """See `Drafting.begin`; the prompt is learnt here."""
        tables = []
        for drafter in self.drafters:
            best = prompt_best[:, : drafter.observes] if prompt_best is not None and drafter.observes_prompt else None
            tables.append(drafter.table(context, best, self.target))
        context.data[self.key] = Tables(tables, context)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        """See `Drafting.propose`."""
        return [self._grow(self._tables(context), budget) for context, budget in zip(contexts, budgets, strict=True)]

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Drafting.observe`."""
        self._tables(context).observe(context, outcome)

    def end(self, context: Context) -> None:
        """See `Drafting.end`."""
        context.data.pop(self.key, None)

    def _tables(self, context: Context) -> Tables:
        tables = context.data[self.key]
        assert isinstance(tables, Tables)
        return tables

    def _grow(self, tables: Tables, budget: int) -> DraftTree:
        tree = DraftTree()
        if budget <= 0:
            return tree
        states = {ROOT: tables.root}
        tokens, parents = tree.tokens, tree.parents
        growth = self.policy.grow(tree, budget)
        try:
            asked = next(growth)
            while True:
                answers = []
                for node in asked:
                    if node != ROOT:
                        states[node] = tables.step(states[parents[node]], tokens[node])
                    answers.append(tables.candidates(states[node]))
                asked = growth.send(answers)
        except StopIteration as grown:
            return grown.value
