"""How many nodes to draft: a fixed number, or as many as pay on this machine for this text."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

from graft.compiler.drafting import ROOT, Context, Control, Controller, DraftTree, Outcome
from graft.compiler.errors import PlanError


@dataclass(frozen=True)
class FixedBudget(Controller):
    """The same number of nodes in every step."""

    nodes: int | None = None
    """None: as many as the plan's tree has."""

    def __post_init__(self) -> None:
        if self.nodes is not None and self.nodes < 0:
            raise PlanError(
                "The budget is negative.", expected="0 or more nodes", found=self.nodes, where="FixedBudget.nodes"
            )

    def open(
        self, max_nodes: int, step_seconds: Callable[[int], float], draft_seconds: Callable[[], float]
    ) -> Control:
        """See `Controller.open`."""
        return _Constant(max_nodes if self.nodes is None else min(self.nodes, max_nodes))


@dataclass(frozen=True)
class _Constant:
    nodes: int

    def budget(self, context: Context) -> int:
        return self.nodes

    def keep(self, context: Context, tree: DraftTree) -> DraftTree:
        return tree

    def observe(self, context: Context, outcome: Outcome) -> None:
        pass


@dataclass(frozen=True)
class Adaptive(Controller):
    """The nodes that give the most tokens per second, for each request by itself.

    Goodput as in SmartSpec (2406.14066), for trees. A text's tokens per second so far are the price of a second. Of a
    deterministic tree as many nodes are kept, the most probable ones, as are worth more than the rows that they add
    to the step: the estimates of the drafter, corrected by how often such estimates came true. Where drafts are drawn,
    what is kept must not depend on what was drawn. There the number of nodes is decided beforehand from how often the
    node of rank r was accepted, a[r], and how often there was one, d[r]: n nodes give 1 + a[0] + ... + a[n-1] tokens
    for step_seconds(1 + d[0] + ... + d[n-1]) and what drafting takes. If the best n of 0..max_nodes by these rates is
    0, drafting of either kind is switched off.

    What is not drafted is not observed. So every `explore` steps a larger tree is tried, all of it where drawn drafts
    pay and `probe` nodes where drafting is off; each time no further node is accepted, the wait doubles, up to 16 times
    `explore`.
    """

    memory: int = 32
    """Over about how many steps the rates are averaged."""
    explore: int = 16
    probe: int = 4

    def __post_init__(self) -> None:
        if min(self.memory, self.explore, self.probe) < 1:
            raise PlanError(
                "The options of the adaptive controller are out of range.",
                expected="memory, explore and probe of 1 or more",
                found=self,
                where="Adaptive",
            )

    def open(
        self, max_nodes: int, step_seconds: Callable[[int], float], draft_seconds: Callable[[], float]
    ) -> Control:
        """See `Controller.open`."""
        return AdaptiveControl(self, max_nodes, step_seconds, draft_seconds)


class Correction:
    """How often a drafter's estimates come true, by their size: what to multiply one with."""

    BOUNDS = (0.05, 0.1, 0.2, 0.4, 0.7)
    WEIGHT, MEMORY = 4.0, 64.0
    """What a drafter is believed in advance, in accepted nodes; counts are halved beyond so many."""

    def __init__(self) -> None:
        cells = len(self.BOUNDS) + 1
        self.hoped, self.seen = [self.WEIGHT] * cells, [self.WEIGHT] * cells

    def of(self, estimate: float) -> float:
        """The estimate, corrected."""
        cell = bisect(self.BOUNDS, estimate)
        return min(estimate * self.seen[cell] / self.hoped[cell], 1.0)

    def learn(self, estimate: float, accepted: bool) -> None:
        """A node of that estimate was tested: its parent stands."""
        cell = bisect(self.BOUNDS, estimate)
        self.hoped[cell] += estimate
        self.seen[cell] += accepted
        if self.hoped[cell] > self.MEMORY:
            self.hoped[cell] *= 0.5
            self.seen[cell] *= 0.5


@dataclass
class Rates:
    """What a request has shown, by rank: how often a node was accepted, how often there was one, in how many steps."""

    accepted: list[float]
    drafted: list[float]
    steps: list[int]
    best: int
    tokens: float
    seconds: float
    """Running means of a step; their quotient is the price of a second."""
    correction: Correction = field(default_factory=Correction)
    drawn: bool = False
    kept: int = 0
    """About how many nodes of a tree were kept lately."""
    age: int = 0
    """Steps since `best` was computed."""
    waited: int = 0
    """Steps since a larger tree was tried, if `best` is not the largest."""
    wait: int = 0


@dataclass
class AdaptiveControl:
    """The `Control` of `Adaptive`. A request's state has a fixed size and lies in its context."""

    spec: Adaptive
    max_nodes: int
    step_seconds: Callable[[int], float]
    draft_seconds: Callable[[], float]
    key: str = field(default="adaptive controller", init=False)

    RENEWED = 4
    """Steps for which a decision holds: deciding costs as much as drafting a node or two."""
    GROWTH = 8
    """How many nodes more than were kept lately are drafted to choose from; each costs some time."""
    OPTIMISM = 0.5
    """The first rank's rate before anything was seen; the others' falls as 1 / (rank + 1)."""

    def budget(self, context: Context) -> int:
        """See `Control.budget`."""
        if self.max_nodes <= 0:
            return 0
        rates = self._rates(context)
        # Where drafting takes longer than a step, waiting for the next decision costs more than deciding.
        if rates.age >= self.RENEWED or (rates.age and self.draft_seconds() > self.step_seconds(1)):
            before, rates.best, rates.age = rates.best, self.best(rates), 0
            if rates.best > before:
                rates.wait = self.spec.explore
        return self._budget(rates)

    def _budget(self, rates: Rates) -> int:
        if rates.best and not rates.drawn:
            return min(self.max_nodes, rates.kept + self.GROWTH)
        if rates.best < self.max_nodes and rates.waited >= rates.wait:
            return self.max_nodes if rates.best else min(self.spec.probe, self.max_nodes)
        return rates.best

    def keep(self, context: Context, tree: DraftTree) -> DraftTree:
        """See `Control.keep`."""
        rates = self._rates(context)
        rates.drawn = tree.kind != "deterministic"
        if rates.drawn or not rates.best:
            return tree
        correction, reach = rates.correction, {ROOT: 1.0}
        for node, (parent, probability) in enumerate(zip(tree.parents, tree.probabilities, strict=True)):
            reach[node] = reach[parent] * correction.of(probability)
        order = sorted(range(len(tree)), key=lambda node: -reach[node])
        price = rates.tokens / rates.seconds
        chosen, most, tokens = 0, -price * self.step_seconds(1), 0.0
        for count, node in enumerate(order, 1):
            tokens += reach[node]
            worth = tokens - price * self.step_seconds(1 + count)
            if worth > most:
                chosen, most = count, worth
        rates.kept = max(chosen, rates.kept - 1)
        return tree if chosen == len(tree) else tree.select(sorted(order[:chosen]))

    def best(self, rates: Rates) -> int:
        """argmax over n of (1 + expected accepted) / (seconds of the expected rows and of drafting); the smallest of
        equals."""
        tokens, rows, chosen, most = 1.0, 1.0, 0, 1.0 / self._seconds(1.0)
        drafting = self.draft_seconds()
        for rank in range(self.max_nodes):
            tokens += rates.accepted[rank]
            rows += rates.drafted[rank]
            goodput = tokens / (self._seconds(rows) + drafting)
            if goodput > most:
                chosen, most = rank + 1, goodput
        return chosen

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Control.observe`. `outcome.tree` may be smaller than the budget, not larger."""
        if self.max_nodes <= 0:
            return
        rates, tree = self._rates(context), outcome.tree
        tried = max(rates.best, self._budget(rates)) if rates.drawn or not rates.best else len(tree)
        rates.age += 1
        offered = min(len(tree), self.max_nodes)
        order, hits = by_reach(tree), set(outcome.path)
        if rates.best < self.max_nodes:
            rates.waited += 1
            # Until the drafter offers more than usual nothing was tried, and nothing was spent.
            if offered > rates.best:
                useful = not hits.isdisjoint(order[rates.best :])
                rates.wait = self.spec.explore if useful else min(2 * rates.wait, 16 * self.spec.explore)
                rates.waited, rates.age = 0, self.RENEWED
        for rank in range(max(tried, offered, rates.best)):
            steps = rates.steps[rank] = min(rates.steps[rank] + 1, self.spec.memory)
            there = rank < offered
            rates.drafted[rank] += (there - rates.drafted[rank]) / steps
            rates.accepted[rank] += ((there and order[rank] in hits) - rates.accepted[rank]) / steps
        for node, parent in enumerate(tree.parents):
            if parent == ROOT or parent in hits:
                rates.correction.learn(tree.probabilities[node], node in hits)
        rates.tokens += (1 + len(hits) - rates.tokens) / self.spec.memory
        seconds = self.step_seconds(1 + len(tree)) + (self.draft_seconds() if tree.tokens else 0.0)
        rates.seconds += (seconds - rates.seconds) / self.spec.memory
        context.pace = rates.tokens / rates.seconds

    def _seconds(self, rows: float) -> float:
        whole = int(rows)
        share = rows - whole
        low = self.step_seconds(whole)
        return low if share == 0.0 else low + share * (self.step_seconds(whole + 1) - low)

    def _rates(self, context: Context) -> Rates:
        rates = context.data.get(self.key)
        if rates is None:
            hoped = [self.OPTIMISM / (rank + 1) for rank in range(self.max_nodes)]
            # The priors weigh as much as a few steps, so that one unlucky step does not switch drafting off.
            nodes, pace = self.max_nodes, (1 + self.OPTIMISM, self.step_seconds(1))
            rates = Rates(hoped, [1.0] * nodes, [4] * nodes, nodes, *pace, wait=self.spec.explore)
            context.data[self.key] = rates
        assert isinstance(rates, Rates)
        return rates


def by_reach(tree: DraftTree) -> list[int]:
    """Node indices by falling estimate of being reached, parents first: the order in which a smaller budget keeps them.

    What best-first grew node by node is in that order already.
    """
    reach = {ROOT: 1.0}
    for node, (parent, probability) in enumerate(zip(tree.parents, tree.probabilities, strict=True)):
        reach[node] = reach[parent] * probability
    return sorted(range(len(tree)), key=lambda node: -reach[node])
