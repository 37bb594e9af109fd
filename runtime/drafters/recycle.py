"""Recycle: the target's best tokens after a token, when it was last seen, as candidates for what follows it now."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graft.compiler.drafting import Context, Outcome, Target
from graft.compiler.errors import PlanError
from graft.runtime.drafters.tables import Evidence, Table, TableDrafter

_RATES = (0.42, 0.12, 0.06, 0.04, 0.025, 0.02, 0.015, 0.01)


@dataclass(frozen=True)
class Recycle(TableDrafter):
    """Token Recycling (2408.08696): a table from token to the target's `k` best next tokens.

    Every row of a verification step updates it, accepted or not, so that what was computed and rejected still counts.
    `seed_prompt` fills it from the prompt before the first step, for which the prefill has to compute logits at every
    prompt position; the prefill time contains that. A token that was never seen proposes nothing.
    """

    k: int = 8
    seed_prompt: bool = False
    shared: bool = False
    """Keep the table in the compiled model, for all its requests: faster to warm up, but how fast one request runs then
    depends on the others' texts (what it returns does not)."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 64:
            raise PlanError("Recycle's k is out of range.", expected="1 to 64", found=self.k, where="Recycle.k")

    @property
    def observes(self) -> int:
        """`k`, see `Drafter.observes`."""
        return self.k

    @property
    def observes_prompt(self) -> bool:
        """`seed_prompt`, see `Drafter.observes_prompt`."""
        return self.seed_prompt

    def table(self, context: Context, prompt_best: np.ndarray | None, target: Target) -> RecycleTable:
        """See `TableDrafter.table`."""
        rows: dict[int, list[int]] = {}
        if self.shared:
            # One entry for each token of the vocabulary at most, so a table that outlives its requests is bounded too.
            held = target.shared.setdefault(repr(self), rows)
            assert isinstance(held, dict)
            rows = held
        if prompt_best is not None:
            rows.update(zip(context.tokens[: len(prompt_best)], prompt_best.tolist(), strict=True))
        return RecycleTable(self.k, rows)


class RecycleTable(Table[int]):
    """Token -> its best next tokens. The state of a place is its last token; the classes of evidence are the ranks."""

    def __init__(self, k: int, rows: dict[int, list[int]]) -> None:
        self.priors = [_RATES[min(rank, len(_RATES) - 1)] for rank in range(k)]
        self.rows = rows

    def start(self, context: Context) -> int:
        """See `Table.start`."""
        return context.tokens[-1]

    def step(self, state: int, token: int) -> int:
        """See `Table.step`."""
        return token

    def candidates(self, state: int) -> Evidence:
        """See `Table.candidates`."""
        row = self.rows.get(state)
        return [(token, rank) for rank, token in enumerate(row)] if row is not None else []

    def observe(self, context: Context, outcome: Outcome) -> None:
        """Take over the rows of the step; of a token that occurs several times the row on the accepted path wins."""
        if outcome.best is None:
            return
        best = outcome.best[:, : len(self.priors)].tolist()
        tokens = outcome.tree.tokens
        root = context.tokens[-len(outcome.path) - 2]
        rows = self.rows
        for token, row in zip(tokens, best[1:], strict=True):
            rows[token] = row
        rows[root] = best[0]
        for node in outcome.path:
            rows[tokens[node]] = best[node + 1]
