"""What drafters without a model share: tables that name possible next tokens, and how far to trust each of them.

A table does not give probabilities. It sorts its candidates into a few classes of evidence ("rank 1 after a match of
three tokens", "rank 0 of the recycled row"). `Trust` learns per request how often each class came true, by itself and
in company with the classes of other tables, which makes their estimates comparable: what a tree from several of them
needs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor

from graft.compiler.drafting import ROOT, Candidates, Context, Drafter, DraftTree, Outcome, Target, TreePolicy

State = TypeVar("State")
"""A table's view of a place in the text, a function of the tokens up to it."""

Evidence = dict[int, int]
"""Token -> class of evidence, in the order in which a table names them."""


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


class Trust(dict[int, float]):
    """Cell -> how often its candidates are right: the posterior mean of a Beta-distributed rate.

    A cell says of each table what it thinks of the candidate, as a number in mixed radix: digit 0 for a table that
    names nothing at the place, 1 for one that names others only, class + 2 for one that names the candidate.
    The prior of a cell is worth `WEIGHT` trials, and its counts are halved beyond `MEMORY` trials, so that the
    estimate follows the text. There are no more cells than combinations.
    """

    WEIGHT = 12.0
    MEMORY = 128.0

    def __init__(self, priors: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.priors = priors
        self.right: dict[int, float] = {}
        self.seen: dict[int, float] = {}

    def __missing__(self, cell: int) -> float:
        # To begin with a candidate is as good as the best that is said of it; how tables go together is learnt.
        rate, rest = 0.0, cell
        for rates in self.priors:
            rest, digit = divmod(rest, len(rates) + 2)
            if digit > 1:
                rate = max(rate, rates[digit - 2])
        self[cell] = rate
        self.right[cell], self.seen[cell] = self.WEIGHT * rate, self.WEIGHT
        return rate

    def learn(self, cells: Iterable[int], true: int | None) -> None:
        """The target was asked where the tables had named tokens with these cells, and chose the one with `true`."""
        right, seen = self.right, self.seen
        for cell in cells:
            if cell not in seen:
                self.__missing__(cell)
            trials = seen[cell] + 1.0
            if trials > self.MEMORY:
                trials *= 0.5
                right[cell] *= 0.5
            seen[cell] = trials
            self[cell] = right[cell] / trials
        if true is not None:
            right[true] += 1.0
            self[true] = right[true] / seen[true]


_RATE = itemgetter(1)
CERTAIN = 0.98
"""The most that the candidates of one place may add up to."""


class Tables(Generic[State]):
    """The tables of one request, read together: the state of the union is the list of their states."""

    def __init__(self, tables: Sequence[Table[State]], context: Context) -> None:
        self.tables = tables
        self.trust = Trust([table.priors for table in tables])
        self.root = [table.start(context) for table in tables]
        self.radix = [1]
        for table in tables[:-1]:
            self.radix.append(self.radix[-1] * (len(table.priors) + 2))

    def step(self, states: list[State], token: int) -> list[State]:
        """The states one token on."""
        return [table.step(state, token) for table, state in zip(self.tables, states, strict=True)]

    def cells(self, states: list[State]) -> dict[int, int]:
        """Token -> its cell, see `Trust`."""
        heard, named = 0, []
        for radix, table, state in zip(self.radix, self.tables, states, strict=True):
            if evidence := table.candidates(state):
                heard += radix
                named.append((radix, evidence))
        found: dict[int, int] = {}
        for radix, evidence in named:
            if not found:
                found = {token: heard + (kind + 1) * radix for token, kind in evidence.items()}
                continue
            for token, kind in evidence.items():
                found[token] = found.get(token, heard) + (kind + 1) * radix
        return found

    def candidates(self, states: list[State]) -> Candidates:
        """All tables' candidates with their estimates, best first."""
        cells = self.cells(states)
        rates = [self.trust[cell] for cell in cells.values()]
        found = sorted(zip(cells, rates, strict=True), key=_RATE, reverse=True)
        total = sum(rates)
        if total > CERTAIN:
            found = [(token, rate * CERTAIN / total) for token, rate in found]
        return found

    def observe(self, context: Context, outcome: Outcome) -> None:
        """Compare what the tables said along the decided path with what the target said, then let them learn it."""
        states, tokens = self.root, outcome.tree.tokens
        for token in [*(tokens[node] for node in outcome.path), outcome.next_token]:
            cells = self.cells(states)
            self.trust.learn(cells.values(), cells.get(token))
            states = self.step(states, token)
        for table in self.tables:
            table.observe(context, outcome)
        self.root = states


@dataclass(frozen=True)
class TableDrafter(Drafter):
    """A drafter that is a table: what it proposes is a function of the tokens so far."""

    def prepare(self, target: Target) -> None:
        """Put what all requests share into `target.shared`; called whenever the drafter is opened."""

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
        for drafter in self.drafters:
            drafter.prepare(self.target)

    def begin(self, context: Context, prompt_best: np.ndarray | None, prompt_hidden: Tensor | None = None) -> None:
        """See `Drafting.begin`; the prompt is learnt here."""
        tables = []
        for drafter in self.drafters:
            best = prompt_best[:, : drafter.observes] if prompt_best is not None and drafter.observes_prompt else None
            tables.append(drafter.table(context, best, self.target))
        context.data[self.key] = Tables(tables, context)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        """See `Drafting.propose`."""
        return [self.go_on(context, (), budget) for context, budget in zip(contexts, budgets, strict=True)]

    def go_on(self, context: Context, tokens: Sequence[int], budget: int) -> DraftTree:
        """What is proposed behind a text and some tokens that are not decided yet."""
        tables = self._tables(context)
        states = tables.root
        for token in tokens:
            states = tables.step(states, token)
        return self._grow(tables, states, budget)

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

    def _grow(self, tables: Tables, root: list, budget: int) -> DraftTree:
        tree = DraftTree()
        if budget <= 0:
            return tree
        states = {ROOT: root}
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
