"""Codecs that add to another one what it loses most of: numbers far from the others, and a matrix of low rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graft.compiler.errors import PlanError
from graft.compiler.kv.codecs import PAGE, Affine, Codec, Content, padded, rounded, wide

AFFINE = Affine()
ROUNDS = 3
"""Rounds of the power iteration, as in GEAR's own code."""


@dataclass(frozen=True)
class Gear(Codec):
    """Quantised numbers, a low-rank matrix of what quantising loses, and the numbers that stand out (GEAR, 2403.05527).

    x = inner(x without outliers) + outliers + A B^T for keys and values of every page. The `outliers` share of a page's
    numbers that are furthest from their channel's mean are kept as float16 with their place, and count as that mean for
    the inner codec; A [64, rank] and B [dim, rank] are float16. The paper takes outliers by channel and by token and
    longer blocks; a page's worth of each is our choice.
    """

    rank: int = 2
    outliers: float = 0.0
    inner: Affine = AFFINE

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0 <= self.outliers < 1 or self.rank + self.outliers == 0:
            raise PlanError("gear adds nothing", expected="rank of 1 or more, or outliers in (0, 1)", found=self)

    def page_bytes(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """See `Codec.page_bytes`."""
        own = sum(sum(self.sections(dim)) for dim in (key_dim, value_dim))
        return self.inner.page_bytes(key_dim, value_dim, dtype) + rounded(own, 64)

    def sections(self, dim: int) -> tuple[int, int, int, int]:
        """Bytes of A, B, places (int16) and numbers of outliers, of keys or of values."""
        count = round(self.outliers * PAGE * dim)
        return 2 * PAGE * self.rank, 2 * dim * self.rank, 2 * count, 2 * count

    def encode(self, content: Content) -> Tensor:
        """See `Codec.encode`."""
        whole = [content.keys.float(), content.values.float()]
        found = [self.outlying(one) for one in whole]
        smooth = [
            one.flatten(-2).scatter(-1, places, means).view_as(one)
            for one, (places, _, means) in zip(whole, found, strict=True)
        ]
        inner = self.inner.encode(Content(smooth[0], smooth[1]))
        dims = (whole[0].shape[-1], whole[1].shape[-1])
        decoded = self.inner.decode(inner, *dims, torch.float32)
        parts = [inner]
        for one, near, (places, kept, _) in zip(smooth, decoded, found, strict=True):
            left, right = low_rank(one - near, self.rank)
            halves = [left.flatten(-2).half(), right.flatten(-2).half(), places.to(torch.int16), kept.half()]
            parts += [half.contiguous().view(torch.uint8) for half in halves]
        page = torch.cat(parts, dim=-1)
        return padded(page, -1, 64)

    def outlying(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places [..., n] in the flat page, the numbers there, and their channels' means."""
        means = rows.mean(-2, keepdim=True).expand_as(rows).flatten(-2)
        flat = rows.flatten(-2)
        places = (flat - means).abs().topk(round(self.outliers * flat.shape[-1]), dim=-1).indices
        return places, flat.gather(-1, places), means.gather(-1, places)

    def decode(self, pages: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`."""
        front = self.inner.page_bytes(key_dim, value_dim, dtype)
        near = self.inner.decode(pages[..., :front], key_dim, value_dim, torch.float32)
        found, start = [], front
        for one, dim in zip(near, (key_dim, value_dim), strict=True):
            sizes = self.sections(dim)
            left, right, places, kept = pages[..., start : start + sum(sizes)].split(sizes, dim=-1)
            start += sum(sizes)
            halves = [half.contiguous().view(torch.float16).float() for half in (left, right, kept)]
            where = places.contiguous().view(torch.int16).long()
            added = one + halves[0].unflatten(-1, (PAGE, self.rank)) @ halves[1].unflatten(-1, (dim, self.rank)).mT
            # What is kept replaces the mean that stands in its place; what the low rank adds there is added to both.
            base = one.flatten(-2).gather(-1, where)
            exact = added.flatten(-2).scatter_add(-1, where, halves[2] - base)
            found.append(exact.view_as(one).to(wide(dtype)))
        return found[0], found[1]


def low_rank(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [..., n, rank] and B [..., d, rank] with A B^T near rows [..., n, d], by power iteration from fixed numbers."""
    start = torch.randn(rows.shape[-1], rank, generator=torch.Generator().manual_seed(0)).to(rows.device)
    right = start.expand(*rows.shape[:-2], -1, -1)
    left = rows @ right
    for _ in range(ROUNDS):
        left = torch.linalg.qr(rows @ torch.linalg.qr(right).Q).Q
        right = rows.mT @ left
    return left, right


@dataclass(frozen=True)
class Bitmap(Codec):
    """Of every token the largest numbers, and a bit for each that says which (Mustafar, 2505.22913).

    `keep` of the numbers of a token's key, and of its value, stay in the model's dtype; the others count as zero.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise PlanError("bitmap keeps no such share", expected="keep in (0, 1]", found=self.keep)

    def kept(self, dim: int) -> int:
        """How many numbers of a token stay."""
        return max(1, round(self.keep * dim))

    def sections(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
        """Bytes of bits and numbers of keys, then of values."""
        dims = (key_dim, value_dim)
        return tuple(PAGE * size for dim in dims for size in (-(-dim // 8), self.kept(dim) * dtype.itemsize))

    def page_bytes(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """See `Codec.page_bytes`."""
        return rounded(sum(self.sections(key_dim, value_dim, dtype)), 64)

    def encode(self, content: Content) -> Tensor:
        """See `Codec.encode`."""
        parts = []
        for rows in (content.keys, content.values):
            order = rows.abs().argsort(dim=-1, descending=True, stable=True)[..., : self.kept(rows.shape[-1])]
            places = order.sort(-1).values
            bits = torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device).scatter(-1, places, 1)
            weights = 2 ** torch.arange(8, dtype=torch.uint8, device=rows.device)
            packed = (padded(bits, -1, 8).unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
            parts += [packed.flatten(-2), rows.gather(-1, places).contiguous().flatten(-2).view(torch.uint8)]
        return padded(torch.cat(parts, dim=-1), -1, 64)

    def decode(self, pages: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`."""
        sizes = self.sections(key_dim, value_dim, dtype)
        parts = pages[..., : sum(sizes)].split(sizes, dim=-1)
        found = []
        for bits, numbers, dim in zip(parts[::2], parts[1::2], (key_dim, value_dim), strict=True):
            shifts = torch.arange(8, dtype=torch.uint8, device=pages.device)
            spread = (bits.unflatten(-1, (PAGE, -1)).unsqueeze(-1) >> shifts & 1).flatten(-2)[..., :dim].bool()
            kept = numbers.contiguous().view(dtype).unflatten(-1, (PAGE, -1))
            rows = torch.zeros(spread.shape, dtype=dtype, device=pages.device).masked_scatter(spread, kept)
            found.append(rows.to(wide(dtype)))
        return found[0], found[1]
