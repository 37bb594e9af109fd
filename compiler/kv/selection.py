"""Which of the far tokens a row reads: labels kept beside the pages, scored by the row's own query.

Nothing is destroyed, so every row chooses for itself and no row's result depends on another's. The far tokens of a kv
head are taken in units of some consecutive ones; every unit has a label, a vector in the model's dtype, and the units
whose labels promise the largest scores are read, for all query heads of the group together (the largest over the group
was the best of three rules on SmolLM2: KL 0.0088 against 0.0110 and 0.0126).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graft.compiler.errors import PlanError
from graft.compiler.kv.codecs import PAGE


@dataclass(frozen=True)
class Selection(ABC):
    """How far tokens are chosen. Subclass it, make the subclass a frozen dataclass, and plans can name it."""

    ratio: float = 0.125
    """Share of the far tokens that a row reads."""
    least: int = 64
    """So many far tokens at least, where there are as many."""
    dense_layers: int = 2
    """So many attention layers in front read everything."""
    sinks: int = 4
    """Tokens at the start of a text whose units are read whatever their labels promise: much of a head's attention goes
    there (2309.17453), and a label that stands for several tokens may not show it."""

    calibrates: ClassVar[bool] = False
    """Whether labels are made of a few channels, which are chosen for every sequence when its first page is made."""
    bounds: ClassVar[bool] = False
    """Whether a label is the largest of every channel and then the smallest, rather than one vector."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1 or self.least < 1 or min(self.dense_layers, self.sinks) < 0 or PAGE % self.size:
            raise PlanError(
                "a selection has options that there are not",
                expected="ratio in (0, 1], least of 1 or more, sinks of 0 or more, a unit that divides 64",
                found=self,
            )

    @property
    @abstractmethod
    def size(self) -> int:
        """Tokens of a unit."""

    @abstractmethod
    def width(self, key_dim: int) -> int:
        """Numbers in a label."""

    @abstractmethod
    def labels(self, keys: Tensor, channels: Tensor) -> Tensor:
        """[..., 64 / size, width] of keys [..., 64, key dim]; `channels` int64 [..., width] where it calibrates."""

    def label_bytes(self, key_dim: int, dtype: torch.dtype) -> int:
        """Bytes of the labels of a page."""
        return PAGE // self.size * self.width(key_dim) * dtype.itemsize

    def units(self, count: int) -> int:
        """How many units a row reads of those that `count` far tokens make."""
        there = -(-count // self.size)
        return min(there, max(-(-self.least // self.size), -(-int(there * self.ratio * 2**20) // 2**20)))

    @property
    def first(self) -> int:
        """How many units hold the sinks."""
        return -(-self.sinks // self.size)

    def scores(self, queries: Tensor, labels: Tensor, channels: Tensor) -> Tensor:
        """float [kv heads, rows, units]: what the units promise; queries [kv heads, group, rows, key dim], labels [kv
        heads, units, width], channels [kv heads, width] where it calibrates."""
        if self.calibrates:
            index = channels[:, None, None, :].long().expand(*queries.shape[:3], -1)
            queries = queries.gather(-1, index)
        if not self.bounds:
            return torch.einsum("hgrd,hud->hgru", queries, labels).amax(1)
        most, least = labels.chunk(2, dim=-1)
        above = torch.einsum("hgrd,hud->hgru", queries.clamp(min=0), most)
        return (above + torch.einsum("hgrd,hud->hgru", queries.clamp(max=0), least)).amax(1)

    def chosen(self, queries: Tensor, labels: Tensor, channels: Tensor, count: int) -> Tensor:
        """bool [kv heads, rows, count]: the far tokens that rows read; of equal units the first."""
        found = self.scores(queries, labels, channels)[..., : -(-count // self.size)].clone()
        found[..., : self.first] = torch.inf
        order = found.argsort(dim=-1, descending=True, stable=True)[..., : self.units(count)]
        read = torch.zeros_like(found, dtype=torch.bool).scatter(-1, order, True)
        return read.repeat_interleave(self.size, dim=-1)[..., :count]


@dataclass(frozen=True)
class DoubleSparsity(Selection):
    """Single tokens by a few channels of their keys (Double Sparsity, 2408.07092).

    The paper calibrates channels offline, by queries, keys or both; here they are those with the largest mean|k| * std
    k over the sequence's first tail, for every layer and kv head: channels that count in every score and tell tokens
    apart, for which the cache need not keep queries. On SmolLM2, an eighth of 4,096 tokens, that is better than mean|k|
    (KL 0.0081 against 0.0094, 16 of 16 passkeys against 13) and than std k alone (0.32); on 2,048 tokens mean|k| was
    better than mean|q| * mean|k| (0.0071 against 0.0133). The first two layers read everything, as in the paper's code.
    """

    channels: float = 0.25
    """Share of the key's channels in a label."""

    calibrates: ClassVar[bool] = True

    @property
    def size(self) -> int:
        """See `Selection.size`."""
        return 1

    def width(self, key_dim: int) -> int:
        """See `Selection.width`."""
        return max(1, round(self.channels * key_dim))

    def labels(self, keys: Tensor, channels: Tensor) -> Tensor:
        """See `Selection.labels`."""
        return keys.gather(-1, channels.unsqueeze(-2).expand(*keys.shape[:-1], -1))


@dataclass(frozen=True)
class PageMeans(Selection):
    """Chunks by the mean of their keys (TriForce's retrieval cache, 2404.11912, whose chunks have 8 tokens)."""

    unit: int = 8
    """Tokens of a chunk."""

    @property
    def size(self) -> int:
        """See `Selection.size`."""
        return self.unit

    def width(self, key_dim: int) -> int:
        """See `Selection.width`."""
        return key_dim

    def labels(self, keys: Tensor, channels: Tensor) -> Tensor:
        """See `Selection.labels`."""
        return keys.unflatten(-2, (-1, self.unit)).float().mean(-2).to(keys.dtype)


@dataclass(frozen=True)
class PageBounds(Selection):
    """Chunks by an upper bound of their tokens' scores, from each channel's extremes (Quest, 2406.10774)."""

    unit: int = 16
    """Tokens of a chunk."""

    bounds: ClassVar[bool] = True

    @property
    def size(self) -> int:
        """See `Selection.size`."""
        return self.unit

    def width(self, key_dim: int) -> int:
        """See `Selection.width`."""
        return 2 * key_dim

    def labels(self, keys: Tensor, channels: Tensor) -> Tensor:
        """See `Selection.labels`."""
        chunks = keys.unflatten(-2, (-1, self.unit))
        return torch.cat([chunks.amax(-2), chunks.amin(-2)], dim=-1)
