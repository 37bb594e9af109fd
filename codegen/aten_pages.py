"""Attention over pages that compiled code cannot read: the codec's own decoder, then one row at a time through ATen.

A row's keys are lined up along its own path, so that it is computed from the same numbers in the same shapes whatever
other rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from graft.codegen.kernel_ir import AtenKernel
from graft.codegen.row_form import ROW, View
from graft.compiler.kv.attention import far_entries, selected
from graft.compiler.nodes import named_arguments
from graft.compiler.ops import ancestry, row_places, softmax_attention


@torch.no_grad()
def attend_pages(
    kernel: AtenKernel, given: Mapping[str, Tensor], count: int, array: Callable[[str], Tensor]
) -> None:
    """Run a kernel that is one graft::kv_attend_pages over `count` rows. `given` has inputs by name, "state INDEX"
    among them; `array` gives the array of that name, [rows, width], where the result is written."""
    (node,) = kernel.nodes
    named = named_arguments(node)
    view = kernel.views[named["q"]]
    q = whole(array(view.base.name)[:count], view)
    sinks = array(kernel.views[named["sinks"]].base.name).reshape(-1) if named["sinks"] is not None else None
    inputs = ("sequences", "parents", "lengths", "starts", "pages", "table", "counts", "labels", "channels")
    far: dict[str, Any] = {name: given[named[name].name] if named[name] is not None else None for name in inputs}
    options = {name: named[name] for name in ("layer", "value_dim", "scale", "softcap", "codec", "selection")}
    out = row_by_row(given[f"state {kernel.state}"], q, sinks=sinks, **far, **options)
    array(node.name)[:count].copy_(out.flatten(1))


def whole(stored: Tensor, view: View) -> Tensor:
    """A view of all rows; stored [rows, width]."""
    sizes = [len(stored) if size == ROW else size for size in view.dims]
    strides = [stored.stride(0) if size == ROW else step for size, step in zip(view.dims, view.strides, strict=True)]
    return stored.as_strided(sizes, strides, stored.storage_offset() + view.offset)


def row_by_row(
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
    """graft::kv_attend_pages, [N, heads, value dim]: the same arguments, every row by itself."""
    key_dim, heads = q.shape[-1], kv.shape[2]
    place, ancestors = row_places(sequences, lengths), ancestry(parents)
    out = q.new_empty(q.shape[2], q.shape[1], value_dim)
    for slot in sequences.unique().tolist():
        tail = kv[layer, slot, :, :, : key_dim + value_dim]
        own, numbers, start, committed = counts[layer, slot], table[layer, slot], int(starts[slot]), int(lengths[slot])
        keys, values = far_entries(tail, key_dim, pages, numbers, own, codec, kv.dtype)
        inside = (torch.arange(keys.shape[1], device=kv.device) < own[:, None])[:, None, :]
        for row in (sequences == slot).nonzero().flatten().tolist():
            seen = inside
            if selection and labels is not None and channels is not None:
                queries = q[0, :, row : row + 1].unflatten(0, (heads, -1))
                seen = seen & selected(
                    queries, labels, numbers, own, channels[layer, slot], layer, selection, kv.dtype
                )
            path = torch.cat([torch.arange(start, committed, device=kv.device), place[ancestors[row]]])
            near = tail[:, path].to(keys.dtype)
            out[row] = softmax_attention(
                q[:, :, row : row + 1],
                torch.cat([keys, near[..., :key_dim]], dim=1)[None],
                torch.cat([values, near[..., key_dim:]], dim=1)[None],
                torch.cat([seen, seen.new_ones(heads, 1, len(path))], dim=-1).repeat_interleave(
                    q.shape[1] // heads, dim=0
                ),
                scale,
                softcap,
                sinks,
            )[0, :, 0]
    return out
