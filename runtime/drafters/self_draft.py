"""SelfDraft: the target drafts for itself, changed by approximate passes, on its own weights and KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from graft.compiler.drafting import Context, Drafter, Drafting, DraftKind, Outcome, Target, TreePolicy
from graft.compiler.errors import PlanError
from graft.compiler.passing import Pass
from graft.passes.add_draft import AddDraft, check_changes
from graft.runtime.decoder import Rows
from graft.runtime.drafters.tables import TableDrafter
from graft.runtime.drafters.with_function import FunctionDrafting, drawn_kind
from graft.runtime.request import slot_of


@dataclass(frozen=True, init=False)
class SelfDraft(Drafter):
    """Approximate passes aimed at a copy of the target: `SelfDraft(EarlyExit(12), LayerParallel(4))`.

    The copy shares the target's weights and its KV cache. What the text's tokens left in the cache is what the target
    itself wrote, never what an approximation made of it: rows that were drafted lie behind the committed ones and are
    overwritten when the target verifies. So the recalibration that layer-parallel drafting asks for (EasySpec,
    2502.02493: one exact pass over the accepted tokens) comes for free. A chain runs every token once; where a tree
    branches, the nodes above a question run again with it.
    """

    changes: tuple[Pass, ...]
    """The passes, in order."""
    sample: bool = False
    """Draw from the draft's own distribution rather than take its best tokens, for verifiers that know of q."""
    candidates: int = 8
    """How many of its best tokens per place a tree may choose from, or draws."""
    function: str = "self_draft"
    """Name of the function; several drafts of one plan need names of their own."""
    replacement: bool = True
    """Whether the children of a node are drawn independently, with `sample`, or all different."""
    below: TableDrafter | None = None
    """What drafts for the draft: `Lookup`, `Recycle` or `Trie`. Chains (`Chain`, `ChainUntil`) then grow by several
    tokens a call of the function, and are the same chains (TriForce, 2404.11912)."""

    def __init__(
        self,
        *passes: Pass,
        changes: Sequence[Pass] = (),
        sample: bool = False,
        candidates: int = 8,
        function: str = "self_draft",
        replacement: bool = True,
        below: TableDrafter | None = None,
    ) -> None:
        given: dict[str, Any] = {
            "changes": (*passes, *changes), "sample": sample, "candidates": candidates,
            "function": function, "replacement": replacement, "below": below,
        }  # fmt: skip
        for name, value in given.items():
            object.__setattr__(self, name, value)
        check_changes(self.changes, "SelfDraft")
        if not 1 <= candidates <= 64:
            raise PlanError("candidates is out of range", expected="1 to 64", found=candidates, where="SelfDraft")
        if below is not None and not isinstance(below, TableDrafter):
            raise PlanError(
                "a draft is drafted for by what finds tokens in the text",
                expected="lookup, recycle or trie",
                found=type(below).__name__,
                where="SelfDraft.below",
            )

    @property
    def observes(self) -> int:
        """See `Drafter.observes`."""
        return 0 if self.below is None else self.below.observes

    @property
    def observes_prompt(self) -> bool:
        """See `Drafter.observes_prompt`."""
        return self.below is not None and self.below.observes_prompt

    @property
    def kind(self) -> DraftKind:
        """See `Drafter.kind`."""
        return drawn_kind(self.sample, self.replacement)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """See `Drafter.passes`."""
        return (AddDraft(self.changes, self.function),)

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        """See `Drafter.open`."""
        decoder = target.functions[self.function]
        below = None
        if self.below is not None:
            below = self.below.open(target, policy)
            below.key = f"below {self.function}, {below.key}"  # the plan may have the same drafter beside this one
        return SelfDrafting(decoder, policy, candidates=self.candidates, kind=self.kind, below=below)


class SelfDrafting(FunctionDrafting):
    """The `Drafting` of functions on the target's KV: its slots, and rows of its own behind the committed tokens."""

    def begin(self, context: Context, prompt_best: np.ndarray | None, prompt_hidden: Tensor | None = None) -> None:
        """See `Drafting.begin`."""
        if self.below is not None:
            self.below.begin(context, prompt_best, prompt_hidden)

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Drafting.observe`."""
        if self.below is not None:
            self.below.observe(context, outcome)

    def end(self, context: Context) -> None:
        """See `Drafting.end`; what an interrupted proposal left is forgotten."""
        if self.below is not None:
            self.below.end(context)
        self.decoder.close(slot_of(context))

    def slot(self, context: Context) -> int:
        """See `FunctionDrafting.slot`."""
        return slot_of(context)

    def catch_up(self, contexts: Sequence[Context]) -> list[Tensor]:
        """The cache lacks the last token of each text, which the target has not run either."""
        rows = Rows()
        for context in contexts:
            rows.add_chain(slot_of(context), context.tokens[-1:], len(context.tokens) - 1)
        logits = self.run(rows)
        for context in contexts:
            self.decoder.commit(slot_of(context), [0])
        return [logits[place : place + 1] for place in range(len(contexts))]

    def settle(self, context: Context) -> None:
        """Only the target's own rows stay."""
        self.decoder.truncate(slot_of(context), len(context.tokens) - 1)
