"""Recycle: what the target held for the best next tokens when it last stood here, as candidates for now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import pairwise

import numpy as np

from graft.compiler.drafting import ROOT, Context, Outcome, Target
from graft.compiler.errors import PlanError
from graft.runtime.drafters.tables import Evidence, Table, TableDrafter

Pair = tuple[int, int]
ANY = -1
"""In the place of the token before the last: whatever it is."""


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
    of which nothing better is known. A token alone is no text: `seed_text` has the model write so many tokens by itself
    at that time, and what it held for the best after these is asked where the request itself shows nothing. Neither
    depends on any request, and `save` keeps both.
    """

    k: int = 8
    seed_prompt: bool = False
    seed_vocabulary: int = 0
    seed_text: int = 0
    shared: bool = False
    """Keep the table in the compiled model, for all its requests: faster to warm up, but how fast one request runs then
    depends on the others' texts (what it returns does not)."""
    pairs: int = 65536
    """How many rows by two tokens are kept, the latest ones; by one token there are no more than tokens."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 64 or self.pairs < 1 or min(self.seed_vocabulary, self.seed_text) < 0:
            raise PlanError(
                "The options of recycling are out of range.",
                expected="k of 1 to 64, pairs of 1 or more, seed_vocabulary and seed_text of 0 or more",
                found=self,
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
        """See `TableDrafter.prepare`: fills the seed tables, unless the compiled model has them already."""
        count = min(self.seed_vocabulary, target.vocabulary)
        if count and self.seeds(target).shape != (count, self.k):
            target.shared[self.seeds_key] = np.asarray(target.best_after(range(count), self.k), np.int32)
        if self.seed_text and self.text_key not in target.shared:
            target.shared[self.text_key] = rows_of(*target.own_text(self.seed_text, self.k), self.k)

    @property
    def seeds_key(self) -> str:
        """Under which the compiled model holds the seed table."""
        return f"recycle: the best {self.k} after each token alone"

    def seeds(self, target: Target) -> np.ndarray:
        """int32 [tokens, k], the target's best next tokens after each token alone; empty where that was not asked."""
        held = target.shared.get(self.seeds_key) if self.seed_vocabulary else None
        return held if isinstance(held, np.ndarray) else np.empty((0, self.k), np.int32)

    @property
    def text_key(self) -> str:
        """Under which the compiled model holds the rows of its own text."""
        return f"recycle: the best {self.k} in {self.seed_text} tokens of the model's own text"

    def written(self, target: Target) -> Mapping[Pair, list[int]]:
        """(Token before the last or ANY, last token) -> the target's best next tokens, in its own text."""
        held = target.shared.get(self.text_key) if self.seed_text else None
        if not isinstance(held, np.ndarray):
            return {}
        rows = target.shared.get(f"{self.text_key}, by tokens")
        if not isinstance(rows, dict):
            rows = {(before, last): best for before, last, *best in held.tolist()}
            target.shared[f"{self.text_key}, by tokens"] = rows
        return rows

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
        return RecycleTable(self.k, known, context.tokens, self.seeds(target), self.written(target))


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

    The class of a candidate is where it is named first, and its rank among what is named there first: the row by two
    tokens, that in the model's own text, the row by one, that in the model's own text, the prompt, the seeds.
    """

    def __init__(
        self, k: int, known: Rows, prompt: Sequence[int], seeds: np.ndarray, written: Mapping[Pair, list[int]]
    ) -> None:
        self.k, self.known, self.seeds, self.written = k, known, seeds, written
        later = [_later(rank) for rank in range(1, k)]
        self.priors = [rate for first in _FIRST for rate in (first, *later)]
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
        last, k, known, written = state[1], self.k, self.known, self.written
        two = known.after_two.get(state)
        found = {} if two is None else dict(zip(two, range(k), strict=False))
        rows = (written.get(state), known.after.get(last), written.get((ANY, last)), self.followers.get(last))
        for source, row in enumerate(rows, 1):
            if row is not None:
                _name(found, row, source * k)
                # Beside what was seen after these two tokens there is always a second row.
                if len(found) >= k:
                    return found
        if last < len(self.seeds):
            _name(found, self.seeds[last].tolist(), 5 * k)
        return found

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


_FIRST = (0.6, 0.3, 0.35, 0.2, 0.3, 0.16)
"""How often the first one named is right, by where that is."""


def _later(rank: int) -> float:
    return 0.24 / (rank + 1) ** 1.3


def _name(found: Evidence, row: Iterable[int], kind: int) -> None:
    """Add the tokens that were not named yet, one class after another from `kind` on."""
    for token in row:
        if token not in found:
            found[token] = kind
            kind += 1


def rows_of(texts: np.ndarray, best: np.ndarray, k: int) -> np.ndarray:
    """What texts [texts, length] with the best next tokens [texts, length, k] at every place say: int32 [rows, 2 + k].

    A row is the token before the last or ANY, the last one, and the `k` best next tokens over all places where these
    stand; one of rank r counts 1 / (r + 1) at a place.
    """
    votes: dict[Pair, dict[int, float]] = {}
    for text, rows in zip(texts.tolist(), best.tolist(), strict=True):
        for before, last, row in zip([ANY, *text], text, rows, strict=False):
            for key in dict.fromkeys(((ANY, last), (before, last))):
                held = votes.setdefault(key, {})
                for rank, token in enumerate(row, 1):
                    held[token] = held.get(token, 0.0) + 1 / rank
    found = [[*key, *nlargest(k, held, key=held.__getitem__)] for key, held in votes.items()]
    return np.asarray(found, np.int32)
