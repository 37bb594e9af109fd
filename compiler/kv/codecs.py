"""How the keys and values of 64 tokens of one kv head are stored: as bytes, and back.

A page holds 64 consecutive entries of one layer, sequence and kv head. What a codec writes is read by two decoders: the
one here, in torch, which says what the bytes mean, and a loader in generated code (include/pages.h), which is tested
against it. A codec without a loader runs all the same, through ATen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graft.compiler.errors import PlanError

PAGE = 64
"""Entries of a page."""
TILE = 16
"""Entries that stand side by side in the codes of keys, and channels in those of values (include/attention.h)."""


@dataclass
class Content:
    """What is to be stored of some pages: keys [..., 64, key dim] and values [..., 64, value dim] in the model's dtype.

    `queries` [..., n, key dim], of a codec that asks for them by `reads_queries`: those of the tokens in front of the
    cut, all query heads of the kv head's group together.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None = None


@dataclass(frozen=True)
class Codec(ABC):
    """How a page is stored. Subclass it, make the subclass a frozen dataclass, and plans can name it."""

    reads_queries: ClassVar[bool] = False
    """Whether `encode` looks at queries, which the cache then keeps beside the tail's keys."""
    in_place: ClassVar[bool] = False
    """Whether nothing is moved: pages are those of the tail itself, which keeps all tokens."""
    exact: ClassVar[bool] = False
    """Whether what is read is what was written, bit for bit, so that entries may be moved between pages."""
    loader: ClassVar[str] = ""
    """Name of its loader in include/pages.h; empty where ATen has to decode."""

    @abstractmethod
    def page_bytes(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """Bytes of a page."""

    @abstractmethod
    def encode(self, content: Content) -> Tensor:
        """uint8 [..., page bytes]."""

    @abstractmethod
    def decode(self, pages: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [..., 64, key dim] and values [..., 64, value dim] in float32 (float64 of a float64 model), from uint8
        [..., page bytes]."""

    def loader_arguments(self, key_dim: int, value_dim: int) -> tuple[int, ...]:
        """Template arguments of the loader behind the dtype and the two dims."""
        return ()


@dataclass(frozen=True)
class InPlace(Codec):
    """Nothing is encoded: what is far away lies where it was written, and only a selection of it is read."""

    in_place: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    loader: ClassVar[str] = "InPlace"

    def page_bytes(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """See `Codec.page_bytes`."""
        return 0

    def encode(self, content: Content) -> Tensor:
        """See `Codec.encode`."""
        return content.keys.new_empty(*content.keys.shape[:-2], 0, dtype=torch.uint8)

    def decode(self, pages: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`; there is nothing to decode."""
        raise NotImplementedError("entries in place are read from the tail")


IN_PLACE = InPlace()


@dataclass(frozen=True)
class DensePages(Codec):
    """As they are, a token's key and value side by side: what eviction keeps."""

    exact: ClassVar[bool] = True
    loader: ClassVar[str] = "DensePages"

    def page_bytes(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """See `Codec.page_bytes`."""
        return PAGE * (key_dim + value_dim) * dtype.itemsize

    def encode(self, content: Content) -> Tensor:
        """See `Codec.encode`."""
        rows = torch.cat([content.keys, content.values], dim=-1).contiguous()
        return rows.flatten(-2).view(torch.uint8)

    def decode(self, pages: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`."""
        rows = pages.contiguous().view(dtype).unflatten(-1, (PAGE, key_dim + value_dim)).to(wide(dtype))
        return rows[..., :key_dim], rows[..., key_dim:]


DENSE = DensePages()


@dataclass(frozen=True)
class Affine(Codec):
    """Integers of 2, 4 or 8 bits with a float16 scale and least value for each group (KIVI, 2402.02750).

    x = scale * code + least, code in 0 .. 2^bits - 1. With `key_axis` "channel" a group of keys is one channel of
    `key_group` consecutive tokens, as in KIVI, which has 32; with "token" it is `key_group` channels of one token, as
    in llama.cpp. A group of values is `value_group` channels of one token. Bits per number: bits + 32 / group.

    In a page: codes of keys, codes of values, scales of keys, least values of keys, and the same two of values. Codes
    of keys stand as [tile of 16 tokens][pair of channels][token][channel of the pair], those of values as [pair of
    tokens][16 channels][channel][token of the pair], the first code in the lowest bits.
    """

    key_bits: Literal[2, 4, 8] = 4
    value_bits: Literal[2, 4, 8] = 4
    key_axis: Literal["channel", "token"] = "channel"
    key_group: int = 64
    """Tokens (16, 32 or 64) or channels (a multiple of 16) of a group of keys."""
    value_group: int = 32
    """Channels of a group of values, a multiple of 16."""

    loader: ClassVar[str] = "Affine"

    def __post_init__(self) -> None:
        tokens = self.key_axis == "channel"
        if (tokens and self.key_group not in (16, 32, 64)) or self.key_group % TILE or self.value_group % TILE:
            raise PlanError(
                "affine has groups that there are not",
                expected="key_group 16, 32 or 64 tokens (or a multiple of 16 channels), value_group a multiple of 16",
                found=f"key_group {self.key_group}, value_group {self.value_group}",
            )
        if min(self.key_group, self.value_group) < TILE:
            raise PlanError("affine has an empty group", expected="16 or more", found=self)

    def loader_arguments(self, key_dim: int, value_dim: int) -> tuple[int, ...]:
        """See `Codec.loader_arguments`."""
        return self.key_bits, self.value_bits, int(self.key_axis == "channel"), self.key_group, self.value_group

    def page_bytes(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """See `Codec.page_bytes`."""
        return rounded(sum(self.sections(key_dim, value_dim)), 64)

    def sections(self, key_dim: int, value_dim: int) -> tuple[int, ...]:
        """Bytes of codes of keys, codes of values, and of one of the two numbers of every group of each."""
        keys, values = PAGE * rounded(key_dim, 2), PAGE * rounded(value_dim, TILE)
        by_channel = self.key_axis == "channel"
        scales = PAGE // self.key_group * key_dim if by_channel else PAGE * parts(key_dim, self.key_group)
        key_scales, value_scales = 2 * scales, 2 * PAGE * parts(value_dim, self.value_group)
        return keys * self.key_bits // 8, values * self.value_bits // 8, *[key_scales] * 2, *[value_scales] * 2

    def encode(self, content: Content) -> Tensor:
        """See `Codec.encode`."""
        keys, values = content.keys.float(), content.values.float()
        if self.key_axis == "channel":
            codes, *scales = quantised(keys.unflatten(-2, (-1, self.key_group)), self.key_bits, dim=-2)
            key_codes, key_scales = codes.flatten(-3, -2), [one.flatten(-2) for one in scales]
        else:
            grouped = padded(keys, -1, self.key_group).unflatten(-1, (-1, self.key_group))
            codes, *scales = quantised(grouped, self.key_bits, dim=-1, size=keys.shape[-1])
            # [group][token]: a vector of scales belongs to the sixteen tokens of a tile.
            key_codes, key_scales = codes.flatten(-2), [one.transpose(-1, -2).flatten(-2) for one in scales]
            key_codes = key_codes[..., : keys.shape[-1]]
        grouped = padded(values, -1, self.value_group).unflatten(-1, (-1, self.value_group))
        codes, *scales = quantised(grouped, self.value_bits, dim=-1, size=values.shape[-1])
        value_codes = codes.flatten(-2)[..., : values.shape[-1]]
        value_scales = [one.flatten(-2) for one in scales]
        key_codes = padded(key_codes, -1, 2).unflatten(-2, (-1, TILE)).unflatten(-1, (-1, 2)).transpose(-3, -2)
        value_codes = padded(value_codes, -1, TILE).unflatten(-2, (-1, 2)).unflatten(-1, (-1, TILE)).movedim(-3, -1)
        sections = [
            packed(key_codes.flatten(-4), self.key_bits),
            packed(value_codes.flatten(-4), self.value_bits),
            *(one.contiguous().view(torch.uint8) for one in (*key_scales, *value_scales)),
        ]
        page = torch.cat(sections, dim=-1)
        return padded(page, -1, 64)

    def decode(self, pages: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`."""
        sections = pages[..., : sum(self.sections(key_dim, value_dim))].split(self.sections(key_dim, value_dim), dim=-1)
        halves = [one.contiguous().view(torch.float16).float() for one in sections[2:]]
        codes = unpacked(sections[0], self.key_bits).unflatten(-1, (PAGE // TILE, -1, TILE, 2))
        keys = codes.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :key_dim].float()
        if self.key_axis == "channel":
            scale, least = (one.unflatten(-1, (-1, 1, key_dim)) for one in halves[:2])
            keys = (keys.unflatten(-2, (-1, self.key_group)) * scale + least).flatten(-3, -2)
        else:
            scale, least = (one.unflatten(-1, (-1, PAGE)).transpose(-1, -2) for one in halves[:2])
            scale, least = (one.repeat_interleave(self.key_group, -1)[..., :key_dim] for one in (scale, least))
            keys = keys * scale + least
        codes = unpacked(sections[1], self.value_bits).unflatten(-1, (PAGE // 2, -1, TILE, 2))
        values = codes.movedim(-1, -3).flatten(-2).flatten(-3, -2)[..., :value_dim].float()
        scale, least = (one.unflatten(-1, (PAGE, -1)) for one in halves[2:])
        scale, least = (one.repeat_interleave(self.value_group, -1)[..., :value_dim] for one in (scale, least))
        return keys.to(wide(dtype)), (values * scale + least).to(wide(dtype))


@dataclass(frozen=True)
class KeyChannels(Codec):
    """Of the keys of a page only the channels that matter to the queries before it (ThinK, 2407.21018).

    A channel's score is mean(q^2) * mean(k^2) over the page's tokens and the queries; the best `keep` of them stay, the
    others count as zero. ThinK chooses once, at the end of the prompt; here every page chooses for itself, with the
    queries since the cut before. What stays, and the values, are stored by `inner`.
    """

    keep: float = 0.5
    """Share of the channels that stay."""
    inner: Codec = DENSE

    reads_queries: ClassVar[bool] = True
    loader: ClassVar[str] = "KeyChannels"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise PlanError("key-channels keeps no such share", expected="keep in (0, 1]", found=self.keep)
        if self.inner.in_place or self.inner.reads_queries:
            raise PlanError(
                "key-channels cannot be stored so", expected="dense-pages, or affine", found=type(self.inner).__name__
            )

    def kept(self, key_dim: int) -> int:
        """How many channels stay: an even number, or all."""
        return min(key_dim, rounded(max(1, round(self.keep * key_dim)), 2))

    def loader_arguments(self, key_dim: int, value_dim: int) -> tuple[int, ...]:
        """See `Codec.loader_arguments`."""
        return (self.kept(key_dim),)

    def page_bytes(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """See `Codec.page_bytes`."""
        return rounded(self.kept(key_dim), 64) + self.inner.page_bytes(self.kept(key_dim), value_dim, dtype)

    def encode(self, content: Content) -> Tensor:
        """See `Codec.encode`."""
        assert content.queries is not None
        score = content.queries.float().square().mean(-2) * content.keys.float().square().mean(-2)
        chosen = score.topk(self.kept(score.shape[-1]), dim=-1).indices.sort(-1).values
        narrow = content.keys.gather(-1, chosen.unsqueeze(-2).expand(*content.keys.shape[:-1], -1))
        inner = self.inner.encode(Content(narrow, content.values))
        return torch.cat([padded(chosen.to(torch.uint8), -1, 64), inner], dim=-1)

    def decode(self, pages: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`."""
        count = self.kept(key_dim)
        narrow, values = self.inner.decode(pages[..., rounded(count, 64) :], count, value_dim, dtype)
        chosen = pages[..., :count].long().unsqueeze(-2).expand(narrow.shape)
        return narrow.new_zeros(*narrow.shape[:-1], key_dim).scatter(-1, chosen, narrow), values


def quantised(groups: Tensor, bits: int, dim: int, size: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes, and float16 scale and least value of every group along `dim`, which they lack.

    Of groups that lie behind each other in the last two dims, what stands behind `size` elements is padding.
    """
    low, high = groups, groups
    if size:
        inside = torch.arange(groups.shape[-2] * groups.shape[-1], device=groups.device) < size
        inside = inside.unflatten(0, tuple(groups.shape[-2:]))
        low, high = groups.masked_fill(~inside, torch.inf), groups.masked_fill(~inside, -torch.inf)
    least, most = low.amin(dim), high.amax(dim)
    steps = 2**bits - 1
    scale = ((most - least) / steps).half()
    least = least.half()
    divisor = scale.float().masked_fill(scale == 0, 1).unsqueeze(dim)
    codes = ((groups - least.float().unsqueeze(dim)) / divisor).round().clamp(0, steps)
    return codes.to(torch.uint8), scale, least


def packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] in 0 .. 2^bits - 1 as [..., n * bits / 8], the first code in the lowest bits."""
    lanes = codes.unflatten(-1, (-1, 8 // bits))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (lanes << shifts).sum(-1, dtype=torch.uint8)


def unpacked(codes: Tensor, bits: int) -> Tensor:
    """The reverse of `packed`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return ((codes.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def padded(tensor: Tensor, dim: int, multiple: int) -> Tensor:
    """Zeros behind the elements of a dim, up to a multiple."""
    missing = -tensor.shape[dim] % multiple
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim) if missing else tensor


def rounded(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def parts(count: int, size: int) -> int:
    """How many groups there are."""
    return -(-count // size)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What attention computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
