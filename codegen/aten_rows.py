"""Nodes that no kernel takes, through ATen: one row at a time, so that no row's result depends on its company."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from graft.codegen.kernel_ir import AtenKernel
from graft.codegen.row_form import ROW, View
from graft.compiler.shapes import attribute

Loose = dict[fx.Node, list[Any]]
"""Values that have no row form, row by row."""


@torch.no_grad()
def run_rows(
    kernel: AtenKernel, weights: nn.Module, count: int, array: Callable[[str], Tensor], loose: Loose
) -> None:
    """Run a kernel's nodes for each of `count` rows, of a guarded one for those that need it. `array` gives the array
    of that name, [rows, width] (constants [1, width]); results are written there, or into `loose`."""
    for node in kernel.results:
        if node not in kernel.views:
            loose[node] = []
    for row in rows_needed(kernel, count, array):
        known: dict[fx.Node, Any] = {}
        for node in kernel.operands:
            if node in kernel.views:
                view = kernel.views[node]
                known[node] = seen(array(view.base.name), row, view, node.meta["val"].dtype)
            else:
                known[node] = loose[node][row]
        for node in kernel.nodes:
            known[node] = evaluate(node, known, weights)
        for node in kernel.results:
            if node in kernel.views:
                array(node.name)[row].copy_(known[node].reshape(-1))
            else:
                loose[node].append(known[node])


def rows_needed(kernel: AtenKernel, count: int, array: Callable[[str], Tensor]) -> Iterable[int]:
    """The rows to run. What is handed on row by row is there for every row."""
    if kernel.guard is None or not all(node in kernel.views for node in kernel.results):
        return range(count)
    mask = array(kernel.guard.mask.name)[:count, 0] != 0
    found: list[int] = (mask == kernel.guard.wanted).nonzero().flatten().tolist()
    return found


def seen(stored: Tensor, row: int, view: View, dtype: torch.dtype) -> Tensor:
    """A view of one row, with one row in the dim of rows."""
    sizes = [1 if size == ROW else size for size in view.dims]
    one = stored[row if stored.shape[0] > 1 or ROW in view.dims else 0]
    strides = [step or 0 for step in view.strides]
    found = one.as_strided(sizes, strides, one.storage_offset() + view.offset)
    return found.to(dtype)


def evaluate(node: fx.Node, known: dict[fx.Node, Any], weights: nn.Module) -> Any:
    """A node's value; what it needs of parameters and sizes is looked up or computed on the way."""
    if node in known:
        return known[node]
    if node.op == "get_attr":
        known[node] = attribute(weights, node.target)
    elif node.target is torch.ops.aten.sym_size.int and node.args[0] not in known:
        size = node.args[0].meta["val"].shape[node.args[1]]
        known[node] = size if isinstance(size, int) or size.node.expr.is_number else 1
    else:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: evaluate(source, known, weights))
        known[node] = node.target(*args, **kwargs)
    return known[node]
