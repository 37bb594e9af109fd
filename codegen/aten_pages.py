"""Attention over pages that compiled code cannot read, through the operator's reference meaning, a row at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from graft.codegen.kernel_ir import AtenKernel
from graft.codegen.row_form import ROW, View
from graft.compiler.canonical import graft
from graft.compiler.nodes import named_arguments


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
    out = graft.kv_attend_pages(given[f"state {kernel.state}"], q, sinks=sinks, **far, **options)
    array(node.name)[:count].copy_(out[0].flatten(1))


def whole(stored: Tensor, view: View) -> Tensor:
    """A view of all rows; stored [rows, width]."""
    sizes = [len(stored) if size == ROW else size for size in view.dims]
    strides = [stored.stride(0) if size == ROW else step for size, step in zip(view.dims, view.strides, strict=True)]
    return stored.as_strided(sizes, strides, stored.storage_offset() + view.offset)
