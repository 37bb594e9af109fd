"""The operators' reference meaning, against torch's own attention and against running every path by itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from graft.compiler.ops import NO_PARENT, ancestry, attention, kv_append, kv_attend, linear_rows, row_places

ops = torch.ops.graft
few = settings(max_examples=25, deadline=None, derandomize=True)
GROUPS = st.sampled_from([1, 3, 4, 8])
HEAD_DIMS = st.sampled_from([64, 80, 96, 128])
WINDOWS = st.sampled_from([0, 1, 3, 20])
SOFTCAPS = st.sampled_from([0.0, 2.0])


def random(*shape: int, seed: int = 0) -> Tensor:
    """float64 normal numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def oracle(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """q [heads, N, d], k and v [kv heads, S, d], visible [N, S] -> [N, heads, value dim].

    Through torch's kernel where it can express it; a sink is one more key whose score is given and whose value is 0.
    """
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -math.inf).expand(len(q), -1, -1)
    if softcap:  # the capped score as a bias on a score of zero
        raw = torch.einsum("hnd,hsd->hns", q, k) * scale
        bias, q = bias + softcap * torch.tanh(raw / softcap), torch.zeros_like(q)
    if sinks is not None:
        bias = torch.cat([bias, sinks[:, None, None].expand(-1, len(visible), 1)], -1)
        k, v = (torch.cat([t, torch.zeros_like(t[:, :1])], 1) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(0, 1)


@few
@given(
    groups=GROUPS, kv_heads=st.integers(1, 2), key_dim=HEAD_DIMS, value_dim=HEAD_DIMS, length=st.integers(1, 9),
    window=WINDOWS, softcap=SOFTCAPS, with_sinks=st.booleans(),
)
def test_attention_is_causal_softmax_attention(
    groups: int, kv_heads: int, key_dim: int, value_dim: int, length: int, window: int, softcap: float, with_sinks: bool
) -> None:
    heads, scale = groups * kv_heads, 0.7 * key_dim**-0.5
    q, k = random(2, heads, length, key_dim), random(2, kv_heads, length, key_dim, seed=1)
    v, sinks = random(2, kv_heads, length, value_dim, seed=2), random(heads, seed=3) if with_sinks else None
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (window or length))
    found = attention(q, k, v, scale, window, softcap, sinks)
    for row in range(2):
        expected = oracle(q[row], k[row], v[row], visible, scale, softcap, sinks)
        torch.testing.assert_close(found[row], expected, rtol=1e-10, atol=1e-10)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[tuple[int, int, list[int]]], int]:
    """[(slot, committed tokens, parents of its rows)] in any order of slots, and the number of slots."""
    slots = draw(st.permutations(range(4)))[: draw(st.integers(1, 3))]
    groups = []
    for slot in slots:
        rows = draw(st.integers(1, 5))
        parents = [draw(st.integers(NO_PARENT, row - 1)) for row in range(rows)]
        groups.append((slot, draw(st.integers(0, 6)), parents))
    return groups, 4


@few
@given(
    call=calls(), groups=GROUPS, kv_heads=st.integers(1, 2), head_dim=HEAD_DIMS, window=WINDOWS, softcap=SOFTCAPS,
    with_sinks=st.booleans(),
)
def test_every_row_attends_to_its_own_path(
    call: tuple[list[tuple[int, int, list[int]]], int],
    groups: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    softcap: float,
    with_sinks: bool,
) -> None:
    """Each row alone over committed tokens and its path, in a sequence of their own, must give the same."""
    (trees, slots), heads, value_dim, layer = call, groups * kv_heads, 24, 1
    count = sum(len(parents) for *_, parents in trees)
    q, k = random(1, heads, count, head_dim), random(1, kv_heads, count, head_dim, seed=1)
    v, sinks = random(1, kv_heads, count, value_dim, seed=2), random(heads, seed=3) if with_sinks else None
    kv, lengths = random(2, slots, kv_heads, 12, head_dim + value_dim, seed=4), torch.zeros(slots, dtype=torch.int64)
    sequences, positions, before, paths = [], [], [], []
    for slot, committed, parents in trees:
        lengths[slot], first = committed, len(sequences)
        for row, parent in enumerate(parents):
            path = [] if parent == NO_PARENT else paths[first + parent]
            paths.append([*path, first + row])
            before.append(parent if parent == NO_PARENT else first + parent)
            positions.append(committed + len(path))
            sequences.append(slot)
    rows = [torch.tensor(values) for values in (sequences, positions, before)]
    state = kv_append(kv, k, v, rows[0], lengths, layer)
    found = kv_attend(state, q, *rows, lengths, layer, 0.3, window, softcap, sinks)
    for row, path in enumerate(paths):
        stored = kv[layer, sequences[row], :, : lengths[sequences[row]]]
        keys = torch.cat([stored[..., :head_dim], k[0][:, path]], 1)
        values = torch.cat([stored[..., head_dim:], v[0][:, path]], 1)
        visible = torch.arange(keys.shape[1] - 1, -1, -1)[None] < (window or 99)
        expected = oracle(q[0][:, row : row + 1], keys, values, visible, 0.3, softcap, sinks)
        torch.testing.assert_close(found[0, row], expected[0], rtol=1e-10, atol=1e-10)


def test_an_append_writes_its_rows_behind_the_committed_and_nothing_else() -> None:
    kv, lengths = random(2, 3, 2, 8, 7), torch.tensor([2, 0, 5])
    k, v = random(1, 2, 4, 4, seed=1), random(1, 2, 4, 3, seed=2)
    sequences = torch.tensor([2, 2, 0, 0])
    before = kv.clone()
    after = kv_append(kv, k, v, sequences, lengths, 1)
    assert torch.equal(kv, before)
    expected = before.clone()
    for row, (slot, place) in enumerate([(2, 5), (2, 6), (0, 2), (0, 3)]):
        expected[1, slot, :, place] = torch.cat([k[0, :, row], v[0, :, row]], -1)
    assert torch.equal(after, expected)


def test_places_and_ancestors_of_rows() -> None:
    sequences, lengths = torch.tensor([1, 1, 0, 1]), torch.tensor([3, 7])
    assert row_places(sequences, lengths).tolist() == [7, 8, 3, 9]
    assert ancestry(torch.tensor([NO_PARENT, 0, 0, 2])).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 1, 1],
    ]


@few
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), with_bias=st.booleans(), data=st.data())
def test_linear_rows_is_the_linears_side_by_side(sizes: list[int], with_bias: bool, data: st.DataObject) -> None:
    x = random(2, 3, 5)
    weights = [random(size, 5, seed=index) for index, size in enumerate(sizes)]
    biases = [random(size, seed=9 + index) for index, size in enumerate(sizes)] if with_bias else []
    starts = [data.draw(st.integers(0, size - 1)) for size in sizes]
    ends = [data.draw(st.integers(start + 1, size)) for start, size in zip(starts, sizes, strict=True)]
    ranges = [bound for pair in zip(starts, ends, strict=True) for bound in pair]
    parts = []
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        product = x @ weights[index].T + (biases[index] if with_bias else 0)
        parts.append(product[..., start:end])
    torch.testing.assert_close(linear_rows(x, weights, biases, ranges), torch.cat(parts, -1))
    others = [random(2, 3, 5, seed=20 + index) for index in range(len(sizes))]
    wide = torch.cat(others, -1)
    blocks = [linear_rows(other, [weight], [], pair)  # the inputs side by side, each read by one weight
              for other, weight, pair in zip(others, weights, zip(starts, ends, strict=True), strict=True)]  # fmt: skip
    firsts = [5 * index for index in range(len(sizes))]
    torch.testing.assert_close(linear_rows(wide, weights, [], ranges, firsts), torch.cat(blocks, -1))
    first = data.draw(st.integers(0, 4))
    some = [first, data.draw(st.integers(first + 1, 5))]
    masked = [weight * (torch.arange(5) >= some[0]) * (torch.arange(5) < some[1]) for weight in weights]
    found = linear_rows(x[..., slice(*some)], weights, biases, ranges, None, some)
    torch.testing.assert_close(found, linear_rows(x, masked, biases, ranges))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_returns_the_dtype_it_was_given(dtype: torch.dtype) -> None:
    q, k, v = (random(1, 2, 5, 16, seed=seed).to(dtype) for seed in range(3))
    found = attention(q, k, v, 0.25)
    assert found.dtype == dtype
    expected = attention(q.double(), k.double(), v.double(), 0.25)
    assert (found - expected).abs().max() <= 4 * torch.finfo(dtype).eps


def state_call(sinks: Tensor | None) -> tuple[Tensor, ...]:
    """Arguments for kv_attend: two slots, one of them without committed tokens."""
    integers = [torch.tensor(values) for values in ([1, 1, 0], [4, 5, 0], [NO_PARENT, 0, NO_PARENT], [0, 4])]
    return (random(2, 2, 2, 8, 10), random(1, 4, 3, 6, seed=1), *integers, 1, 0.4, 3, 2.0, sinks)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_every_operator_passes_opcheck(with_sinks: bool) -> None:
    sinks = random(4, seed=7) if with_sinks else None
    q, k, v = random(2, 4, 5, 6), random(2, 2, 5, 6, seed=1), random(2, 2, 5, 4, seed=2)
    torch.library.opcheck(ops.attention.default, (q, k, v, 0.4, 3, 2.0, sinks, 0))
    kv, _, sequences, _, _, lengths, layer, *_ = state_call(sinks)
    k, v = random(1, 2, 3, 6, seed=1), random(1, 2, 3, 4, seed=2)
    torch.library.opcheck(ops.kv_append.default, (kv, k, v, sequences, lengths, layer))
    torch.library.opcheck(ops.kv_attend.default, state_call(sinks))
    weights = [random(3, 5), random(4, 5)]
    biases = [random(3), random(4)] if with_sinks else []
    torch.library.opcheck(ops.linear_rows.default, (random(2, 5), weights, biases, [0, 3, 1, 4]))
    torch.library.opcheck(ops.linear_rows.default, (random(2, 10), weights, biases, [0, 3, 1, 4], [5, 0]))
