"""Growing trees by draft heads, a function for each level of them: Medusa, Hydra, Hydra++ and Clover-2."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from graft.compiler.drafting import ROOT, Candidates, Context, DraftTree, Outcome, TreePolicy
from graft.compiler.ops import NO_PARENT
from graft.runtime.decoder import Decoder
from graft.runtime.drafters.text_rows import DraftTokens, TextRows, read_width
from graft.runtime.drafters.with_function import GrowingTree
from graft.runtime.step_times import running


@dataclass
class Held:
    """Of one request: what its next tree grows from."""

    hidden: Tensor | None = None
    """[1, width]: what the heads read at the last token but the root, which is not run yet."""
    said: list[Candidates] = field(default_factory=list)
    """What the first head, or all, say behind the root, where that is known before the tree grows."""
    answers: dict[tuple[int, ...], Candidates] = field(default_factory=dict)
    """What heads said of the latest tree, by the tokens down to a node."""
    states: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """[1, width], likewise: what a recurrent head made of the tokens down to a node."""

    @property
    def read(self) -> Tensor:
        """What the heads read."""
        assert self.hidden is not None
        return self.hidden


@dataclass(kw_only=True)
class Asking(GrowingTree):
    """A tree that heads answer."""

    held: Held


@dataclass
class Question:
    """A node whose candidates a head is to name."""

    tree: Asking
    answers: list[Candidates]
    """Those of its tree, and the answer's place among them."""
    place: int
    tokens: tuple[int, ...]
    """Drafted down to the node."""
    reach: float


class HeadsDrafting(ABC):
    """What all kinds of heads share: trees grown by level, and drafts mapped back to the target's tokens."""

    def __init__(self, key: str, says: DraftTokens, levels: Sequence[Decoder], policy: TreePolicy) -> None:
        """`levels` are the functions in order, `key` is that of the requests' state."""
        self.levels, self.policy, self.key, self.says = levels, policy, key, says
        self.width = read_width(levels[0])

    def begin(self, context: Context, prompt_best: np.ndarray | None, prompt_hidden: Tensor | None = None) -> None:
        """See `Drafting.begin`."""
        context.data[self.key] = Held()

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Drafting.observe`; the next tree grows from the last token that was accepted."""
        assert outcome.hidden is not None
        row = 1 + outcome.path[-1] if outcome.path else 0
        self.held(context).hidden = outcome.hidden[row : row + 1, : self.width]

    def end(self, context: Context) -> None:
        """See `Drafting.end`."""
        context.data.pop(self.key, None)

    def held(self, context: Context) -> Held:
        """The request's state."""
        held = context.data[self.key]
        assert isinstance(held, Held)
        return held

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        """See `Drafting.propose`."""
        growing: dict[int, Asking] = {}
        for index, (context, budget) in enumerate(zip(contexts, budgets, strict=True)):
            if budget > 0:
                tree = DraftTree()
                growth = self.policy.grow(tree, budget, by_level=True)
                growing[index] = Asking(context=context, held=self.held(context), tree=tree, growth=growth)
        if growing:
            self.prepare(list(growing.values()))
        for one in growing.values():
            one.send(None)
        while asking := [one for one in growing.values() if not one.done]:
            for one, answers in zip(asking, self.answer(asking), strict=True):
                one.send(answers)
        return [growing[index].tree if index in growing else DraftTree() for index in range(len(contexts))]

    @abstractmethod
    def prepare(self, growing: Sequence[Asking]) -> None:
        """What is run once, before the trees grow."""

    @abstractmethod
    def answer(self, asking: Sequence[Asking]) -> list[list[Candidates]]:
        """For each tree the candidates behind each of the nodes that it asks about."""


class ParallelHeads(HeadsDrafting):
    """Medusa: all heads in one call; each level of a tree has the same candidates everywhere."""

    def prepare(self, growing: Sequence[Asking]) -> None:
        """One row for each request; what a head says is the answer at its depth."""
        last, hidden = [one.context.tokens[-1:] for one in growing], [one.held.read for one in growing]
        logits, _ = run_rows(self.levels[0], last, hidden)
        best = self.says.best(logits.reshape(-1, len(self.says.ids)))
        heads = len(best) // len(growing)
        for row, one in enumerate(growing):
            one.held.said = best[row * heads : (row + 1) * heads]

    def answer(self, asking: Sequence[Asking]) -> list[list[Candidates]]:
        """See `HeadsDrafting.answer`."""
        answers = []
        for one in asking:
            depths = [len(one.tree.path(node)) for node in one.asked]
            answers.append([one.held.said[depth] if depth < len(one.held.said) else [] for depth in depths])
        return answers


@dataclass
class Level:
    """What asking one head takes, and how often the next token is among its candidates where its question came true."""

    seconds: tuple[int, float] = (0, 0.0)
    right: float = 2.0
    asked: float = 4.0

    def pays(self, reach: float, pace: float) -> bool:
        """Whether an answer behind nodes that are reached with a probability of `reach` in all is worth the time, of
        which a second is worth `pace` tokens."""
        return reach * self.right / self.asked >= pace * self.seconds[1]


class SequentialHeads(HeadsDrafting):
    """Hydra: a level of all trees is one call of its head, which sees the tokens drafted above.

    A head below the first is not asked where its answer is not expected to be worth its time. Whether the first one is
    is for the controller to say.
    """

    def __init__(self, key: str, says: DraftTokens, levels: Sequence[Decoder], policy: TreePolicy) -> None:
        super().__init__(key, says, levels, policy)
        self.costs = [Level() for _ in levels]

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Drafting.observe`."""
        super().observe(context, outcome)
        self.learn(context, outcome)

    def learn(self, context: Context, outcome: Outcome) -> None:
        """Compare what was said along the decided path with the tokens that were decided."""
        said = self.held(context).answers
        decided = [*(outcome.tree.tokens[node] for node in outcome.path), outcome.next_token]
        for depth, token in enumerate(decided[: len(self.levels)]):
            candidates = said.get(tuple(decided[:depth]))
            if candidates is None:
                break
            self.costs[depth].asked += 1
            self.costs[depth].right += any(token == one for one, _ in candidates)
        said.clear()

    def prepare(self, growing: Sequence[Asking]) -> None:
        """Nothing: the hidden states are at hand."""

    def answer(self, asking: Sequence[Asking]) -> list[list[Candidates]]:
        """See `HeadsDrafting.answer`. A policy may ask about nodes of several depths at once."""
        answers: list[list[Candidates]] = [[[] for _ in one.asked] for one in asking]
        levels: dict[int, list[Question]] = defaultdict(list)
        for index, one in enumerate(asking):
            for place, node in enumerate(one.asked):
                if node == ROOT and one.held.said:
                    answers[index][place] = one.held.answers[()] = one.held.said[0]
                    continue
                path = one.tree.path(node)
                if len(path) < len(self.levels):
                    tokens = tuple(one.tree.tokens[above] for above in path)
                    reach = math.prod(one.tree.probabilities[above] for above in path)
                    levels[len(path)].append(Question(one, answers[index], place, tokens, reach))
        for depth, questions in levels.items():
            # A request's time is worth something once, however many of its nodes are asked about.
            pace = sum({id(one.tree): one.tree.context.pace for one in questions}.values())
            if depth and not self.costs[depth].pays(sum(one.reach for one in questions), pace):
                continue
            start = time.perf_counter()
            self.ask(depth, questions)
            self.costs[depth].seconds = running(self.costs[depth].seconds, time.perf_counter() - start)
        return answers

    def ask(self, depth: int, questions: Sequence[Question]) -> None:
        """Run a head over a row for each question, and write the answers down."""
        texts = [(one.tree.context.tokens[-1], *one.tokens) for one in questions]
        logits, _ = run_rows(self.levels[depth], texts, [one.tree.held.read for one in questions])
        self.note(questions, logits)

    def note(self, questions: Sequence[Question], logits: Tensor) -> None:
        """Write down what a head answered."""
        for one, candidates in zip(questions, self.says.best(logits), strict=True):
            one.answers[one.place] = one.tree.held.answers[one.tokens] = candidates


class PrefixedHeads(SequentialHeads):
    """Hydra++: the first function runs the prefix layer over the hidden states of accepted tokens, in slots of its own,
    which gives both what the heads read there and what the first head says."""

    def __init__(self, key: str, says: DraftTokens, levels: Sequence[Decoder], policy: TreePolicy) -> None:
        super().__init__(key, says, levels, policy)
        self.text = TextRows(levels[0], f"{key}, the text")

    def begin(self, context: Context, prompt_best: np.ndarray | None, prompt_hidden: Tensor | None = None) -> None:
        """See `Drafting.begin`; the prompt's hidden states are run with the first proposal."""
        super().begin(context, prompt_best)
        self.text.begin(context, prompt_hidden)

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Drafting.observe`; what was accepted is run with the next proposal."""
        self.text.observe(context, outcome)
        self.learn(context, outcome)

    def end(self, context: Context) -> None:
        """See `Drafting.end`."""
        super().end(context)
        self.text.end(context)

    def prepare(self, growing: Sequence[Asking]) -> None:
        """Run the hidden states that wait."""
        texts = self.text.run([one.context for one in growing])
        best = self.says.best(torch.cat([text.logits for text in texts]))
        for one, text, said in zip(growing, texts, best, strict=True):
            one.held.hidden, one.held.said = text.hidden, [said]


class RecurrentHeads(PrefixedHeads):
    """Clover-2: the first function makes a state of the text, which every further head updates by one drafted token."""

    def prepare(self, growing: Sequence[Asking]) -> None:
        """See `PrefixedHeads.prepare`; the states of the tree before are forgotten."""
        super().prepare(growing)
        for one in growing:
            one.held.states = {(): one.held.read}

    def ask(self, depth: int, questions: Sequence[Question]) -> None:
        """Run a head over the state above each node and the node's token, and write down what it makes of them."""
        above = [one.tree.held.states[one.tokens[:-1]] for one in questions]
        logits, states = run_rows(self.levels[depth], [one.tokens[-1:] for one in questions], above)
        for row, one in enumerate(questions):
            one.tree.held.states[one.tokens] = states[row : row + 1]
        self.note(questions, logits)


def run_rows(decoder: Decoder, texts: Sequence[Sequence[int]], hidden: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [rows, ...] and hidden states [rows, width] of a function without a state on one row for each text: its
    tokens, the last one last, and the hidden state [1, width] that it reads."""
    count, device = len(texts), decoder.device
    # One tensor for everything, taken apart in one call: each further call of torch costs as much as a row.
    rows = np.zeros((4 + len(texts[0]), count), np.int64)
    rows[1], rows[2] = NO_PARENT, np.arange(count)
    rows[4:] = np.array(texts, np.int64).T
    zeros, parents, wanted, lengths, *tokens = torch.from_numpy(rows).to(device).unbind()
    with torch.inference_mode():
        flat = (tokens[-1], zeros, zeros, parents, lengths[:1], wanted)
        given = hidden[0] if count == 1 else torch.cat(hidden)
        logits, states = decoder.executable(*flat, given, *tokens[:-1])
    return logits, states
