"""DraftModel: another compiled model with the same vocabulary drafts, in KV slots of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from graft.compiler.drafting import Context, Drafter, Drafting, DraftKind, Outcome, Target, TreePolicy
from graft.compiler.errors import PlanError
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.drafters.with_function import FunctionDrafting, drawn_kind

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

    Deterministic by default: its best tokens, in any tree. With `sample` it draws from its own distribution, after the
    same logits processors as the target's: a chain for verifier Leviathan, trees for RecursiveRejection or KSeq. A
    processor that keeps state between calls then sees drafted tokens too. What it drafts is dropped after each step and
    what was accepted is run again with the next step's first call, which has rows to spare; so its cache never holds
    anything but committed text.
    """

    other: Compiled = field(repr=False, hash=False)
    """The compiled model that drafts."""
    sample: bool = False
    candidates: int = 8
    """How many of its best tokens per place a tree may choose from, or draws."""
    function: str = ""
    """Name of a function that `other` drafts for itself with (`SelfDraft.function`), to grow the draft with; empty: the
    model itself. Tokens behind the first then come from an approximation, layers in parallel for instance, and accepted
    ones run through the model as it is, whose KV replaces the approximation's (EasySpec, 2502.02493)."""
    replacement: bool = True
    """Whether the children of a node are drawn independently, with `sample`, or all different."""

    def __post_init__(self) -> None:
        if not 1 <= self.candidates <= 64:
            raise PlanError("candidates is out of range", expected="1 to 64", found=self.candidates, where="DraftModel")

    @property
    def kind(self) -> DraftKind:
        """See `Drafter.kind`."""
        return drawn_kind(self.sample, self.replacement)

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        """See `Drafter.open`; raises PlanError if the vocabularies differ."""
        decoder = self.other.decoder
        if decoder.vocabulary != target.vocabulary:
            raise PlanError(
                "a draft model must have the target's vocabulary",
                expected=f"{target.vocabulary} tokens, as the target",
                found=f"{decoder.vocabulary} tokens",
                where="DraftModel",
                remedy="use a smaller model of the same family",
            )
        if self.function and not isinstance(decoder.functions.get(self.function), Decoder):
            raise PlanError(
                "the draft model has no such function",
                expected=", ".join(decoder.functions) or "a model that was compiled with a SelfDraft",
                found=self.function,
                where="DraftModel.function",
            )
        if isinstance(target, Decoder):
            decoder.share_threads(target)
        return ModelDrafting(self, decoder, policy)


@dataclass
class Held:
    """What a request holds of the draft model."""

    slot: int
    root: Tensor | None = None
    """Logits [1, vocabulary] after the last token that was run."""


class ModelDrafting(FunctionDrafting):
    """The `Drafting` of a `DraftModel`."""

    def __init__(self, spec: DraftModel, decoder: Decoder, policy: TreePolicy) -> None:
        growing = decoder.functions[spec.function] if spec.function else decoder
        super().__init__(growing, policy, candidates=spec.candidates, kind=spec.kind)
        self.exact = decoder
        self.key = f"draft model {id(self)}"

    def begin(self, context: Context, prompt_best: np.ndarray | None, prompt_hidden: Tensor | None = None) -> None:
        """See `Drafting.begin`; the prompt is run with the first proposal."""
        context.data[self.key] = Held(self.exact.open())

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Drafting.observe`; accepted tokens are run with the next proposal."""

    def end(self, context: Context) -> None:
        """See `Drafting.end`."""
        held = context.data.pop(self.key, None)
        if isinstance(held, Held):
            if self.decoder is not self.exact:
                self.decoder.close(held.slot)
            self.exact.close(held.slot)

    def held(self, context: Context) -> Held:
        """The request's slot, and the logits to grow its next tree from."""
        held = context.data[self.key]
        assert isinstance(held, Held)
        return held

    def slot(self, context: Context) -> int:
        """See `FunctionDrafting.slot`."""
        return self.held(context).slot

    def settle(self, context: Context) -> None:
        """What was drafted is dropped; what is accepted of it runs again with the next proposal's first call."""
        self.decoder.truncate(self.slot(context), len(context.tokens))

    def catch_up(self, contexts: Sequence[Context]) -> list[Tensor]:
        """Run what the cache lacks of each text; logits [1, vocabulary] after the last token of each."""
        held = [self.held(context) for context in contexts]
        while True:
            rows, left, chunks = Rows(), PROMPT_ROWS, []
            for context, one in zip(contexts, held, strict=True):
                fed = self.exact.length(one.slot)
                ahead = self.exact.room(one.slot)
                chunk = context.tokens[fed : fed + (left if ahead is None else min(left, ahead))]
                if chunk:
                    rows.add_chain(one.slot, chunk, fed)
                    chunks.append((one, len(chunk)))
                    left -= len(chunk)
            if not chunks:
                return [one.root for one in held if one.root is not None]
            logits = self.exact.forward(rows)
            for place, (one, count) in enumerate(chunks):
                self.exact.commit(one.slot, range(count))
                one.root = logits[place : place + 1]
