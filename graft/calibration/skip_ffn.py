"""Options of skip-ffn for a share of feed-forwards to skip, with what each costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from graft.calibration.measuring import Progress, changed, given, next_token_loss, shown, table_text, tidy
from graft.calibration.stored import fingerprint, read, write
from graft.compiler.canonical import aten
from graft.compiler.errors import PlanError
from graft.compiler.evaluate import Sequences, divergence, logits_of
from graft.compiler.nodes import Value
from graft.compiler.program import Function
from graft.compiler.trunk import find_trunk
from graft.passes.skip_ffn import SkipFFN, cosine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STORED = "skip-ffn"
COLD = 5.0
"""A feed-forward at an end is cold if its mean cosine lies further below the median of all than so many times the
median of their distances from it."""
SEARCHED = 24
"""Bisections of the similarity; cosines are of float32."""


@dataclass(frozen=True)
class Proposal:
    """One way to skip, over the texts."""

    change: SkipFFN
    skipped: float
    """Share of all feed-forwards of all tokens that were skipped."""
    kl: float
    """Mean KL divergence of the whole model from it, nats a token."""
    nll: float
    """Mean negative log-likelihood of the texts' tokens, nats."""


@dataclass(frozen=True)
class SkipCalibration:
    """What skipping costs."""

    cosines: tuple[float, ...]
    """Of each feed-forward the mean cosine between the stream before and behind it."""
    proposals: tuple[Proposal, ...]
    """As they were asked for."""
    nll: float
    """Of the whole model."""
    tokens: int
    """Of the texts."""
    model: dict[str, Any]
    """Which model it is of (calibration.stored.fingerprint)."""

    def best(self, kl: float) -> SkipFFN | None:
        """What skips most at no more than this divergence; None where nothing does."""
        within = [one for one in self.proposals if one.kl <= kl]
        return max(within, key=lambda one: one.skipped).change if within else None

    def save(self, path: str | Path) -> None:
        """Write it as JSON. Raises CheckpointError where that cannot be done."""
        write(path, STORED, self.model, {name: value for name, value in asdict(self).items() if name != "model"})

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> SkipCalibration:
        """What `save` wrote. Raises CheckpointError for a file that is damaged or something else, and, given a model,
        for a calibration of another one."""
        known, data = read(path, STORED, model)
        proposals = tuple(Proposal(**{**one, "change": SkipFFN(**one["change"])}) for one in data["proposals"])
        return cls(tuple(data["cosines"]), proposals, data["nll"], data["tokens"], known)

    def __str__(self) -> str:
        numbers = ("skipped", "KL", "NLL", "similarity", "skip", "cold_first", "cold_last")
        table = Table(*numbers, box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_row("0", "0", f"{self.nll:.3f}", "", "", "", "")
        for one in self.proposals:
            change = one.change
            options = f"{change.similarity:.6g}", str(change.skip), str(change.cold_first), str(change.cold_last)
            table.add_row(f"{one.skipped:.1%}", f"{one.kl:.4f}", f"{one.nll:.3f}", *options)
        return table_text(table)


def calibrate_skip_ffn(
    model: PreTrainedModel,
    texts: Iterable[Sequence[int]],
    *,
    rates: Sequence[float] = (0.05, 0.1, 0.25),
    skip: int = 1,
    cold: tuple[int, int] | None = None,
    warmup: int = 4,
    progress: Progress | None = None,
) -> SkipCalibration:
    """For each of `rates`, a share of all feed-forwards, `SkipFFN` with the similarity that comes nearest to it on the
    token ids of some texts, and what that costs there against the whole model.

    `cold` are how many feed-forwards at both ends never skip; None for those that change the stream much more than the
    others do (FFN-SkipLLM, 2404.03865, finds its cold regions by the same cosines; the bound is ours). The similarity
    is found on the whole model's cosines; the share that is told was counted with the skipping at work.

    Raises PlanError for texts without tokens and rates that are none, PassError where too few feed-forwards are left.
    """
    say = progress or (lambda _: None)
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise PlanError("rates are shares of feed-forwards to skip", expected="numbers between 0 and 1", found=rates)
    function, sequences = tidy(model), given(texts)
    say("cosines")
    alike = cosines(function, sequences)
    first, last = cold_ends([float(one) for one in alike.mean(1)]) if cold is None else cold
    wanted, late = logits_of(function, sequences), places(sequences) >= warmup
    proposals = []
    for rate in rates:
        similarity = similarity_for(alike, late, rate, skip, first, last)
        change = SkipFFN(similarity, skip, first, last, warmup)
        say(f"{rate:.1%}: similarity {similarity:.6g}")
        logits, skipped = run_skipping(changed(function, [change]), sequences)
        figures = divergence(wanted, logits), next_token_loss(logits, sequences)
        proposals.append(Proposal(change, skipped / alike.numel(), *figures))
    means, nll = tuple(round(float(one), 6) for one in alike.mean(1)), next_token_loss(wanted, sequences)
    return SkipCalibration(means, tuple(proposals), nll, alike.shape[1], fingerprint(model))


def cosines(function: Function, sequences: Sequences) -> Tensor:
    """float32 [feed-forwards, tokens]: how alike the stream is before and behind each."""
    own = function.copy()
    blocks = find_trunk(own.graph).feed_forward
    values = [cosine(Value(block.stream), Value(block.residual)).node for block in blocks]
    return torch.stack([value[..., 0] for value in shown(own, values, sequences)[1]])


def run_skipping(function: Function, sequences: Sequences) -> tuple[list[Tensor], int]:
    """The logits of a function behind skip-ffn, and how many feed-forwards of tokens it skipped."""
    terms = [block.output.node for block in find_trunk(function.graph).feed_forward]
    masks = [term.args[1] for term in terms if term.target is aten.masked_fill.Scalar]
    logits, skips = shown(function, masks, sequences)
    return logits, sum(int(one.sum()) for one in skips)


def places(sequences: Sequences) -> Tensor:
    """int64 [tokens]: where each token stands in its text."""
    return torch.cat([torch.arange(len(tokens)) for tokens in sequences])


def cold_ends(means: Sequence[float]) -> tuple[int, int]:
    """How many feed-forwards at the beginning and at the end change the stream much more than most do."""
    middle = median(means)
    spread = median(abs(one - middle) for one in means)
    cold = [one < middle - COLD * spread for one in means]
    first = next((at for at, one in enumerate(cold) if not one), 0)
    return first, next((at for at, one in enumerate(reversed(cold)) if not one), 0)


def similarity_for(alike: Tensor, late: Tensor, rate: float, skip: int, first: int, last: int) -> float:
    """The similarity at which the latch, run over the whole model's cosines [feed-forwards, tokens], skips a share of
    all of them that is nearest to `rate`; only tokens that are `late` skip."""
    hot = alike[first : alike.shape[0] - last]
    low, high = float(hot.min()) if hot.numel() else 0.0, 1.0
    wanted = rate * alike.numel()
    for _ in range(SEARCHED):
        middle = (low + high) / 2
        low, high = (low, middle) if latched(hot, late, middle, skip) < wanted else (middle, high)
    return min((low, high), key=lambda one: abs(latched(hot, late, one, skip) - wanted))


def latched(hot: Tensor, late: Tensor, similarity: float, skip: int) -> int:
    """How many feed-forwards the latch of skip-ffn skips, if what is skipped changed no cosine."""
    left, count = torch.zeros(hot.shape[1], dtype=torch.int64), 0
    for alike in hot[:-1]:
        fresh = (left == 0) & (alike >= similarity) & late
        left = torch.where(fresh, skip, (left - 1).clamp(min=0))
        count += int((left > 0).sum())
    return count
