"""Shapes of draft trees: a chain, a fixed template, best-first by estimated probability, a stochastic beam."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from graft.compiler.drafting import ROOT, Candidates, DraftKind, DraftTree, Growth, TreePolicy
from graft.compiler.errors import PlanError


@dataclass(frozen=True)
class Chain(TreePolicy):
    """The most probable candidate, and the most probable one after it, until the budget is spent."""

    def ends(self, probability: float, reach: float) -> bool:
        """Whether nothing is drafted behind a token of that probability, down to which the product is `reach`."""
        return False

    def branches(self, kind: DraftKind) -> bool:
        """Never."""
        return False

    def grow(self, tree: DraftTree, budget: int, *, by_level: bool = False) -> Growth:
        """See `TreePolicy.grow`; one node is asked for at a time."""
        node, reach = ROOT, 1.0
        while len(tree) < budget:
            (candidates,) = yield [node]
            if not candidates:
                break
            token, probability = candidates[0]
            node = tree.add(token, node, probability)
            reach *= probability
            if self.ends(probability, reach):
                break
        return tree


@dataclass(frozen=True)
class ChainUntil(Chain):
    """A chain that ends where it is no longer likely to stand as a whole: SpecDec++'s rule (2405.19715).

    No token follows one down to which the product of the estimated acceptances is below 1 - `threshold`, the paper's h.
    The estimates are the drafter's own probabilities; the paper trains a head for them. The rule reads tokens that stay
    in the chain, so drawn drafts keep their law; to leave out the token that fell short itself would change q.
    """

    threshold: float = 0.7
    """Stop when the chance that one of the tokens is rejected exceeds this."""

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise PlanError(
                "The threshold is out of range.",
                expected="above 0, at most 1",
                found=self.threshold,
                where="ChainUntil",
            )

    def ends(self, probability: float, reach: float) -> bool:
        """See `Chain.ends`."""
        return 1.0 - reach > self.threshold


@dataclass(frozen=True)
class Fixed(TreePolicy):
    """A template of paths by rank, as in Medusa (2401.10774) and Token Recycling (2408.08696).

    `paths` holds one path for each node: (0,) is the best candidate at the root, (0, 2) the third best below it. Every
    prefix of a path must be a path too. With a budget below their number the first ones count, so list the better
    ones first; `Fixed.branching(3, 2)` lists the full tree with three children and two grandchildren each.

    Where drafts are drawn no rank is better than another: a node's children are as many draws as it has paths, in the
    order listed. `branching` with draws without replacement is RSD-C (2402.14160).
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        seen: set[tuple[int, ...]] = {()}
        for path in self.paths:
            if not path or path in seen or path[:-1] not in seen or min(path) < 0:
                raise PlanError(
                    "The paths of a fixed tree do not form a tree.",
                    expected="each path once, after its own prefix, with ranks from 0 on",
                    found=path,
                    where="Fixed.paths",
                )
            seen.add(path)

    @classmethod
    def branching(cls, *widths: int) -> Fixed:
        """The full tree with widths[d] children for every node at depth d."""
        level: list[tuple[int, ...]] = [()]
        paths: list[tuple[int, ...]] = []
        for width in widths:
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
        return cls(tuple(paths))

    def branches(self, kind: DraftKind) -> bool:
        """Whether two paths share a parent."""
        return len({path[:-1] for path in self.paths}) < len(self.paths)

    def grow(self, tree: DraftTree, budget: int, *, by_level: bool = False) -> Growth:
        """See `TreePolicy.grow`; a level is asked for at once."""
        used = self.paths[: max(budget, 0)]
        node_of: dict[tuple[int, ...], int] = {(): ROOT}
        for depth in range(max(map(len, used), default=0)):
            level = [path for path in used if len(path) == depth + 1]
            asked = list(dict.fromkeys(path[:-1] for path in level if path[:-1] in node_of))
            if not asked:
                break
            answers = yield [node_of[path] for path in asked]
            candidates = dict(zip(asked, answers, strict=True))
            taken = dict.fromkeys(asked, 0)
            for path in level:
                ranked = candidates.get(path[:-1], [])
                rank = path[-1] if tree.kind in {"deterministic", "mixed"} else taken.get(path[:-1], 0)
                if rank < len(ranked):
                    token, probability = ranked[rank]
                    taken[path[:-1]] = rank + 1
                    node_of[path] = tree.add(token, node_of[path[:-1]], probability)
        return tree


UNASKED = -1
"""The rank before the first: that of a node whose candidates were not asked for yet."""


@dataclass(frozen=True)
class BestFirst(TreePolicy):
    """The nodes that are most probably reached, taken from a heap, as in DySpec (2410.11744).

    A node's estimate is the product of the probabilities down to it, so that the sum of all estimates is the expected
    number of accepted nodes, and the tree is the best of its size if the estimates are right. By level, for drafters
    that run a model, it is EAGLE-2's shape (2406.16858): every level extends the `width` best nodes of the one before
    it, and the best of all that were seen make the tree.

    Draws without replacement are chosen by what is known before they are drawn, as in DySpec's algorithm: the child of
    rank i counts with the probability that its parent is reached times the mass of q that the i - 1 before it left,
    (the estimate that they are rejected). Its threshold on these values is `floor`. DySpec's level-wise form keeps
    whatever passes the threshold; here the best `nodes` of a plan are kept of it, which is what its heap would keep, as
    far as `width` lets it see. Independent draws grow as a chain.
    """

    width: int = 4
    """How many nodes of a level are extended; counts only by level."""
    floor: float = 0.005
    """Estimates below this are not drafted: such a node costs a row and returns next to nothing."""

    def __post_init__(self) -> None:
        if self.width < 1 or not 0 <= self.floor < 1:
            raise PlanError(
                "The options of best-first are out of range.",
                expected="width >= 1 and 0 <= floor < 1",
                found=f"width {self.width}, floor {self.floor}",
                where="BestFirst",
            )

    def branches(self, kind: DraftKind) -> bool:
        """Deterministic drafts branch, and those without replacement."""
        return kind in {"deterministic", "without-replacement"}

    def grow(self, tree: DraftTree, budget: int, *, by_level: bool = False) -> Growth:
        """See `TreePolicy.grow`."""
        if not self.branches(tree.kind):
            return (yield from Chain().grow(tree, budget))
        if by_level or tree.kind == "without-replacement":
            return (yield from self._grow_by_level(tree, budget))
        return (yield from self._grow_by_node(tree, budget))

    def _grow_by_node(self, tree: DraftTree, budget: int) -> Growth:
        # Of every list of siblings only the best that is not in the tree yet waits in the heap. A node waits there for
        # its candidates to be asked for, too: none of them is reached more probably than itself, and most are never
        # needed. The counter breaks ties, first come first served, before candidates would be compared.
        heap: list[tuple[float, int, int, float, int, Candidates]] = [(-1.0, 0, ROOT, 1.0, UNASKED, [])]
        count = 1
        while heap and len(tree) < budget and -heap[0][0] >= self.floor:
            negative, _, parent, above, rank, siblings = heap[0]
            if rank == UNASKED:
                heapq.heappop(heap)
                (siblings,) = yield [parent]
            else:
                node = tree.add(siblings[rank][0], parent, siblings[rank][1])
                heapq.heapreplace(heap, (negative, count, node, -negative, UNASKED, []))
                count += 1
            if rank + 1 < len(siblings):
                heapq.heappush(heap, (-above * siblings[rank + 1][1], count, parent, above, rank + 1, siblings))
                count += 1
        return tree

    def _grow_by_level(self, tree: DraftTree, budget: int) -> Growth:
        drawn = tree.kind == "without-replacement"
        reach: dict[int, float] = {ROOT: 1.0}
        worth: dict[int, float] = {ROOT: 1.0}
        frontier = [ROOT]
        while frontier and budget > 0:
            answers = yield frontier
            fresh: list[int] = []
            for parent, candidates in zip(frontier, answers, strict=True):
                left = 1.0
                for token, probability in candidates[:budget]:
                    value = reach[parent] * (max(left, 0.0) if drawn else probability)
                    left -= probability
                    if value < self.floor:
                        if drawn:
                            break
                        continue
                    node = tree.add(token, parent, probability)
                    reach[node], worth[node] = min(reach[parent] * probability, value), value
                    fresh.append(node)
            # A node that is not among the best now cannot have descendants in the final tree.
            best = set(best_nodes(worth, budget))
            frontier = sorted(best.intersection(fresh), key=lambda node: (-reach[node], node))[: self.width]
        return tree.select(best_nodes(worth, budget))


@dataclass(frozen=True)
class StochasticBeam(TreePolicy):
    """Stochastic beam search: RSD-S (2402.14160) after Kool et al. (1903.06059).

    Every level holds the `width` sequences of highest perturbed log-probability, which is a sample of sequences without
    replacement. A child's perturbed value is drawn given its parent's and its elder sibling's: the eldest has the
    parent's, and the next one is a Gumbel of the mass that is left, cut off at the value before. Where a maximum lies
    is independent of how high it is, so whether a node is kept does not depend on its token.

    Deterministic drafts grow by plain beam search, independent ones as a chain.
    """

    width: int = 4

    def __post_init__(self) -> None:
        if self.width < 1:
            raise PlanError("The beam has no width.", expected="1 or more", found=self.width, where="StochasticBeam")

    def branches(self, kind: DraftKind) -> bool:
        """Deterministic drafts branch, and those without replacement."""
        return self.width > 1 and kind in {"deterministic", "without-replacement"}

    def grow(self, tree: DraftTree, budget: int, *, by_level: bool = False) -> Growth:
        """See `TreePolicy.grow`; a level is asked for at once."""
        if not self.branches(tree.kind):
            return (yield from Chain().grow(tree, budget))
        beam = {ROOT: (0.0, 0.0)}  # node -> log-probability, perturbed log-probability
        while beam and len(tree) < budget:
            answers = dict(zip(beam, (yield list(beam)), strict=True))
            heap: list[tuple[float, int, int]] = []
            for parent in beam:
                self._offer(heap, tree, parent, 0, beam, answers[parent])
            chosen: dict[int, tuple[float, float]] = {}
            while heap and len(chosen) < self.width and len(tree) < budget:
                negative, parent, rank = heapq.heappop(heap)
                token, probability = answers[parent][rank]
                node = tree.add(token, parent, probability)
                chosen[node] = beam[parent][0] + math.log(max(probability, TINY)), -negative
                self._offer(heap, tree, parent, rank + 1, beam, answers[parent], -negative)
            beam = chosen
        return tree

    def _offer(self, heap: list[tuple[float, int, int]], tree: DraftTree, parent: int, rank: int,
               beam: Mapping[int, tuple[float, float]], siblings: Candidates, elder: float = 0.0) -> None:  # fmt: skip
        """Put the child of that rank on the heap, at its perturbed value; `elder` is that of the one before it."""
        if rank >= len(siblings):
            return
        above, value = beam[parent]
        if tree.noise is None:
            value = above + math.log(max(siblings[rank][1], TINY))
        elif rank:
            left = above + math.log(max(1.0 - sum(share for _, share in siblings[:rank]), TINY))
            exponential = -math.log(max(tree.noise(parent, rank), TINY))
            value = min(elder, left - float(np.logaddexp(left - elder, math.log(exponential))))
        heapq.heappush(heap, (-value, parent, rank))


TINY = 1e-300


def best_nodes(reach: dict[int, float], budget: int) -> list[int]:
    """The `budget` nodes of highest reach, in tree order; `reach[node]` estimates that a node is reached and accepted.

    A child is never above its parent, so no node lacks its own.
    """
    nodes = sorted((node for node in reach if node != ROOT), key=lambda node: (-reach[node], node))
    return sorted(nodes[:budget])
