"""Recycle: what the target held for the best next tokens when it last stood here, as candidates for now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from graft.compiler.drafting import ROOT, Context, Outcome, Target
from graft.compiler.errors import PlanError
from graft.runtime.drafters.tables import Evidence, Table, TableDrafter

Pair = tuple[int, int]
@dataclass(frozen=True)
class Recycle(TableDrafter):
    """Token Recycling (2408.08696): a table from the last tokens to the target's `k` best next ones.

    Every row of a verification step updates it, accepted or not, so that what was computed and rejected still counts.
    Beside the paper's rows by the last token there are rows by the last two, which are asked first: as in STAND
    (2506.04708), a longer context is the better guess where it was seen. After a token that the target was not asked
    about, what followed it in the prompt is proposed; after one that is not there either, nothing.

    `seed_prompt` fills the table from the prompt before the first step, for which the prefill has to compute logits at
    every prompt position; the prefill time contains that. `seed_vocabulary` asks the target once, when the model is
    compiled, what it would say after each of so many tokens alone, the lowest ids first, which are the most frequent
    ones in a byte-pair vocabulary (the model's own bigrams, as in 2411.03786); that is what is proposed after a token
    of which nothing better is known.
    """

    k: int = 8
    seed_prompt: bool = False
    seed_vocabulary: int = 0
    shared: bool = False
    """Keep the table in the compiled model, for all its requests: faster to warm up, but how fast one request runs then
    depends on the others' texts (what it returns does not)."""
    pairs: int = 65536
    """How many rows by two tokens are kept, the latest ones; by one token there are no more than tokens."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 64 or self.pairs < 1 or self.seed_vocabulary < 0:
            raise PlanError(
                "The options of recycling are out of range.",
                expected="k of 1 to 64, pairs of 1 or more and seed_vocabulary of 0 or more",
                found=f"k {self.k}, pairs {self.pairs}, seed_vocabulary {self.seed_vocabulary}",
                where="Recycle",
            )

    @property
    def observes(self) -> int:
        """`k`, see `Drafter.observes`."""
        return self.k

    @property
    def observes_prompt(self) -> bool:
        """`seed_prompt`, see `Drafter.observes_prompt`."""
        return self.seed_prompt

    def prepare(self, target: Target) -> None:
        """See `TableDrafter.prepare`: fills the seed table, unless the compiled model has it already."""
        count = min(self.seed_vocabulary, target.vocabulary)
        if count and self.seeds(target).shape != (count, self.k):
            target.shared[self.seeds_key] = np.asarray(target.best_after(range(count), self.k), np.int32)

    @property
    def seeds_key(self) -> str:
        """Under which the compiled model holds the seed table."""
        return f"recycle: the best {self.k} after each token alone"

    def seeds(self, target: Target) -> np.ndarray:
        """int32 [tokens, k], the target's best next tokens after each token alone; empty where that was not asked."""
        held = target.shared.get(self.seeds_key) if self.seed_vocabulary else None
        return held if isinstance(held, np.ndarray) else np.empty((0, self.k), np.int32)

    def table(self, context: Context, prompt_best: np.ndarray | None, target: Target) -> RecycleTable:
        """See `TableDrafter.table`."""
        known = Rows(self.pairs)
        if self.shared:
            held = target.shared.setdefault(repr(self), known)
            assert isinstance(held, Rows)
            known = held
        if prompt_best is not None:
            tokens = context.tokens[: len(prompt_best)]
            known.put(zip([tokens[0], *tokens], tokens, prompt_best.tolist(), strict=False))
        return RecycleTable(self.k, known, context.tokens, self.seeds(target))


class Rows:
    """The target's best next tokens, as they were last, by the last token and by the last two."""

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs
        self.after: dict[int, list[int]] = {}
        self.after_two: dict[Pair, list[int]] = {}

    def put(self, rows: Iterable[tuple[int, int, list[int]]]) -> None:
        """Take over (token before the last, last token, best next tokens), of several for the same the last one."""
        after, after_two = self.after, self.after_two
        for before, last, best in rows:
            after[last] = best
            # Deleting first makes the entry the youngest.
            after_two.pop((before, last), None)
            after_two[before, last] = best
        while len(after_two) > self.pairs:
            del after_two[next(iter(after_two))]


class RecycleTable(Table[Pair]):
    """The state of a place is its last two tokens.

    The class of a candidate is its rank in the row by two tokens, else in the row by one, else in the prompt, else
    among the seeds.
    """

    def __init__(self, k: int, known: Rows, prompt: Sequence[int], seeds: np.ndarray) -> None:
        self.k, self.known, self.seeds = k, known, seeds
        later = [_later(rank) for rank in range(1, k)]
        self.priors = [rate for first in (0.6, 0.35, 0.3, 0.16) for rate in (first, *later)]
        self.followers: dict[int, list[int]] = {}
        for last, token in pairwise(prompt):
            held = self.followers.setdefault(last, [])
            if token in held:
                held.remove(token)
            held.insert(0, token)
            del held[k:]

    def start(self, context: Context) -> Pair:
        """See `Table.start`."""
        return context.tokens[-2] if len(context.tokens) > 1 else context.tokens[-1], context.tokens[-1]

    def step(self, state: Pair, token: int) -> Pair:
        """See `Table.step`."""
        return state[1], token

    def candidates(self, state: Pair) -> Evidence:
        """See `Table.candidates`."""
        two, one, k = self.known.after_two.get(state), self.known.after.get(state[1]), self.k
        if one is None:
            found = list(zip(self.followers.get(state[1], ()), range(2 * k, 3 * k), strict=False))
            if state[1] < len(self.seeds):
                named = {token for token, _ in found}
                seeds = zip(self.seeds[state[1]].tolist(), range(3 * k, 4 * k), strict=True)
                found += [(token, kind) for token, kind in seeds if token not in named]
            return found
        if two is None:
            return list(zip(one, range(k, 2 * k), strict=False))
        return [*zip(two, range(k), strict=False), *((t, k + rank) for rank, t in enumerate(one) if t not in two)]

    def observe(self, context: Context, outcome: Outcome) -> None:
        """Take over the rows of the step; of a token that occurs several times the row on the accepted path wins."""
        if outcome.best is None:
            return
        best = outcome.best[:, : self.k].tolist()
        tokens, parents, path = outcome.tree.tokens, outcome.tree.parents, outcome.path
        place = len(context.tokens) - len(path) - 2
        root = context.tokens[place]
        rejected = set(range(len(tokens))).difference(path)
        rows = [(tokens[parents[i]] if parents[i] != ROOT else root, tokens[i], best[i + 1]) for i in rejected]
        rows.append((context.tokens[max(place - 1, 0)], root, best[0]))
        rows += [(context.tokens[place + depth], tokens[i], best[i + 1]) for depth, i in enumerate(path)]
        self.known.put(rows)


def _later(rank: int) -> float:
    return 0.24 / (rank + 1) ** 1.3
