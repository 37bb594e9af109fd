"""graft's own operators: a schema, a shape rule, and a reference meaning in plain torch for each.

The reference is what the operator *means*. It is pure, written for reading rather than speed, and every faster
implementation in codegen/ is tested against it. State is a value here: `kv_append` returns a new state, nothing is
written in place; lowering makes it so once the checker has shown that each state value has one successor.

A KV state is one tensor [layers, slots, kv heads, capacity, key dim + value dim]: a token's key and value side by
side, so that committing a path is one gather whatever their sizes. A row's place in it is `lengths[slot]` plus the
number of rows of the same slot before it in the call; rows of one slot stand together.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_PARENT = -1
"""Parent of a row whose predecessor is committed already, or that starts its sequence."""


@torch.library.custom_op("graft::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """Causal attention without a cache, as captured.

    q [B, heads, L, key dim], k [B, kv heads, L, key dim], v [B, kv heads, L, value dim]; heads is a multiple of kv
    heads. Query i sees keys max(0, i - window + 1)..i (window 0: from 0). Scores are q.k * scale, then
    softcap * tanh(scores / softcap) if softcap > 0; sinks [heads] joins the softmax as one more column whose value is
    zero. Returns [B, L, heads, value dim] in q's dtype; the softmax is float32, or float64 for float64 inputs.
    """
    return causal_attention(q, k, v, scale, window, softcap, sinks).contiguous()


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """What `graft::attention` means, with gradients."""
    length = q.shape[2]
    index = torch.arange(length, device=q.device)
    visible = index[None, :] <= index[:, None]
    if window:
        visible &= index[:, None] - index[None, :] < window
    return softmax_attention(q, k, v, visible, scale, softcap, sinks).transpose(1, 2)


@torch.library.custom_op("graft::kv_append", mutates_args=())
def kv_append(kv: Tensor, k: Tensor, v: Tensor, sequences: Tensor, lengths: Tensor, layer: int) -> Tensor:
    """The state with this call's keys and values written behind the committed tokens of their slots.

    kv [layers, slots, kv heads, capacity, key dim + value dim]; k [1, kv heads, N, key dim], v [1, kv heads, N, value
    dim]; sequences int64 [N], each row's slot; lengths int64 [slots], committed tokens; `layer` indexes the state's
    own layers.
    """
    out = kv.clone()
    place = row_places(sequences, lengths)
    out[layer, sequences, :, place] = torch.cat([k[0], v[0]], dim=-1).transpose(0, 1).to(kv.dtype)
    return out


@kv_append.register_fake
def _(kv: Tensor, k: Tensor, v: Tensor, sequences: Tensor, lengths: Tensor, layer: int) -> Tensor:
    return torch.empty_like(kv)


@torch.library.custom_op("graft::kv_attend", mutates_args=())
def kv_attend(
    kv: Tensor,
    q: Tensor,
    sequences: Tensor,
    positions: Tensor,
    parents: Tensor,
    lengths: Tensor,
    layer: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of flat rows over their slots: the committed tokens, the row's ancestors in this call, and itself.

    q [1, heads, N, key dim]; sequences, positions, parents int64 [N]: slot, logical position, and index in this call
    of the row before it (NO_PARENT: the last committed token); lengths int64 [slots]. A committed token's position is
    its place in the slot. A key is visible if 0 <= position of the row - position of the key, and less than `window`
    where that is not 0. Returns [1, N, heads, value dim].
    """
    key_dim = q.shape[-1]
    place, ancestors = row_places(sequences, lengths), ancestry(parents)
    out = q.new_zeros(q.shape[2], q.shape[1], kv.shape[-1] - key_dim)
    for slot in sequences.unique().tolist():
        rows = (sequences == slot).nonzero().flatten()
        committed, total = int(lengths[slot]), int(lengths[slot]) + len(rows)
        key_positions = torch.arange(total, device=q.device)
        key_positions[place[rows]] = positions[rows]
        visible = torch.ones(len(rows), total, dtype=torch.bool, device=q.device)
        visible[:, committed:] = ancestors[rows][:, rows]
        if window:
            visible &= positions[rows][:, None] - key_positions[None, :] < window
        stored = kv[layer, slot, :, :total].to(q.dtype)[None]
        result = softmax_attention(
            q[:, :, rows], stored[..., :key_dim], stored[..., key_dim:], visible, scale, softcap, sinks
        )
        out[rows] = result[0].transpose(0, 1)
    return out[None]


@kv_attend.register_fake
def _(
    kv: Tensor,
    q: Tensor,
    sequences: Tensor,
    positions: Tensor,
    parents: Tensor,
    lengths: Tensor,
    layer: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    return q.new_empty(1, q.shape[2], q.shape[1], kv.shape[-1] - q.shape[-1])


@torch.library.custom_op("graft::linear_rows", mutates_args=())
def linear_rows(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    ranges: list[int],
    starts: list[int] | None = None,
    columns: list[int] | None = None,
) -> Tensor:
    """One linear over an ordered list of (parameter, row range); no new parameter is made.

    x [..., in]; weights[i] [out_i, in]; biases is empty or one [out_i] for each; ranges holds start and end row of
    each weight, flat. With `columns`, a start and an end, every weight is those columns of the parameter alone, `in` of
    them. With `starts` x holds several inputs side by side, and weights[i] reads the `in` features from starts[i] on.
    Returns [..., sum of the range lengths], the ranges' outputs side by side.
    """
    outs = []
    for index, parameter in enumerate(weights):
        weight = parameter if columns is None else parameter[:, columns[0] : columns[1]]
        rows = slice(ranges[2 * index], ranges[2 * index + 1])
        part = x if starts is None else x[..., starts[index] : starts[index] + weight.shape[1]]
        outs.append(torch.nn.functional.linear(part, weight[rows], biases[index][rows] if biases else None))
    return torch.cat(outs, dim=-1)


@linear_rows.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    ranges: list[int],
    starts: list[int] | None = None,
    columns: list[int] | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(ranges[1::2]) - sum(ranges[::2]))


@torch.library.custom_op("graft::expert_linear", mutates_args=())
def expert_linear(x: Tensor, weights: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """Every slot times the matrix of the expert that it chose.

    index int64 [..., S] names an expert for each of a row's S slots; x [..., S, in], or [..., 1, in] where slots share
    their row's input; weights [experts, out, in]; bias [experts, out]. A slot whose index is below zero, or not below
    the number of experts, chose none: its result is zero. Returns [..., S, out].
    """
    slots = x.expand(*index.shape, x.shape[-1])
    out = x.new_zeros(*index.shape, weights.shape[1])
    for expert in index.unique().tolist():
        if 0 <= expert < len(weights):
            chosen = index == expert
            offset = bias[expert] if bias is not None else None
            out[chosen] = torch.nn.functional.linear(slots[chosen], weights[expert], offset)
    return out


@expert_linear.register_fake
def _(x: Tensor, weights: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*index.shape, weights.shape[1])


def row_places(sequences: Tensor, lengths: Tensor) -> Tensor:
    """int64 [N]: where in its slot each row is written; sequences int64 [N], lengths int64 [slots]."""
    same = sequences[None, :] == sequences[:, None]
    return lengths[sequences] + same.tril(-1).sum(1)


def ancestry(parents: Tensor) -> Tensor:
    """bool [N, N]: whether column is the row itself or one of its ancestors in this call; parents int64 [N]."""
    count = len(parents)
    result = torch.eye(count, dtype=torch.bool, device=parents.device)
    for row, parent in enumerate(parents.tolist()):
        if parent != NO_PARENT:
            result[row] |= result[parent]
    return result


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """[B, heads, N, value dim]: the textbook formula over visible bool [N, S], in float32 or float64 throughout."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    k, v = (t.to(compute).repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q.to(compute) @ k.transpose(-1, -2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(compute)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : v.shape[2]]
    return (weights @ v).to(q.dtype)
