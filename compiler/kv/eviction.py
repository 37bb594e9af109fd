"""Which far tokens are given up when the cut moves: a score for every token and kv head, and a budget.

A policy is a score; everything else is shared. Tokens of the tail are never given up, positions stay what they were.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graft.compiler.errors import PlanError

QUERIES = 256
"""Queries that `attention_mass` looks at together."""


@dataclass
class Cached:
    """One sequence's committed tokens at a trigger, those of one layer.

    n entries for each kv head: the far ones that are left, then the tail. `valid` says which entries exist, since heads
    may keep different numbers.
    """

    keys: Tensor
    """float [kv heads, n, key dim]."""
    values: Tensor
    """float [kv heads, n, value dim]."""
    positions: Tensor
    """int64 [kv heads, n]: where the tokens stand in their text."""
    valid: Tensor
    """bool [kv heads, n]."""
    before: Tensor
    """float [kv heads, n]: what the policy's `score` was at the trigger before; 0 of tokens that came since."""
    queries: Tensor
    """float [kv heads, group, w, key dim]: the queries since the trigger before, where the policy reads them."""
    query_positions: Tensor
    """int64 [w]."""
    scale: float
    """What attention multiplies scores with."""


@dataclass(frozen=True)
class Eviction(ABC):
    """What is given up. Subclass it, make the subclass a frozen dataclass, and plans can name it."""

    ratio: float = 0.5
    """Share of a text's tokens that are kept, the tail among them."""
    tokens: int = 0
    """So many tokens are kept, in the place of a share of them."""
    sinks: int = 4
    """Tokens at the start of a text that stay."""
    latest: float = 0.0
    """Share of what is kept in front of the cut that the latest tokens there have, whatever their score."""
    heads: Literal["same", "adaptive"] = "same"
    """Whether every kv head of a layer keeps as many, or those with the larger scores more (AdaKV, 2407.11550)."""
    floor: float = 0.2
    """Share of its budget that a head keeps for itself where heads are adaptive."""

    once: ClassVar[bool] = False
    """Whether tokens are given up at the end of the prompt alone."""
    reads_queries: ClassVar[bool] = False
    """Whether `score` looks at queries, which the cache then keeps beside the tail's keys."""

    def __post_init__(self) -> None:
        shares = min(self.floor, self.latest), max(self.floor, self.latest)
        if not 0 < self.ratio <= 1 or min(self.tokens, self.sinks) < 0 or shares[0] < 0 or shares[1] > 1:
            raise PlanError(
                "eviction has options that there are not",
                expected="ratio in (0, 1], tokens and sinks of 0 or more, floor and latest in [0, 1]",
                found=self,
            )

    @abstractmethod
    def score(self, cached: Cached) -> Tensor:
        """float [kv heads, n]: how much every entry is worth keeping."""

    def budget(self, length: int, cut: int) -> int:
        """Entries that a kv head keeps in front of the cut, of a text of so many tokens."""
        total = self.tokens or int(self.ratio * length)
        return min(cut, max(self.sinks, total - (length - cut)))

    def keep(self, scores: Tensor, candidates: Tensor, positions: Tensor, budget: int) -> Tensor:
        """bool [kv heads, n]: which of the candidates stay, scores being those of one layer; of equals the first."""
        latest = best(positions.masked_fill(~candidates, -1), int(self.latest * budget))
        forced = candidates & (latest | (positions < self.sinks))
        order = scores.masked_fill(~candidates, -torch.inf).masked_fill(forced, torch.inf)
        if self.heads == "same":
            return candidates & best(order, budget)
        own = best(order, int(self.floor * budget)) & candidates
        flat = order.masked_fill(own, torch.inf).flatten()[None]
        return candidates & best(flat, budget * len(scores)).view_as(candidates)


def best(scores: Tensor, count: int) -> Tensor:
    """bool like scores [rows, n]: the `count` largest of each row; of equals the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def attention_mass(cached: Cached, rows: int | None = None, mean: bool = False) -> Tensor:
    """float [kv heads, n]: what the queries' softmax weights add up to at every entry, averaged over the group.

    Of the last `rows` queries, or of all; `mean` divides by the number of queries that see the entry.
    """
    first = 0 if rows is None else max(0, cached.queries.shape[2] - rows)
    total, seen = torch.zeros_like(cached.before), torch.zeros_like(cached.before)
    for start in range(first, cached.queries.shape[2], QUERIES):
        queries, at = (cached.queries[:, :, start : start + QUERIES], cached.query_positions[start : start + QUERIES])
        reached = int((cached.positions <= at[-1]).sum(-1).max())  # entries stand in the order of their positions
        before = cached.positions[:, None, :reached] <= at[None, :, None]
        visible = cached.valid[:, None, :reached] & before
        scores = torch.einsum("hgwd,hnd->hgwn", queries, cached.keys[:, :reached]).mul_(cached.scale)
        weights = scores.masked_fill_(~visible[:, None], -torch.inf).softmax(-1)
        total[:, :reached] += weights.sum((1, 2)) / queries.shape[1]
        seen[:, :reached] += visible.sum(1)
    return total / seen.clamp(min=1) if mean else total


@dataclass(frozen=True)
class StreamingLLM(Eviction):
    """The first tokens and the latest ones (StreamingLLM, 2309.17453; LM-Infinite's mask, 2308.16137), with the
    positions that tokens had."""

    def score(self, cached: Cached) -> Tensor:
        """See `Eviction.score`."""
        return cached.positions.to(cached.before.dtype)


@dataclass(frozen=True)
class H2O(Eviction):
    """The tokens that received most attention so far, and the latest ones (H2O, 2306.14048).

    The paper sums the weights of all queries, which favours early tokens, and gives the latest ones half of the budget;
    with `mean` each trigger adds the mean over the queries that saw the token. Of a group of query heads the mean
    counts, which is our choice.
    """

    latest: float = 0.5
    mean: bool = False

    reads_queries: ClassVar[bool] = True

    def score(self, cached: Cached) -> Tensor:
        """See `Eviction.score`."""
        return cached.before + attention_mass(cached, mean=self.mean)


@dataclass(frozen=True)
class SnapKV(Eviction):
    """The prompt's tokens that its last queries look at, and their neighbours (SnapKV, 2404.14469).

    The weights of the last `window` queries are added up, averaged over the group, and smoothed by the largest of
    `kernel` neighbours. Decoded tokens are all kept.
    """

    window: int = 32
    kernel: int = 7

    once: ClassVar[bool] = True
    reads_queries: ClassVar[bool] = True

    def score(self, cached: Cached) -> Tensor:
        """See `Eviction.score`."""
        mass = attention_mass(cached, rows=self.window)
        pooled = torch.nn.functional.max_pool1d(mass[None], self.kernel, stride=1, padding=self.kernel // 2)
        return pooled[0, :, : mass.shape[-1]]


@dataclass(frozen=True)
class TOVA(Eviction):
    """The tokens that the latest query looks at (TOVA, 2401.06104)."""

    reads_queries: ClassVar[bool] = True

    def score(self, cached: Cached) -> Tensor:
        """See `Eviction.score`."""
        return attention_mass(cached, rows=1)


@dataclass(frozen=True)
class KeyNorm(Eviction):
    """The tokens whose keys are short (2406.11430), which attention tends to prefer."""

    def score(self, cached: Cached) -> Tensor:
        """See `Eviction.score`."""
        return -cached.keys.norm(dim=-1)


@dataclass(frozen=True)
class KeyDifference(Eviction):
    """The tokens whose keys are least like the mean of all keys (KeyDiff, 2504.15364)."""

    def score(self, cached: Cached) -> Tensor:
        """See `Eviction.score`."""
        directions = torch.nn.functional.normalize(cached.keys, dim=-1)
        counted = directions * cached.valid.unsqueeze(-1)
        mean = counted.sum(-2, keepdim=True) / cached.valid.sum(-1)[:, None, None].clamp(min=1)
        return -torch.nn.functional.cosine_similarity(directions, mean, dim=-1)


@dataclass(frozen=True)
class RandomEviction(Eviction):
    """Any tokens: what every other policy has to beat."""

    seed: int = 0

    def score(self, cached: Cached) -> Tensor:
        """See `Eviction.score`; the same numbers for a token whenever it is asked."""
        # A hash of the position, so that neither the order of triggers nor the device matters (splitmix64's finaliser,
        # in 32 bits).
        mixed = (cached.positions + 0x9E3779B1 * (self.seed + 1)) & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
        return (mixed ^ (mixed >> 16)).to(cached.before.dtype)
