"""Drafting by running a function: trees grown in lockstep, one call for a level of all of them.

Shared by whatever drafts with a model of its own (`DraftModel`) and with a function of the target's program that
shares the target's KV (`SelfDraft`). The rows of a chain count as committed while it grows, so each token is run once;
where a tree branches, the nodes above a question are run again with it. In the end the cache is cut back.

A chain may be drafted for in turn: a cheaper drafter guesses what the function will say, the guesses run in the same
call as the node that was asked for, and as long as the policy asks for what was guessed, the answer is there already.
The chain is the one that grows without, in fewer calls (TriForce's hierarchy, 2404.11912).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
from torch import Tensor

from graft.compiler.drafting import ROOT, Candidates, Context, DraftKind, DraftTree, Growth, TreePolicy
from graft.compiler.ops import NO_PARENT
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.drafters.tables import TableDrafting
from graft.runtime.random import drawn_node
from graft.runtime.request import SAMPLING, Sampling
from graft.runtime.verifiers import draw


@dataclass(kw_only=True)
class GrowingTree:
    """One request's tree while it grows."""

    context: Context
    tree: DraftTree
    growth: Growth
    asked: list[int] = field(default_factory=list)
    done: bool = False

    def send(self, answers: list[Candidates] | None) -> None:
        """Answer what was asked, None at the start, and note what is asked next."""
        try:
            self.asked = next(self.growth) if answers is None else self.growth.send(answers)
        except StopIteration as grown:
            self.tree, self.done, self.asked = grown.value, True, []


@dataclass(kw_only=True)
class Growing(GrowingTree):
    """A tree that a function answers behind a request's text in its cache."""

    slot: int
    text: int
    """Rows of the text in the cache."""
    root: Tensor
    """Logits [1, vocabulary] after the last token of the text."""
    nodes: int = 0
    """How many it may have."""
    guessed: DraftTree = field(default_factory=DraftTree)
    """What is guessed to be asked behind the asked node, in the call that runs."""
    kept: list[int] = field(default_factory=list)
    """The path of nodes from the first level down that the cache holds behind the text."""

    def keep_shared(self) -> bool:
        """Drop from `kept` what is not above every asked node; whether anything was dropped."""
        paths = [self.tree.path(node)[:-1] for node in self.asked]
        shared = takewhile(lambda level: len(set(level)) == 1, zip(self.kept, *paths, strict=False))
        before, self.kept = len(self.kept), [level[0] for level in shared]
        return len(self.kept) < before

    def add_rows(self, rows: Rows) -> list[int]:
        """Add the rows of one call: the asked nodes, which are wanted, and the nodes above them that are not kept.
        Returns the node of each row."""
        needed = sorted({above for node in self.asked for above in self.tree.path(node)}.difference(self.kept))
        behind = self.kept[-1] if self.kept else ROOT
        place = {node: len(rows) + index for index, node in enumerate(needed)} | {behind: NO_PARENT}
        rows.wanted += [place[node] for node in self.asked]
        rows.slots += [self.slot] * len(needed)
        rows.tokens += [self.tree.tokens[node] for node in needed]
        rows.positions += [self.text - 1 + len(self.tree.path(node)) for node in needed]
        rows.parents += [place[self.tree.parents[node]] for node in needed]
        return needed

    def add_guesses(self, rows: Rows) -> None:
        """The rows of what is guessed, all wanted, behind that of the one asked node, which was added last."""
        behind, depth = len(rows) - 1, self.text - 1 + len(self.tree.path(self.asked[0]))
        rows.wanted += [behind + 1 + node for node in range(len(self.guessed))]
        rows.slots += [self.slot] * len(self.guessed)
        rows.tokens += self.guessed.tokens
        rows.positions += [depth + len(self.guessed.path(node)) for node in range(len(self.guessed))]
        rows.parents += [behind + 1 + parent for parent in self.guessed.parents]  # ROOT is the asked node's row


class FunctionDrafting(ABC):
    """What the `Drafting`s of drafters that run a function share; a subclass says where the texts' KV comes from."""

    def __init__(
        self,
        decoder: Decoder,
        policy: TreePolicy,
        *,
        candidates: int,
        kind: DraftKind,
        below: TableDrafting | None = None,
    ) -> None:
        """A node may have as many as `candidates` children: the best tokens, or for kinds that draw, draws from the
        processed distribution, which the tree keeps as q. `below` guesses what chains will hold."""
        self.below = below
        self.decoder, self.policy, self.kind = decoder, policy, kind
        self.sample = kind != "deterministic"
        self.candidates = candidates if policy.branches(kind) or not self.sample else 1

    @abstractmethod
    def slot(self, context: Context) -> int:
        """Where the decoder keeps the request."""

    @abstractmethod
    def catch_up(self, contexts: Sequence[Context]) -> list[Tensor]:
        """Run what the cache lacks of each text and commit it; logits [1, vocabulary] after the last token of each."""

    @abstractmethod
    def settle(self, context: Context) -> None:
        """Cut the cache back to what outlives the proposal."""

    def run(self, rows: Rows) -> Tensor:
        """float32 logits [len(rows.wanted), vocabulary]; the rows are left uncommitted."""
        return self.decoder.forward(rows)

    def run_nodes(self, rows: Rows, nodes: Sequence[tuple[Growing, int]]) -> Tensor:
        """`run` of rows that are these nodes; what is guessed has rows of its own between them."""
        return self.run(rows)

    def text_rows(self, context: Context) -> int:
        """How many rows the cache has of the text once it has caught up."""
        return len(context.tokens)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        """See `Drafting.propose`; a text that has outgrown the function's positions gets an empty tree."""
        trees = [DraftTree(kind=self.kind, noise=self.noise(context)) for context in contexts]
        limit = self.decoder.max_positions
        # Neither the text nor a node may stand behind the last position; the last node of a chain is never run.
        room = [
            budget if limit is None else min(budget, limit - len(context.tokens) + 1)
            for context, budget in zip(contexts, budgets, strict=True)
        ]
        chosen = [index for index, nodes in enumerate(room) if nodes > 0]
        if not chosen:
            return trees
        roots = self.catch_up([contexts[index] for index in chosen])
        growing: dict[int, Growing] = {}
        for index, root in zip(chosen, roots, strict=True):
            context, tree, ahead = contexts[index], trees[index], self.decoder.room(self.slot(contexts[index]))
            # What is drafted is forgotten again, so a cut must not move meanwhile.
            nodes = room[index] if ahead is None else min(room[index], ahead - 1)
            if nodes <= 0:
                self.settle(context)
                continue
            growth = self.policy.grow(tree, nodes, by_level=True)
            slot, text = self.slot(context), self.text_rows(context)
            growing[index] = Growing(
                context=context, slot=slot, text=text, root=root, tree=tree, growth=growth, nodes=nodes
            )
        for one in growing.values():
            one.send(None)
        while any(not one.done for one in growing.values()):
            self.grow_level([one for one in growing.values() if not one.done])
        for index, one in growing.items():
            self.settle(one.context)
            trees[index] = one.tree
        return trees

    def grow_level(self, growing: Sequence[Growing]) -> None:
        """Answer every tree's question: the root's from the logits at hand, the others' from one call for all."""
        rows, counts, nodes = Rows(), dict[int, int](), list[tuple[Growing, int]]()
        deeper = [one for one in growing if one.asked != [ROOT]]
        for one in deeper:
            if one.keep_shared():
                self.decoder.truncate(one.slot, one.text + len(one.kept))
            added = one.add_rows(rows)
            counts[one.slot] = len(added)
            nodes += [(one, node) for node in added]
            one.guessed = self.guess(one)
            one.add_guesses(rows)
        logits = self.run_nodes(rows, nodes) if deeper else None
        place = 0
        for one in growing:
            if one.asked == [ROOT] or logits is None:
                one.send(self.answers(one, one.root))
                continue
            asked, behind = one.asked, place + len(one.asked)
            place = behind + len(one.guessed)
            if len(asked) > 1:
                self.decoder.rollback(one.slot)
                one.send(self.answers(one, logits[behind - len(asked) : behind]))
                continue
            one.kept = one.tree.path(asked[0])
            one.send(self.answers(one, logits[behind - 1 : behind]))
            right = self.follow(one, logits[behind:place])
            count = counts[one.slot]
            self.decoder.commit(one.slot, [*range(count), *(count + node for node in right)])

    def guess(self, one: Growing) -> DraftTree:
        """What is likely to be asked behind the one asked node, no more than the tree has room for; nothing where
        several were asked."""
        if self.below is None or len(one.asked) > 1:
            return DraftTree()
        room = one.nodes - len(one.tree) - 1  # the last node of a chain is never run
        path = [one.tree.tokens[node] for node in one.tree.path(one.asked[0])]
        return self.below.go_on(one.context, path, max(room, 0))

    def follow(self, one: Growing, logits: Tensor) -> list[int]:
        """Answer what is asked as long as it was guessed and goes on the kept path; the guessed nodes in question, in
        order. `logits` [guessed, vocabulary]."""
        right: list[int] = []
        children, here = one.guessed.children(), ROOT
        while len(one.asked) == 1 and one.tree.parents[one.asked[0]] == one.kept[-1]:
            token = one.tree.tokens[one.asked[0]]
            same = [node for node in children.get(here, ()) if one.guessed.tokens[node] == token]
            if not same:
                break
            here = same[0]
            right.append(here)
            one.kept.append(one.asked[0])
            one.send(self.answers(one, logits[here : here + 1]))
        return right

    def answers(self, one: Growing, logits: Tensor) -> list[Candidates]:
        """What the policy is told of the nodes that it asked for."""
        return self.drawn(one, logits) if self.sample else self.best(one, logits)

    def best(self, one: Growing, logits: Tensor) -> list[Candidates]:
        """The best tokens at each asked node, with their probabilities."""
        tokens, shares = self.decoder.best(logits, self.candidates)
        return [list(zip(row, share, strict=True)) for row, share in zip(tokens.tolist(), shares.tolist(), strict=True)]

    def noise(self, context: Context) -> Callable[[int, int], float] | None:
        """See `DraftTree.noise`."""
        if not self.sample:
            return None
        uniforms, root = sampling_of(context).uniforms, len(context.tokens)
        return lambda node, rank: uniforms.uniform("beam", drawn_node(root, node, rank))

    def drawn(self, one: Growing, logits: Tensor) -> list[Candidates]:
        """Draws at each asked node, from the processed distribution, which the tree keeps as q."""
        sampling, tokens = sampling_of(one.context), one.context.tokens
        answers: list[Candidates] = []
        for row, node in enumerate(one.asked):
            path = [one.tree.tokens[above] for above in one.tree.path(node)]
            position = len(tokens) + len(path)
            scores = sampling.scores(logits[row : row + 1], tokens, path)
            q = one.tree.q[node] = sampling.distribution(scores, position)
            if self.policy.branches(self.kind):
                places = [drawn_node(len(tokens), node, rank) for rank in range(self.candidates)]
                numbers = (sampling.uniforms.uniform("draft siblings", place) for place in places)
                answers.append(draws(q, numbers, replacement=self.kind == "independent"))
            else:
                # A chain's numbers go by the text's positions: a longer chain begins as a shorter one.
                token = draw(q, sampling.uniforms.uniform("draft", position))
                answers.append([(token, float(q[token]))])
        return answers


def drawn_kind(sample: bool, replacement: bool) -> DraftKind:
    """The kind of drafts with these options of a drafter."""
    if not sample:
        return "deterministic"
    return "independent" if replacement else "without-replacement"


def draws(q: np.ndarray, numbers: Iterable[float], *, replacement: bool) -> Candidates:
    """A token and its q for each number, in the order drawn; fewer where none is left.

    Without replacement each is drawn from what is left of q. That is the law of the best perturbed log-probabilities,
    best first (Gumbel top-k: Yellott 1977, Kool et al. 1903.06059), at one number for each draw in the place of one for
    each token of the vocabulary.
    """
    left = q if replacement else q.copy()
    found: Candidates = []
    for number in numbers:
        token = draw(left, number)
        found.append((token, float(q[token])))
        if not replacement:
            left[token] = 0.0
            if not left.any():
                break
    return found


def sampling_of(context: Context) -> Sampling:
    """How the request chooses tokens."""
    sampling = context.data[SAMPLING]
    assert isinstance(sampling, Sampling)
    return sampling
