"""Codecs, selections and the attention operator over pages, against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graft.compiler.errors import PlanError
from graft.compiler.kv.attention import kv_attend_pages
from graft.compiler.kv.codecs import PAGE, Affine, Codec, Content, DensePages, KeyChannels
from graft.compiler.kv.residual_codecs import Bitmap, Gear
from graft.compiler.kv.selection import DoubleSparsity, PageBounds, PageMeans, Selection
from graft.compiler.spec import show

CODECS = (
    Affine(),
    Affine(8, 8, "token", 32, 16),
    Affine(2, 4, "channel", 16, 48),
    Affine(4, 2, "token", 64, 64),
    DensePages(),
    KeyChannels(0.5),
    KeyChannels(0.3, Affine(8, 8)),
)


def numbers(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def rounded_group(group: Tensor, bits: int) -> Tensor:
    """What a group of numbers comes back as: the nearest of 2^bits evenly spaced ones between its extremes."""
    least, steps = group.min().half().float(), 2**bits - 1
    scale = ((group.max() - group.min()) / steps).half().float()
    nearest = ((group - least) / scale).round().clamp(0, steps) if scale else torch.zeros_like(group)
    return nearest * scale + least


def rounded_groups(rows: Tensor, bits: int, tokens: int, channels: int) -> Tensor:
    """[64, dim] in groups of so many tokens and channels."""
    out = torch.empty_like(rows)
    for row in range(0, PAGE, tokens):
        for column in range(0, rows.shape[1], channels):
            part = (slice(row, row + tokens), slice(column, column + channels))
            out[part] = rounded_group(rows[part], bits)
    return out


@pytest.mark.parametrize("sizes", [(64, 64), (80, 96), (36, 20)], ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=show)
def test_a_page_says_what_the_formula_says(codec: Codec, sizes: tuple[int, int]) -> None:
    keys, values, queries = numbers(2, PAGE, sizes[0]), numbers(2, PAGE, sizes[1], seed=1), numbers(2, 5, sizes[0])
    keys[1, :, 3] = 0.25  # a group without any spread
    pages = codec.encode(Content(keys, values, queries))
    assert pages.shape == (2, codec.page_bytes(*sizes, torch.float32)) and pages.dtype == torch.uint8
    found = codec.decode(pages, *sizes, torch.float32)
    inner = codec.inner if isinstance(codec, KeyChannels) else codec
    for head in range(2):
        kept, expected = keys[head], values[head]
        stays = torch.ones(sizes[0], dtype=torch.bool)
        if isinstance(codec, KeyChannels):
            score = (queries[head] ** 2).mean(0) * (kept**2).mean(0)
            stays = score >= score.sort(descending=True).values[codec.kept(sizes[0]) - 1]
            kept = kept[:, stays]
        if isinstance(inner, Affine):
            grouping = (inner.key_group, 1) if inner.key_axis == "channel" else (1, inner.key_group)
            kept = rounded_groups(kept, inner.key_bits, *grouping)
            expected = rounded_groups(expected, inner.value_bits, 1, inner.value_group)
        whole = torch.zeros(PAGE, sizes[0])
        whole[:, stays] = kept
        torch.testing.assert_close(found[0][head], whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[1][head], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gear_is_the_inner_codec_the_outliers_and_a_low_rank_rest(dtype: torch.dtype) -> None:
    keys, values = numbers(2, PAGE, 32), numbers(2, PAGE, 48, seed=1)
    keys[0, 5, 7], values[1, 63, 47] = 40.0, -30.0
    direction = numbers(32, seed=5)
    content = Content(keys.to(dtype), values.to(dtype))
    gear = Gear(rank=4, outliers=2 / (PAGE * 32), inner=Affine(2, 2))
    pages = gear.encode(content)
    assert pages.shape[-1] == gear.page_bytes(32, 48, dtype)
    found = gear.decode(pages, 32, 48, dtype)
    assert abs(float(found[0][0, 5, 7]) - 40) < 1 and abs(float(found[1][1, 63, 47]) + 30) < 1
    smooth = keys.clone()
    smooth[0, 5, 7] = direction[0]
    plain = Affine(2, 2).decode(Affine(2, 2).encode(Content(smooth, values)), 32, 48, torch.float32)
    rest = smooth[1] - plain[0][1]
    u, s, v = torch.linalg.svd(rest)
    best = rest - (u[:, :4] * s[:4]) @ v[:4]
    # Power iteration comes near the best matrix of that rank, which is the singular values' own.
    assert (found[0][1] - keys[1]).norm() < 1.06 * best.norm() < rest.norm()


def test_a_bitmap_keeps_the_largest_numbers_of_every_token() -> None:
    content = Content(numbers(2, PAGE, 20), numbers(2, PAGE, 48, seed=1))
    bitmap = Bitmap(0.3)
    pages = bitmap.encode(content)
    assert pages.shape[-1] == bitmap.page_bytes(20, 48, torch.float32)
    for rows, found in zip((content.keys, content.values), bitmap.decode(pages, 20, 48, torch.float32), strict=True):
        kept = round(0.3 * rows.shape[-1])
        least = rows.abs().sort(-1, descending=True).values[..., kept - 1 : kept]
        assert torch.equal(found, torch.where(rows.abs() >= least, rows, 0.0))


def test_four_bits_take_less_than_five_a_number_with_everything_and_half_the_channels_a_little_more_than_half() -> None:
    with_number = Affine().page_bytes(64, 64, torch.bfloat16) + 4
    assert 4.7 * PAGE * 128 < with_number * 8 < 4.8 * PAGE * 128
    keys = PAGE * 64 * 2
    assert KeyChannels(0.5).page_bytes(64, 64, torch.bfloat16) - keys <= 0.55 * keys


@pytest.mark.parametrize("selection", [DoubleSparsity, PageMeans, PageBounds])
def test_a_row_reads_the_units_whose_labels_promise_most(selection: type[Selection]) -> None:
    how = selection(ratio=0.25, least=1, sinks=3)
    keys, queries = numbers(1, 2, PAGE, 16), numbers(1, 3, 4, 16, seed=2)
    channels = torch.tensor([[[1, 4, 9, 15]] * 2]).expand(1, 2, -1)
    labels = how.labels(keys, channels).flatten(1, 2)
    found = how.chosen(queries, labels, channels[:, 0], 100)
    assert found.shape == (1, 4, 100)
    for row in range(4):
        promised = []
        for unit in range(0, 100, how.size):
            chunk = keys.flatten(1, 2)[0, unit : unit + how.size]
            scores = []
            for query in queries[0, :, row]:
                if isinstance(how, DoubleSparsity):
                    score = sum(float(query[c] * chunk[0, c]) for c in (1, 4, 9, 15))
                elif isinstance(how, PageMeans):
                    score = float(query @ chunk.mean(0))
                else:
                    score = float(torch.maximum(query * chunk.amax(0), query * chunk.amin(0)).sum())
                scores.append(score)
            promised.append(math.inf if unit < 3 else max(scores))
        count = math.ceil(len(promised) / 4)
        best = sorted(range(len(promised)), key=lambda unit: -promised[unit])[:count]
        read = {token for unit in best for token in range(unit * how.size, min(100, (unit + 1) * how.size))}
        assert set(found[0, row].nonzero().flatten().tolist()) == read


def test_attention_over_pages_and_tail_is_attention_over_the_entries_one_by_one() -> None:
    heads, group, key_dim, value_dim, slots, layer = 2, 3, 16, 24, 3, 1
    codec, capacity = Affine(8, 8), 12
    kv = numbers(2, slots, heads, capacity, key_dim + value_dim)
    content = Content(numbers(7, PAGE, key_dim, seed=3), numbers(7, PAGE, value_dim, seed=4))
    pages = codec.encode(content)
    stored = codec.decode(pages, key_dim, value_dim, torch.float32)
    table = torch.zeros(2, slots, heads, 2, dtype=torch.int32)
    table[layer, 0], table[layer, 2] = torch.tensor([[5, 2], [0, 0]]), torch.tensor([[1, 0], [6, 3]])
    counts = torch.zeros(2, slots, heads, dtype=torch.int32)
    counts[layer, 0], counts[layer, 2] = torch.tensor([100, 64]), torch.tensor([7, 128])
    sequences, parents = torch.tensor([2, 2, 2, 0, 1]), torch.tensor([-1, 0, 0, -1, -1])
    lengths, starts = torch.tensor([5, 3, 4]), torch.tensor([2, 0, 0])
    q = numbers(1, heads * group, 5, key_dim, seed=5)
    scale, sinks = 0.3, numbers(heads * group, seed=6)
    out = kv_attend_pages(
        kv, q, sequences, parents, lengths, starts, pages, table, counts, None, None, layer, value_dim, scale, 0.0,
        sinks, show(codec), "",
    )  # fmt: skip
    tails = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6], [2, 3, 4, 5], [0, 1, 2, 3]]
    for row, places in enumerate(tails):
        slot = int(sequences[row])
        for one in range(heads * group):
            head = one // group
            entries = [
                (stored[0][int(table[layer, slot, head, at // PAGE]), at % PAGE],
                 stored[1][int(table[layer, slot, head, at // PAGE]), at % PAGE])
                for at in range(int(counts[layer, slot, head]))
            ]  # fmt: skip
            entries += [kv[layer, slot, head, place].split([key_dim, value_dim]) for place in places]
            keys, values = (torch.stack(part).double() for part in zip(*entries, strict=True))
            scores = torch.cat([keys @ q[0, one, row].double() * scale, sinks[one : one + 1].double()])
            expected = scores.softmax(0)[:-1] @ values
            torch.testing.assert_close(out[0, row, one].double(), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(PlanError, match="groups that there are not"):
        Affine(key_group=48)
    with pytest.raises(PlanError, match="keeps no such share"):
        KeyChannels(0)
    with pytest.raises(PlanError, match="cannot be stored so"):
        KeyChannels(0.5, KeyChannels())
    with pytest.raises(PlanError, match="selection has options"):
        PageMeans(unit=12)
