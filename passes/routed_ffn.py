"""Run of chosen feed-forwards, for every token, only the blocks of neurons that a router names.

before:
    h1 = add(h0, linear(silu(linear(x, w_up)), w_down))
after (routed-ffn{folder=...}, two blocks of six neurons, of which each token runs one):
    scores = linear(x, w_router, b_router)
    above = gt(sub(unsqueeze(scores, -2), unsqueeze(scores, -1)), 0.0)
    rank = sum(_to_copy(above, dtype=float32), [-1])
    y0 = linear_rows(silu(linear_rows(x, [w_up], [], [0, 6])), [w_down], [], [0, 8], None, [0, 6])
    y1 = linear_rows(silu(linear_rows(x, [w_up], [], [6, 12])), [w_down], [], [0, 8], None, [6, 12])
    y0 = masked_fill(y0, ge(slice(rank, -1, 0, 1), 1), 0.0)
    y1 = masked_fill(y1, ge(slice(rank, -1, 1, 2), 1), 0.0)
    h1 = add(h0, add(y0, y1))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from graft.compiler.building import add_parameters, parameter_node
from graft.compiler.canonical import aten
from graft.compiler.errors import CheckpointError
from graft.compiler.nodes import new_node
from graft.compiler.passing import Contract, Pass, View, approximate
from graft.compiler.program import Function
from graft.passes.routing.config import RoutingConfig, read_routers
from graft.passes.routing.parts import DenseFeedForward, has_bias, take_apart


@dataclass(frozen=True)
class RoutedFFN(Pass):
    """Dense feed-forwards as blocks of their own neurons behind a trained router (passes/routing/config.py says in
    which forms, after which papers). No parameter is made but the routers': blocks are ranges of the model's.

    A router reads what the feed-forward reads; where its scores are equal, both count as the higher one. Every token
    decides for itself, and a block that no row of a call runs reads no weights.
    """

    folder: Path
    """Trained routers; `graft.train_routers` makes them."""

    contract: ClassVar[Contract] = approximate
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "cache-free"})

    def run(self, view: View) -> None:
        config, tensors = read_routers(self.folder)
        for function in view.functions:
            blocks = view.trunk.feed_forward
            parts = {layer: take_apart(blocks[layer]) for layer in config.layers if layer < len(blocks)}
            check(config, parts, len(blocks), self.folder)
            dtype, device = next(iter(parts.values())).x.meta["val"].dtype, function.device
            name = f"routers_of_{function.name}"
            placed = {path: tensor.to(device, dtype) for path, tensor in tensors.items()}
            add_parameters(view, name, {f"at_{path}": tensor for path, tensor in placed.items()})
            for layer, part in parts.items():
                route(function, part, config, f"{name}.at_{layer}", view.by)
                view.match()
            function.graph.eliminate_dead_code()


def check(config: RoutingConfig, parts: dict[int, DenseFeedForward], count: int, folder: Path) -> None:
    """Raise CheckpointError unless the routers are for feed-forwards such as these."""
    sizes = {(int(part.x.meta["val"].shape[-1]), part.intermediate) for part in parts.values()}
    if len(parts) < len(config.layers) or sizes != {(config.width, config.intermediate)}:
        raise CheckpointError(
            "the routers are not for this model",
            expected=f"up to {count} feed-forwards of width and neurons {', '.join(map(str, sorted(sizes)))}",
            found=f"feed-forwards up to {config.layers[-1]} of {config.width, config.intermediate}",
            where=folder,
        )


def route(function: Function, part: DenseFeedForward, config: RoutingConfig, path: str, by: str) -> None:
    """Let the router at a path choose among the blocks of a feed-forward."""
    graph, down = function.graph, part.down

    def make(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return new_node(graph, target, args, kwargs, like=down, by=by)

    total: fx.Node | None = None
    with graph.inserting_before(down):
        weight, bias = (parameter_node(function, f"{path}.{name}", down, by) for name in ("weight", "bias"))
        scores = make(aten.linear.default, part.x, weight, bias)
        if scores.meta["val"].dtype.itemsize < 4:
            scores = make(aten._to_copy.default, scores, dtype=torch.float32)
        pairs = make(aten.unsqueeze.default, scores, -2), make(aten.unsqueeze.default, scores, -1)
        above = make(aten.gt.Scalar, make(aten.sub.Tensor, *pairs), 0.0)
        rank = make(aten.sum.dim_IntList, make(aten._to_copy.default, above, dtype=torch.float32), [-1])
        # All masks stand in front of all blocks, so that they are there when a block is asked for.
        masks = {block: skipped(make, rank, config, block) for block in range(config.blocks)}
        for block, mask in masks.items():
            if config.needing(block)[0] == config.outputs:
                continue
            value = part.block(config.bounds[block], config.bounds[block + 1], by)
            value = value if mask is None else make(aten.masked_fill.Scalar, value, mask, 0.0)
            total = value if total is None else make(aten.add.Tensor, total, value)
        assert total is not None
        if has_bias(down):
            total = make(aten.add.Tensor, total, down.args[2])
    down.replace_all_uses_with(total)


def skipped(make: Any, rank: fx.Node, config: RoutingConfig, block: int) -> fx.Node | None:
    """bool [..., 1]: which rows do without the block; None where no row ever does, or all do."""
    first, last = config.needing(block)
    if first == config.outputs or last - first == config.outputs:
        return None
    best = make(aten.slice.Tensor, rank, -1, first, last)
    if last - first > 1:
        best = make(aten.amin.default, best, [-1], True)
    mask: fx.Node = make(aten.ge.Scalar, best, config.top_k or 1)
    return mask
