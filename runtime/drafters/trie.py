"""Trie: what most often followed, in this text or in what was generated before, as a tree of branches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graft.compiler.drafting import Context, Outcome, Target
from graft.compiler.errors import PlanError
from graft.runtime.drafters.tables import Evidence, Table, TableDrafter


@dataclass(frozen=True)
class Trie(TableDrafter):
    """Lookahead's trie (2312.12728): every place of the text is the start of a branch, counted where branches agree.

    A place in the draft asks the longest suffix that is in the trie first and ranks what followed it by frequency; what
    followed shorter ones comes after. When there are more than `nodes`, all counts are halved and what falls below 1 is
    forgotten.
    """

    branch: int = 12
    """How long a branch is, the tokens that lead to it included."""
    nodes: int = 65536
    shared: bool = False
    """Keep the outputs of all requests in the compiled model, and ask them where the request's own text has nothing:
    how fast a request runs then depends on the others' texts (what it returns does not)."""

    def __post_init__(self) -> None:
        if self.branch < 2 or self.nodes < self.branch:
            raise PlanError(
                "The options of the trie are out of range.",
                expected="branch >= 2 and nodes >= branch",
                found=f"branch {self.branch}, nodes {self.nodes}",
                where="Trie",
            )

    def table(self, context: Context, prompt_best: np.ndarray | None, target: Target) -> TrieTable:
        """See `TableDrafter.table`."""
        tries = [Branches(self.branch, self.nodes)]
        if self.shared:
            held = target.shared.setdefault(repr(self), Branches(self.branch, self.nodes))
            assert isinstance(held, Branches)
            tries.append(held)
        return TrieTable(tries, context)


class Node:
    """One token of a branch: how often it was seen there, its depth from 1, and what followed it."""

    __slots__ = ("children", "count", "depth")

    def __init__(self, depth: int) -> None:
        self.count = 0.0
        self.depth = depth
        self.children: dict[int, Node] = {}


Place = list[Node]
"""The nodes that the suffixes of a text lead to, longest suffix first."""


class Branches:
    """A trie of counted branches of bounded size."""

    def __init__(self, branch: int, limit: int) -> None:
        self.branch, self.limit = branch, limit
        self.root = Node(0)
        self.size = 0

    def step(self, place: Place, token: int) -> Place:
        """The place one token on."""
        found = [child for node in place if (child := node.children.get(token)) is not None]
        first = self.root.children.get(token)
        return found if first is None else [*found, first]

    def insert(self, place: Place, token: int) -> Place:
        """Count `token` behind every suffix of the place, and the place one token on."""
        following = []
        for node in (*place, self.root):
            child = node.children.get(token)
            if child is None:
                child = node.children[token] = Node(node.depth + 1)
                self.size += 1
            child.count += 1.0
            if child.depth < self.branch:
                following.append(child)
        if self.size <= self.limit:
            return following
        while self.size > self.limit // 2:
            self.size = _fade(self.root)
        # What was just reached may be gone. Suffixes start anew: a few branches are shorter, none is wrong.
        return []

    def followers(self, place: Place) -> dict[int, int]:
        """Token -> length of the suffix that it followed; most frequent first, longer suffixes before shorter."""
        found: dict[int, int] = {}
        for node in place:
            children = node.children
            if len(children) == 1:
                found.setdefault(next(iter(children)), node.depth)
            else:
                for token in sorted(children, key=lambda token: -children[token].count)[:_WIDTH]:
                    found.setdefault(token, node.depth)
        return found


def _fade(root: Node) -> int:
    """Halve all counts, forget what falls below 1, and the number of nodes left."""
    left, stack = 0, [root]
    while stack:
        node = stack.pop()
        for child in node.children.values():
            child.count *= 0.5
        node.children = {token: child for token, child in node.children.items() if child.count >= 1.0}
        left += len(node.children)
        stack += node.children.values()
    return left


class TrieTable(Table[list[Place]]):
    """The request's own trie, and after it the shared one where there is one. The state is the place in each.

    The class of a candidate is the trie, the longest suffix at its place, and its rank there up to the fifth.
    """

    def __init__(self, tries: list[Branches], context: Context) -> None:
        self.tries = tries
        self.ends: list[Place] = [[] for _ in tries]
        self.learnt = len(context.tokens)
        for token in context.tokens:
            self.ends[0] = tries[0].insert(self.ends[0], token)
        rates = [rate for length in range(1, _LENGTHS + 1) for rate in (_FIRST[length - 1], *_LATER)]
        self.priors = rates * len(tries)

    def start(self, context: Context) -> list[Place]:
        """See `Table.start`."""
        places: list[Place] = [[] for _ in self.tries]
        for token in context.tokens[-self.tries[0].branch :]:
            places = self.step(places, token)
        return places

    def step(self, state: list[Place], token: int) -> list[Place]:
        """See `Table.step`."""
        return [trie.step(place, token) for trie, place in zip(self.tries, state, strict=True)]

    def candidates(self, state: list[Place]) -> Evidence:
        """See `Table.candidates`."""
        found: Evidence = {}
        for number, (trie, place) in enumerate(zip(self.tries, state, strict=True)):
            followers = trie.followers(place)
            if followers:
                kind = (number * _LENGTHS + min(next(iter(followers.values())), _LENGTHS) - 1) * _RANKS
                for rank, token in enumerate(followers):
                    found.setdefault(token, kind + min(rank, _RANKS - 1))
        return found

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Table.observe`."""
        for token in context.tokens[self.learnt :]:
            self.ends = [trie.insert(end, token) for trie, end in zip(self.tries, self.ends, strict=True)]
        self.learnt = len(context.tokens)


_WIDTH = 8
_LENGTHS = 5
_RANKS = 5
_FIRST = (0.25, 0.48, 0.63, 0.74, 0.82)
_LATER = (0.12, 0.07, 0.04, 0.02)
