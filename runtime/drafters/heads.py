"""Heads: small networks on the target's last hidden state draft, all requests' trees grown in lockstep."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graft.compiler.drafting import (
    ROOT,
    Candidates,
    Context,
    Drafter,
    Drafting,
    DraftTree,
    HiddenRows,
    Outcome,
    Target,
    TreePolicy,
)
from graft.compiler.errors import CheckpointError, PlanError
from graft.compiler.ops import NO_PARENT
from graft.compiler.passing import Pass
from graft.compiler.shapes import attribute
from graft.passes.heads.dialects import dialect_of, read_config
from graft.passes.hydra_heads import HydraHeads
from graft.passes.medusa_heads import MedusaHeads
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.drafters.with_function import GrowingTree
from graft.runtime.step_times import running

PROMPT_ROWS = 512
"""Hidden states that a prefix layer reads in one call at most."""


@dataclass(frozen=True)
class Heads(Drafter):
    """Trained draft heads in a folder: Medusa (2401.10774), Hydra or Hydra++ (2402.05109).

    What the heads propose is a function of the text, so the kind is deterministic: greedy decoding and sampling both
    keep the target's distribution.
    """

    folder: Path
    """config.json and the tensors: what `python -m graft train-heads` writes, or a published checkpoint."""
    function: str = "heads"
    """Name of the heads in the program; two sets of heads need two names."""
    candidates: int = 8
    """How many tokens per place a tree may choose from."""

    def __post_init__(self) -> None:
        if not 1 <= self.candidates <= 64 or not self.function.isidentifier():
            raise PlanError(
                "The options of heads are not right.",
                expected="candidates of 1 to 64, and an identifier for function",
                found=f"candidates {self.candidates}, function {self.function!r}",
                where="Heads",
            )

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The pass for the kind of heads that the folder holds. Raises CheckpointError where it holds none."""
        data = read_config(self.folder)
        kind = data["kind"] if "kind" in data else dialect_of(data, self.folder).name.lower()
        return ((HydraHeads if kind == "hydra" else MedusaHeads)(self.folder, self.function),)

    @property
    def reads_hidden(self) -> HiddenRows:
        """A prefix layer reads the whole text, also where the folder is gone and only the compiled heads are left."""
        try:
            data = read_config(self.folder)
        except CheckpointError:
            return "all"
        return "all" if data.get("prefix") or "prefix" in str(data.get("hydra_head_arch")) else "rows"

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        """See `Drafter.open`; raises PlanError if the model was not compiled with these heads."""
        functions, name = target.functions, self.function
        if name in functions:
            return ParallelHeads(self, [functions[name]], policy, target.vocabulary)
        levels: list[Decoder] = []
        while f"{name}_{len(levels)}" in functions:
            levels.append(functions[f"{name}_{len(levels)}"])
        if not levels:
            raise PlanError(
                "the model was not compiled with these heads",
                expected=f"a function {name} or {name}_0",
                found=", ".join(functions) or "no function that drafts",
                where="Heads",
                remedy="name the heads in the plan that the model is compiled by",
            )
        kind = PrefixedHeads if levels[0].function.states else SequentialHeads
        return kind(self, levels, policy, target.vocabulary)


@dataclass
class Held:
    """Of one request: what its next tree grows from."""

    hidden: Tensor | None = None
    """[1, width]: what the heads read at the last token but the root, which is not run yet."""
    slot: int = -1
    """Where the prefix layer keeps the text."""
    waiting: list[Tensor] = field(default_factory=list)
    """Hidden states [tokens, width] that the prefix layer has not read."""
    said: list[Candidates] = field(default_factory=list)
    """What the first head, or all, say behind the root, where that is known before the tree grows."""
    answers: dict[tuple[int, ...], Candidates] = field(default_factory=dict)
    """What heads said of the latest tree, by the tokens down to a node."""

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

    def __init__(self, spec: Heads, levels: Sequence[Decoder], policy: TreePolicy, vocabulary: int) -> None:
        """`levels` are the functions in order, `vocabulary` is the target's."""
        self.levels, self.policy, self.count = levels, policy, spec.candidates
        self.key = f"heads {spec.function}"
        chosen = levels[0].function.draft_vocabulary
        self.tokens = attribute(levels[0].function.weights, chosen).cpu().numpy() if chosen else np.arange(vocabulary)
        """int64 [v]: the target's token for each draft id."""

    def begin(self, context: Context, prompt_best: np.ndarray | None, prompt_hidden: Tensor | None = None) -> None:
        """See `Drafting.begin`."""
        context.data[self.key] = Held()

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Drafting.observe`; the next tree grows from the last token that was accepted."""
        assert outcome.hidden is not None
        row = 1 + outcome.path[-1] if outcome.path else 0
        self.held(context).hidden = outcome.hidden[row : row + 1]

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

    def best(self, logits: Tensor) -> list[Candidates]:
        """The best tokens of each row of [rows, v], with their probabilities."""
        chosen, shares = self.levels[0].best(logits, self.count)
        ids = self.tokens[chosen].tolist()
        return [list(zip(row, share, strict=True)) for row, share in zip(ids, shares.tolist(), strict=True)]


class ParallelHeads(HeadsDrafting):
    """Medusa: all heads in one call; each level of a tree has the same candidates everywhere."""

    def prepare(self, growing: Sequence[Asking]) -> None:
        """One row for each request; what a head says is the answer at its depth."""
        last, hidden = [one.context.tokens[-1:] for one in growing], [one.held.read for one in growing]
        logits = run_rows(self.levels[0], last, hidden)
        best = self.best(logits.reshape(-1, len(self.tokens)))
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

    def __init__(self, spec: Heads, levels: Sequence[Decoder], policy: TreePolicy, vocabulary: int) -> None:
        super().__init__(spec, levels, policy, vocabulary)
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
        logits = run_rows(self.levels[depth], texts, [one.tree.held.read for one in questions])
        for one, candidates in zip(questions, self.best(logits), strict=True):
            one.answers[one.place] = one.tree.held.answers[one.tokens] = candidates


class PrefixedHeads(SequentialHeads):
    """Hydra++: the first function runs the prefix layer over the hidden states of accepted tokens, in slots of its own.

    The hidden state at a position is run with the token that follows it, so that one call gives both what the heads
    read there and what the first head says behind that token.
    """

    def __init__(self, spec: Heads, levels: Sequence[Decoder], policy: TreePolicy, vocabulary: int) -> None:
        super().__init__(spec, levels, policy, vocabulary)
        levels[0].keeps_hidden = True

    def begin(self, context: Context, prompt_best: np.ndarray | None, prompt_hidden: Tensor | None = None) -> None:
        """See `Drafting.begin`; the prompt's hidden states are run with the first proposal."""
        assert prompt_hidden is not None
        context.data[self.key] = Held(slot=self.levels[0].open(), waiting=[prompt_hidden])

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Drafting.observe`; what was accepted is run with the next proposal."""
        assert outcome.hidden is not None
        held = self.held(context)
        known = self.levels[0].length(held.slot) + sum(map(len, held.waiting))
        lacking = len(context.tokens) - 1 - known  # none at first: the prompt's were given to begin
        if lacking:
            held.waiting.append(outcome.hidden[[0, *(1 + node for node in outcome.path)][-lacking:]])
        self.learn(context, outcome)

    def end(self, context: Context) -> None:
        """See `Drafting.end`."""
        held = context.data.pop(self.key, None)
        if isinstance(held, Held):
            self.levels[0].close(held.slot)

    def prepare(self, growing: Sequence[Asking]) -> None:
        """Run the hidden states that wait, `PROMPT_ROWS` at a time."""
        first = self.levels[0]
        while True:
            rows, hidden, chunks = Rows(), list[Tensor](), list[tuple[Asking, int]]()
            for one in growing:
                fed, left = first.length(one.held.slot), PROMPT_ROWS - len(rows)
                chunk = one.context.tokens[fed + 1 : fed + 1 + left]
                if chunk:
                    rows.add_chain(one.held.slot, chunk, fed)
                    waiting = torch.cat(one.held.waiting)
                    hidden.append(waiting[: len(chunk)])
                    one.held.waiting = [waiting[len(chunk) :]]
                    chunks.append((one, len(chunk)))
            if not chunks:
                return
            self.run_chunks(rows, torch.cat(hidden), chunks)

    def run_chunks(self, rows: Rows, hidden: Tensor, chunks: Sequence[tuple[Asking, int]]) -> None:
        """Run and commit some rows of each request; keep what is known behind the last one."""
        first = self.levels[0]
        best, end = self.best(first.forward(rows, hidden)), 0
        assert first.hidden is not None
        for (one, count), said in zip(chunks, best, strict=True):
            first.commit(one.held.slot, range(count))
            end += count
            one.held.hidden, one.held.said = first.hidden[end - 1 : end], [said]


def run_rows(decoder: Decoder, texts: Sequence[Sequence[int]], hidden: list[Tensor]) -> Tensor:
    """Logits [rows, ...] of a function without a state on one row for each text: its tokens, the last one last, and
    the hidden state [1, width] that it reads."""
    count, device = len(texts), decoder.device
    # One tensor for everything, taken apart in one call: each further call of torch costs as much as a row.
    rows = np.zeros((4 + len(texts[0]), count), np.int64)
    rows[1], rows[2] = NO_PARENT, np.arange(count)
    rows[4:] = np.array(texts, np.int64).T
    zeros, parents, wanted, lengths, *tokens = torch.from_numpy(rows).to(device).unbind()
    with torch.inference_mode():
        flat = (tokens[-1], zeros, zeros, parents, lengths[:1], wanted)
        logits, _ = decoder.executable(*flat, hidden[0] if count == 1 else torch.cat(hidden), *tokens[:-1])
    return logits
