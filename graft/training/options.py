"""What a training run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from graft.compiler.errors import PlanError
from graft.passes.heads.config import Unembedding

Kind = Literal["hydra", "medusa", "kangaroo", "acceptance", "exit-classifier", "judge"]
"""Heads, Kangaroo's adapter, SpecDec++'s head for `LayerSkip`, a classifier for `ConfidenceExit`, or a head for
`LossyJudge`."""

RUN = 4
"""A judge's label: so many equal tokens in a row are a text come back to."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train_heads`; a run is resumed under the same ones alone."""

    kind: Kind = "hydra"
    heads: int = 4
    """Of an adapter: tokens of the chain that the figures are about."""
    layers: int = 1
    """Residual blocks of each head, or of an acceptance head."""
    vocabulary: int = 8192
    """Tokens that heads draft, the most frequent ones of the text; 0 for all."""
    unembedding: Unembedding = "target"
    """"target": the target's own, not trained and not stored; "shared": one of the heads', which starts as that."""
    prefix: bool = False
    """Hydra++: a decoder layer over the hidden states in front of the heads."""
    layer: int = 2
    """Kangaroo, acceptance heads and classifiers: how many layers are in front of the exit."""
    length: int = 256
    """Tokens of a sequence at most; longer texts are cut."""
    new_tokens: int = 256
    """Tokens that the target writes behind a prompt."""
    labels: int = 32
    """Tokens of the target's distribution that are kept at each position; a judge's are drawn from so many."""
    ahead: int = 16
    """Judge: a token may stand if the target comes back to the text within so many tokens."""
    batch: int = 2048
    """Tokens of a training step; of a judge the judged ones."""
    epochs: int = 10
    rate: float = 1e-3
    """Learning rate, reached after 5 % of all steps and falling to 10 % of itself as a cosine."""
    weight_decay: float = 0.1
    decay: float = 0.8
    """Weight of a head's loss by that of the one before it ([M] of the papers)."""
    held_out: float = 0.05
    """Part of the sequences that is measured on, and never trained on."""
    patience: int = 2
    """Measurements without progress after which the run ends; one is made after each epoch."""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.heads, self.layers, self.new_tokens, self.labels, self.batch, self.epochs, self.patience)
        right = min(counts) >= 1 and self.length > self.heads + 1 and 0 < self.held_out < 1 and self.vocabulary >= 0
        right &= self.unembedding in ("target", "shared") and self.rate > 0 and 0 < self.decay <= 1
        right &= self.ahead >= RUN
        right &= self.kind in get_args(Kind) and (self.kind == "hydra" or not self.prefix) and self.layer >= 1
        if not right:
            raise PlanError(
                "the options of training are not right",
                expected="counts of 1 or more, sequences longer than the heads reach, held_out between 0 and 1, "
                "an unembedding that is the target's or shared, a prefix layer for hydra alone, "
                f"layers in front of an exit, ahead {RUN} or more",
                found=self,
                where="TrainOptions",
            )
