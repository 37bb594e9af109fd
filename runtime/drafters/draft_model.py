"""DraftModel: another compiled model with the same vocabulary drafts, in KV slots of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from graft.compiler.drafting import (
    ROOT,
    Candidates,
    Context,
    Drafter,
    Drafting,
    DraftKind,
    DraftTree,
    Growth,
    Outcome,
    Target,
    TreePolicy,
)
from graft.compiler.errors import PlanError
from graft.compiler.ops import NO_PARENT
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.request import SAMPLING, Sampling
from graft.runtime.top_tokens import top_rows
from graft.runtime.verifiers import draw

PROMPT_ROWS = 512
"""Tokens of texts in one call at most."""


@runtime_checkable
class Compiled(Protocol):
    """What is needed of the other model."""

    @property
    def decoder(self) -> Decoder:
        """The model with its KV cache."""


@dataclass(frozen=True)
class DraftModel(Drafter):
    """A second, smaller model drafts (Leviathan et al., 2211.17192; Chen et al., 2302.01318).

    Deterministic by default: its best tokens, in any tree. With `sample` it draws a chain from its own distribution,
    after the same logits processors as the target's, for verifier Leviathan; a processor that keeps state between
    calls then sees drafted tokens too. What it drafts is dropped after each step and what was accepted is run again
    with the next step's first call, which has rows to spare; so its cache never holds anything but committed text.
    """

    other: Compiled = field(repr=False, hash=False)
    """The compiled model that drafts."""
    sample: bool = False
    candidates: int = 8
    """How many of its best tokens per place a tree may choose from."""

    def __post_init__(self) -> None:
        if not 1 <= self.candidates <= 64:
            raise PlanError("candidates is out of range", expected="1 to 64", found=self.candidates, where="DraftModel")

    @property
    def kind(self) -> DraftKind:
        """See `Drafter.kind`."""
        return "independent" if self.sample else "deterministic"

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        """See `Drafter.open`; raises PlanError if the vocabularies differ, or samples would not form a chain."""
        decoder = self.other.decoder
        if decoder.vocabulary != target.vocabulary:
            raise PlanError(
                "a draft model must have the target's vocabulary",
                expected=f"{target.vocabulary} tokens, as the target",
                found=f"{decoder.vocabulary} tokens",
                where="DraftModel",
                remedy="use a smaller model of the same family",
            )
        if self.sample and policy.branches(self.kind):
            raise PlanError(
                "a draft model that samples drafts chains",
                expected="a tree policy without branches, as Chain",
                found=policy,
                where="DraftModel",
                remedy="use Chain, or sample=False",
            )
        return ModelDrafting(self, decoder, policy)


@dataclass
class Held:
    """What a request holds of the draft model."""

    slot: int
    root: Tensor | None = None
    """Logits [1, vocabulary] after the last token that was run."""


@dataclass
class Growing:
    """One request's tree while it grows."""

    context: Context
    slot: int
    root: Tensor
    """Logits [1, vocabulary] after the last token of the text."""
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

    def add_rows(self, rows: Rows) -> None:
        """The rows of one call: the asked nodes, which are wanted, and the nodes above them."""
        needed = sorted({above for node in self.asked for above in self.tree.path(node)})
        place = {node: len(rows) + index for index, node in enumerate(needed)} | {ROOT: NO_PARENT}
        last = len(self.context.tokens) - 1
        rows.wanted += [place[node] for node in self.asked]
        rows.slots += [self.slot] * len(needed)
        rows.tokens += [self.tree.tokens[node] for node in needed]
        rows.positions += [last + len(self.tree.path(node)) for node in needed]
        rows.parents += [place[self.tree.parents[node]] for node in needed]


class ModelDrafting:
    """The `Drafting` of a `DraftModel`; requests grow their trees in lockstep, one call for a level of all of them."""

    def __init__(self, spec: DraftModel, decoder: Decoder, policy: TreePolicy) -> None:
        self.spec, self.decoder, self.policy = spec, decoder, policy
        self.key = f"draft model {id(self)}"

    def begin(self, context: Context, prompt_best: np.ndarray | None) -> None:
        """See `Drafting.begin`; the prompt is run with the first proposal."""
        context.data[self.key] = Held(self.decoder.open())

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Drafting.observe`; accepted tokens are run with the next proposal."""

    def end(self, context: Context) -> None:
        """See `Drafting.end`."""
        held = context.data.pop(self.key, None)
        if isinstance(held, Held):
            self.decoder.close(held.slot)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        """See `Drafting.propose`; a text that has outgrown the draft model's positions gets an empty tree."""
        trees = [DraftTree(kind=self.spec.kind) for _ in contexts]
        limit = self.decoder.max_positions
        # Neither the text nor a node may stand behind the last position; the last node of a chain is never run.
        room = [
            budget if limit is None else min(budget, limit - len(context.tokens) + 1)
            for context, budget in zip(contexts, budgets, strict=True)
        ]
        chosen = [index for index, nodes in enumerate(room) if nodes > 0]
        roots = self.catch_up([contexts[index] for index in chosen])
        growing = []
        for index, root in zip(chosen, roots, strict=True):
            context, tree = contexts[index], trees[index]
            growth = self.policy.grow(tree, room[index], by_level=True)
            growing.append(Growing(context, self.held(context).slot, root, tree, growth))
        for one in growing:
            one.send(None)
        while any(not one.done for one in growing):
            self.grow_level([one for one in growing if not one.done])
        for index, one in zip(chosen, growing, strict=True):
            trees[index] = one.tree
        return trees

    def held(self, context: Context) -> Held:
        """The request's slot, and the logits to grow its next tree from."""
        held = context.data[self.key]
        assert isinstance(held, Held)
        return held

    def catch_up(self, contexts: Sequence[Context]) -> list[Tensor]:
        """Run what the cache lacks of each text; logits [1, vocabulary] after the last token of each."""
        held = [self.held(context) for context in contexts]
        while True:
            rows, left, chunks = Rows(), PROMPT_ROWS, []
            for context, one in zip(contexts, held, strict=True):
                fed = self.decoder.length(one.slot)
                chunk = context.tokens[fed : fed + left]
                if chunk:
                    rows.add_chain(one.slot, chunk, fed)
                    chunks.append((one, len(chunk)))
                    left -= len(chunk)
            if not chunks:
                return [one.root for one in held if one.root is not None]
            logits = self.decoder.forward(rows)
            for place, (one, count) in enumerate(chunks):
                self.decoder.commit(one.slot, range(count))
                one.root = logits[place : place + 1]

    def grow_level(self, growing: Sequence[Growing]) -> None:
        """Answer every tree's question: the root's from the logits at hand, the others' from one call for all."""
        rows = Rows()
        deeper = [one for one in growing if one.asked != [ROOT]]
        for one in deeper:
            one.add_rows(rows)
        logits = self.decoder.forward(rows) if deeper else None
        for one in deeper:
            self.decoder.rollback(one.slot)
        place = 0
        for one in growing:
            if one.asked == [ROOT] or logits is None:
                answer = one.root
            else:
                answer = logits[place : place + len(one.asked)]
                place += len(one.asked)
            one.send(self.drawn(one, answer) if self.spec.sample else self.best(answer))

    def best(self, logits: Tensor) -> list[Candidates]:
        """The best tokens of each row, with their probabilities."""
        count = min(self.spec.candidates, logits.shape[1])
        tokens = top_rows(logits, count)
        # Probabilities of a few tokens need no softmax over the vocabulary.
        shares = (logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)).exp()
        return [list(zip(row, share, strict=True)) for row, share in zip(tokens.tolist(), shares.tolist(), strict=True)]

    def drawn(self, one: Growing, logits: Tensor) -> list[Candidates]:
        """One sample at each asked node, from the processed distribution, which the tree keeps as q."""
        sampling, tokens = one.context.data[SAMPLING], one.context.tokens
        assert isinstance(sampling, Sampling)
        answers: list[Candidates] = []
        for row, node in enumerate(one.asked):
            path = [one.tree.tokens[above] for above in one.tree.path(node)]
            position = len(tokens) + len(path)
            scores = sampling.scores(logits[row : row + 1], tokens, path)
            q = sampling.distribution(scores, position)
            one.tree.q[node] = q
            token = draw(q, sampling.uniforms.uniform("draft", position))
            answers.append([(token, float(q[token]))])
        return answers
