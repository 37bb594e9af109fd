"""How often any acceptance rule could accept one of k drafts: the optimal-transport bound, a diagnostic.

A rule couples the drafts with a token of the target's law p and accepts where that token is among them. The best
coupling is a maximal flow from sets of drafts to the tokens they hold (SpecTr, 2310.15141), and by its minimal cut

    min over sets H of tokens:  p(H) + 1 - Pr[all drafts lie in H]
"""

from __future__ import annotations

from itertools import permutations

import networkx
import numpy as np

from graft.compiler.drafting import DraftKind
from graft.compiler.errors import PlanError

MAX_SETS = 20_000
"""Ordered draws that are listed at most, for drafts without replacement."""


def best_acceptance(p: np.ndarray, q: np.ndarray, count: int, kind: DraftKind) -> float:
    """The highest probability with which one of `count` siblings drawn from q can be accepted, p kept exactly.

    p and q are float64 [vocabulary]. For independent samples any vocabulary will do; for draws without replacement all
    of them are listed. Raises PlanError where they are too many, and for kinds that do not draw.
    """
    if kind == "independent":
        return independent_bound(p, q, count)
    support = np.flatnonzero(q)
    draws = float(np.prod([max(len(support) - rank, 1) for rank in range(count)], dtype=np.float64))
    if kind != "without-replacement" or draws > MAX_SETS:
        raise PlanError(
            "There is no bound for these drafts.",
            expected=f"independent draws, or at most {MAX_SETS} draws without replacement",
            found=f"{draws:.0f} draws of kind {kind}",
            where="best_acceptance",
        )
    return flow_bound(p, drawn_sets(q, support.tolist(), min(count, len(support))))


def independent_bound(p: np.ndarray, q: np.ndarray, count: int) -> float:
    """min over H of p(H) + 1 - q(H)^count.

    For a given q(H) the least p(H) takes tokens by rising p / q. Between two such sets p(H) - q(H)^count is a line less
    a convex function, so the minimum is at one of them.
    """
    ratio = np.divide(p, q, out=np.full(len(p), np.inf), where=q > 0)
    order = np.argsort(ratio, kind="stable")
    cuts = np.cumsum(p[order]) - np.minimum(np.cumsum(q[order]), 1.0) ** count
    return float(min(1.0 + min(cuts.min(), 0.0), 1.0))


def drawn_sets(q: np.ndarray, support: list[int], count: int) -> dict[frozenset[int], float]:
    """The law of the set of `count` draws without replacement."""
    sets: dict[frozenset[int], float] = {}
    for order in permutations(support, count):
        weight, left = 1.0, float(q.sum())
        for token in order:
            weight *= float(q[token]) / left
            left -= float(q[token])
        sets[frozenset(order)] = sets.get(frozenset(order), 0.0) + weight
    return sets


def flow_bound(p: np.ndarray, sets: dict[frozenset[int], float]) -> float:
    """The maximal flow from drafts to the tokens that p wants."""
    graph = networkx.DiGraph()
    for index, (tokens, weight) in enumerate(sets.items()):
        graph.add_edge("drafts", ("set", index), capacity=weight)
        for token in tokens:
            graph.add_edge(("set", index), ("token", token))
    for token, share in enumerate(p.tolist()):
        graph.add_edge(("token", token), "target", capacity=share)
    return float(networkx.maximum_flow_value(graph, "drafts", "target"))
