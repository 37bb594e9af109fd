"""What two sets of logits differ by, token for token, and how sure a mean of that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 16
"""Consecutive tokens that a resample takes together, since neighbours are alike."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Six digits of each."""
        return {"mean": float(f"{self.mean:.6g}"), "low": float(f"{self.low:.6g}"), "high": float(f"{self.high:.6g}")}


@dataclass
class PerToken:
    """Figures of some consecutive tokens: float64 [tokens] each."""

    kl: np.ndarray
    """KL(full || arm) in nats."""
    same: np.ndarray
    """1 where both have the same best token."""
    nll: np.ndarray
    """-log p(the token that follows in the text), in nats, of the arm."""


def compared(full: Tensor, arm: Tensor, targets: Tensor) -> PerToken:
    """Of logits [tokens, vocabulary] of the full cache and of an arm, and int64 [tokens]: what follows in the text."""
    before, after = full.float().log_softmax(-1), arm.float().log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1, dtype=torch.float64)
    same = before.argmax(-1) == after.argmax(-1)
    nll = -after.gather(-1, targets[:, None])[:, 0]
    return PerToken(*(one.double().cpu().numpy() for one in (kl.clamp(min=0.0), same, nll)))


def joined(parts: list[PerToken]) -> PerToken:
    """One behind the other."""
    columns = ([one.kl for one in parts], [one.same for one in parts], [one.nll for one in parts])
    return PerToken(*(np.concatenate(column) for column in columns))


class Bootstrap:
    """Resamples of documents and, inside them, of blocks of 16 consecutive tokens: the same ones for whatever is asked,
    so that the difference of two arms is paired by document and token."""

    def __init__(self, documents: int, tokens: int, resamples: int = 1000, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        blocks = -(-tokens // BLOCK)
        starts = generator.integers(tokens, size=(resamples, documents, blocks, 1))
        places = ((starts + np.arange(BLOCK)) % tokens).reshape(resamples, documents, -1)
        self.tokens = places[..., :tokens]
        self.documents = generator.integers(documents, size=(resamples, documents, 1))

    def interval(self, values: np.ndarray) -> Interval:
        """Of the mean of [documents, tokens]: the percentiles 2.5 and 97.5 of the resamples' means."""
        means = values[self.documents, self.tokens].mean(axis=(1, 2))
        low, high = np.percentile(means, (2.5, 97.5))
        return Interval(float(values.mean()), float(low), float(high))
