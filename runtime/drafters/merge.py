"""Several drafters, one tree: tables are read together, trees are joined by longest common prefix."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from torch import Tensor

from graft.compiler.acceptance import joint_kind
from graft.compiler.drafting import (
    ROOT,
    Context,
    Drafter,
    Drafting,
    DraftKind,
    DraftTree,
    HiddenRows,
    Outcome,
    Target,
    TreePolicy,
)
from graft.compiler.errors import PlanError
from graft.compiler.passing import Pass
from graft.runtime.drafters.tables import CERTAIN, TableDrafter, TableDrafting, Trust
from graft.runtime.tree_policies import best_nodes

_LEVELS: Final = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96)
"""A drafter's own estimates are sorted to the nearest of these, and each is corrected by how often it came true."""


@dataclass(frozen=True)
class Merge(Drafter):
    """What several drafters propose, as one tree of at most the budget.

    Drafters without a model grow one tree together, node by node, so that each continues where another left off. Trees
    of other drafters are joined with it as in a trie: nodes with the same tokens down to them are one. The nodes that
    are most probably reached stay; each drafter's estimates are calibrated per request by what was accepted.
    """

    drafters: tuple[Drafter, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "drafters", tuple(self.drafters))
        if not self.drafters or len(set(self.drafters)) < len(self.drafters):
            raise PlanError(
                "These drafters cannot be merged.",
                expected="one drafter or several different ones",
                found=", ".join(map(repr, self.drafters)) or "none",
                where="Plan.draft",
            )

    @property
    def kind(self) -> DraftKind:
        """See `joint_kind`."""
        return joint_kind(self.drafters)

    @property
    def observes(self) -> int:
        """The most that one of the drafters asks for."""
        return max(drafter.observes for drafter in self.drafters)

    @property
    def observes_prompt(self) -> bool:
        """Whether one of the drafters does."""
        return any(drafter.observes_prompt for drafter in self.drafters)

    @property
    def reads_hidden(self) -> HiddenRows:
        """The most that one of the drafters asks for."""
        asked = {drafter.reads_hidden for drafter in self.drafters}
        return "all" if "all" in asked else "rows" if "rows" in asked else "no"

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Those of all drafters."""
        return tuple(one for drafter in self.drafters for one in drafter.passes)

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        """See `Drafter.open`."""
        tables = [drafter for drafter in self.drafters if isinstance(drafter, TableDrafter)]
        parts: list[Drafting] = [TableDrafting(tables, target, policy)] if tables else []
        parts += [drafter.open(target, policy) for drafter in self.drafters if not isinstance(drafter, TableDrafter)]
        return parts[0] if len(parts) == 1 else Merging(parts, self.kind)


@dataclass
class _Memory:
    """Of one request: what was proposed last, and how far to trust each part."""

    trust: list[Trust]
    trees: list[DraftTree] = field(default_factory=list)


@dataclass
class Merging:
    """The `Drafting` of drafters whose trees are joined."""

    parts: Sequence[Drafting]
    kind: DraftKind

    KEY = "merged drafters"

    def begin(self, context: Context, prompt_best: np.ndarray | None, prompt_hidden: Tensor | None = None) -> None:
        """See `Drafting.begin`."""
        context.data[self.KEY] = _Memory([Trust([_LEVELS]) for _ in self.parts])
        for part in self.parts:
            part.begin(context, prompt_best, prompt_hidden)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        """See `Drafting.propose`."""
        proposed = [part.propose(contexts, budgets) for part in self.parts]
        merged = []
        for context, budget, *trees in zip(contexts, budgets, *proposed, strict=True):
            memory = self._memory(context)
            memory.trees = trees
            rates = [calibrated(tree, trust) for tree, trust in zip(trees, memory.trust, strict=True)]
            merged.append(join(trees, rates, budget, self.kind))
        return merged

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Drafting.observe`."""
        memory = self._memory(context)
        decided = [*(outcome.tree.tokens[node] for node in outcome.path), outcome.next_token]
        for tree, trust in zip(memory.trees, memory.trust, strict=False):
            learn(tree, trust, decided)
        memory.trees = []
        for part in self.parts:
            part.observe(context, outcome)

    def end(self, context: Context) -> None:
        """See `Drafting.end`; every part is ended, whatever another one raises."""
        context.data.pop(self.KEY, None)
        with ExitStack() as stack:
            for part in reversed(self.parts):
                stack.callback(part.end, context)

    def _memory(self, context: Context) -> _Memory:
        memory = context.data[self.KEY]
        assert isinstance(memory, _Memory)
        return memory


def _cell(probability: float) -> int:
    """The cell of `Trust` for the nearest level."""
    return 2 + min(range(len(_LEVELS)), key=lambda level: abs(_LEVELS[level] - probability))


def calibrated(tree: DraftTree, trust: Trust) -> list[float]:
    """The estimates of a tree's nodes, each moved by as much as its level was found to be off."""
    cells = map(_cell, tree.probabilities)
    return [
        min(probability * trust[cell] / _LEVELS[cell - 2], CERTAIN)
        for probability, cell in zip(tree.probabilities, cells, strict=True)
    ]


def learn(tree: DraftTree, trust: Trust, decided: Sequence[int]) -> None:
    """Compare a proposed tree with the tokens that were decided, as far as it names them."""
    children = tree.children()
    place = ROOT
    for token in decided:
        cells = {tree.tokens[child]: _cell(tree.probabilities[child]) for child in children.get(place, [])}
        trust.learn(cells.values(), cells.get(token))
        if token not in cells:
            return
        place = next(child for child in children[place] if tree.tokens[child] == token)


def join(trees: Sequence[DraftTree], estimates: Sequence[Sequence[float]], budget: int, kind: DraftKind) -> DraftTree:
    """The trie of all trees, cut to the `budget` nodes that are most probably reached.

    `estimates[t][i]` belongs to node i of tree t. Where trees name the same node, noisy-or: it is missed only if all
    are wrong.
    """
    joined = DraftTree(kind=kind)
    index: dict[tuple[int, int], int] = {}
    for tree, rates in zip(trees, estimates, strict=True):
        places = {ROOT: ROOT}
        for node, (token, parent, rate) in enumerate(zip(tree.tokens, tree.parents, rates, strict=True)):
            key = places[parent], token
            found = index.get(key)
            if found is None:
                found = index[key] = joined.add(token, key[0], rate)
            else:
                joined.probabilities[found] = 1.0 - (1.0 - joined.probabilities[found]) * (1.0 - rate)
            places[node] = found
    totals: dict[int, float] = {}
    for parent, rate in zip(joined.parents, joined.probabilities, strict=True):
        totals[parent] = totals.get(parent, 0.0) + rate
    reach = {ROOT: 1.0}
    for node, parent in enumerate(joined.parents):
        joined.probabilities[node] *= min(1.0, CERTAIN / totals[parent]) if totals[parent] else 1.0
        reach[node] = reach[parent] * joined.probabilities[node]
    return joined.select(best_nodes(reach, budget))
