"""graft::kv_attend_pages: attention of flat rows over the pages and the tail of a KV state, as a reference in torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from graft.compiler.kv.codecs import PAGE, Codec
from graft.compiler.kv.selection import Selection
from graft.compiler.ops import ancestry, row_places, softmax_attention


@torch.library.custom_op("graft::kv_attend_pages", mutates_args=())
def kv_attend_pages(
    kv: Tensor,
    q: Tensor,
    sequences: Tensor,
    parents: Tensor,
    lengths: Tensor,
    starts: Tensor,
    pages: Tensor,
    table: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    channels: Tensor | None,
    layer: int,
    value_dim: int,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    codec: str,
    selection: str,
) -> Tensor:
    """Attention of flat rows over far entries, the tail of their slots, their ancestors in this call, and themselves.

    kv [layers, slots, kv heads, capacity, width] holds tails, whose first numbers are key and value; q [1, heads, N,
    key dim]; sequences, parents int64 [N] as in kv_attend; lengths int64 [slots]: committed tokens in the tail; starts
    int64 [slots]: places of the tail in front of which nothing counts as tail. Far entries of a layer, slot and kv
    head: `counts` int32 [layers, slots, kv heads] of them, 64 in each of the pages that `table` int32 [layers, slots,
    kv heads, P] numbers, in `pages` uint8 [G, page bytes] as `codec` says, or for one in place the tail's first places.
    With a selection a row reads those whose labels it prefers: `labels` uint8 [G, label bytes], [width, units] of a
    page in kv's dtype, and `channels` int64 [layers, slots, kv heads, width]. `codec` and `selection` are components
    as text; no selection is "". Returns [1, N, heads, value dim].

    Every row is computed by itself, its keys lined up along its own path, so that it comes from the same numbers in the
    same shapes whatever other rows there are: what has no kernel runs as it stands here.
    """
    key_dim, heads = q.shape[-1], kv.shape[2]
    place, ancestors = row_places(sequences, lengths), ancestry(parents)
    out = q.new_zeros(q.shape[2], q.shape[1], value_dim)
    for slot in sequences.unique().tolist():
        tail = kv[layer, slot, :, :, : key_dim + value_dim]
        own, numbers, start, committed = counts[layer, slot], table[layer, slot], int(starts[slot]), int(lengths[slot])
        keys, values = far_entries(tail, key_dim, pages, numbers, own, codec, kv.dtype)
        inside = (torch.arange(keys.shape[1], device=kv.device) < own[:, None])[:, None, :]
        for row in (sequences == slot).nonzero().flatten().tolist():
            seen = inside
            if selection and labels is not None and channels is not None:
                queries = q[0, :, row : row + 1].unflatten(0, (heads, -1))
                stored = (labels, numbers, own, channels[layer, slot])
                seen = seen & selected(queries, *stored, layer, selection, kv.dtype)
            path = torch.cat([torch.arange(start, committed, device=kv.device), place[ancestors[row]]])
            near = tail[:, path].to(keys.dtype)
            both = torch.cat([keys, near[..., :key_dim]], 1)[None], torch.cat([values, near[..., key_dim:]], 1)[None]
            visible = torch.cat([seen, seen.new_ones(heads, 1, len(path))], dim=-1)
            visible = visible.repeat_interleave(q.shape[1] // heads, dim=0)
            out[row] = softmax_attention(q[:, :, row : row + 1], *both, visible, scale, softcap, sinks)[0, :, 0]
    return out[None]


@kv_attend_pages.register_fake
def _(
    kv: Tensor,
    q: Tensor,
    sequences: Tensor,
    parents: Tensor,
    lengths: Tensor,
    starts: Tensor,
    pages: Tensor,
    table: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    channels: Tensor | None,
    layer: int,
    value_dim: int,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    codec: str,
    selection: str,
) -> Tensor:
    return q.new_empty(1, q.shape[2], q.shape[1], value_dim)


def far_entries(
    tail: Tensor, key_dim: int, pages: Tensor, table: Tensor, counts: Tensor, codec: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys [kv heads, n, key dim] and values of the far entries of one layer and slot in float32 or float64, n being
    the number of the head that has most; what stands behind a head's `counts` [kv heads] means nothing."""
    how, most = codec_of(codec), int(counts.max())
    if how.in_place or not most:
        wide = tail[:, :most].to(torch.float64 if dtype == torch.float64 else torch.float32)
        return wide[..., :key_dim], wide[..., key_dim:]
    found = pages[table[:, : -(-most // PAGE)].long()]
    keys, values = how.decode(found, key_dim, tail.shape[-1] - key_dim, dtype)
    return keys.flatten(1, 2)[:, :most], values.flatten(1, 2)[:, :most]


def selected(
    queries: Tensor,
    labels: Tensor,
    table: Tensor,
    counts: Tensor,
    channels: Tensor,
    layer: int,
    selection: str,
    dtype: torch.dtype,
) -> Tensor:
    """bool [kv heads, rows, n]: what the rows of one layer and slot read; queries [kv heads, group, rows, key dim]."""
    how, most = selection_of(selection), int(counts.max())
    chosen = queries.new_ones(queries.shape[0], queries.shape[2], most, dtype=torch.bool)
    if layer < how.dense_layers:
        return chosen
    width = how.width(queries.shape[-1])
    for head, count in enumerate(counts.tolist()):
        if count:
            stored = labels[table[head, : -(-count // PAGE)].long()].view(dtype).unflatten(-1, (width, -1))
            own = stored.transpose(-1, -2).flatten(0, 1).float()[None]
            one = slice(head, head + 1)
            chosen[one, :, :count] = how.chosen(queries[one].float(), own, channels[one], count)
    return chosen


@functools.lru_cache(maxsize=64)
def codec_of(text: str) -> Codec:
    """The codec that the text describes."""
    from graft.compiler.spec import parse  # whose kinds of components are made from what this module is about

    found: Codec = parse(text, Codec)
    return found


@functools.lru_cache(maxsize=64)
def selection_of(text: str) -> Selection:
    """The selection that the text describes."""
    from graft.compiler.spec import parse

    found: Selection = parse(text, Selection)
    return found
