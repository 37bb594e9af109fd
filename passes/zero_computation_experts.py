"""Add experts that compute nothing to a mixture: zero, copy and constant experts.

before:
    best = topk(linear(x, w_router), 2)
    gates, i = softmax(getitem(best, 0), -1), getitem(best, 1)
    slots = unsqueeze(x, -2)
    y = expert_linear(silu(expert_linear(slots, w_up, i)), w_down, i)
    h1 = add(h0, sum(mul(y, unsqueeze(gates, -1)), [-2]))
after (zero-computation-experts{folder=...}, behind four experts a zero, a copy and a constant one):
    best = topk(cat([linear(x, w_router), linear(x, w_more)], -1), 2)
    gates, i = softmax(getitem(best, 0), -1), getitem(best, 1)
    slots, j = unsqueeze(x, -2), unsqueeze(i, -1)
    y = expert_linear(silu(expert_linear(slots, w_up, i)), w_down, i)
    y = add(y, masked_fill(slots, ne(j, 5), 0.0))
    a = softmax(slice(linear(slots, w_mix), -1, 0, 2), -1)
    c = add(mul(slots, slice(a, -1, 0, 1)), mul(slice(vectors, 0, 0, 1), slice(a, -1, 1, 2)))
    y = add(y, masked_fill(c, ne(j, 6), 0.0))
    h1 = add(h0, sum(mul(y, unsqueeze(gates, -1)), [-2]))
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import fx

from graft.compiler.building import add_parameters, parameter_node
from graft.compiler.canonical import aten, graft
from graft.compiler.errors import CheckpointError, PassError
from graft.compiler.nodes import new_node, place_of
from graft.compiler.passing import Contract, Pass, View, approximate
from graft.compiler.program import Function
from graft.compiler.trunk import Block
from graft.passes.mixture.config import ZeroComputationConfig, read_experts

SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default})


@dataclass(frozen=True)
class ZeroComputationExperts(Pass):
    """Trained zero, copy and constant experts (MoE++, 2410.07348) behind those of mixtures, with router rows of their
    own; a slot that chooses one of them reads no expert's weights.

    The gates are the model's: what it makes of all scores or of the chosen ones, a zero expert's share being lost. The
    paper's gating residuals are not there. Mixtures whose router ranks anything but scores, or their softmax, are
    refused.
    """

    folder: Path
    """config.json and experts.safetensors (passes/mixture/config.py)."""

    contract: ClassVar[Contract] = approximate
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "cache-free"})

    def run(self, view: View) -> None:
        config, tensors = read_experts(self.folder)
        for function in view.functions:
            blocks = [block for block in view.trunk.feed_forward if products(block)]
            if config.layers[-1] >= len(blocks):
                problem, found = "there are not as many mixtures", f"{len(blocks)} mixtures"
                raise CheckpointError(problem, expected=f"mixture {config.layers[-1]}", found=found, where=self.folder)
            mixtures = {layer: mixture_of(blocks[layer]) for layer in config.layers}
            x = next(iter(mixtures.values())).x.meta["val"]
            config.check(tensors, int(x.shape[-1]), self.folder)
            name = f"zero_computation_experts_of_{function.name}"
            placed = {f"at_{path}": tensor.to(function.device, x.dtype) for path, tensor in tensors.items()}
            add_parameters(view, name, placed)
            for layer, mixture in mixtures.items():
                extend(function, mixture, config, f"{name}.at_{layer}", view.by)
                view.match()
            function.graph.eliminate_dead_code()


@dataclass(frozen=True)
class Mixture:
    """What the experts of a block read, their number, who ranks them, and the product that they end with."""

    x: fx.Node
    index: fx.Node
    count: int
    logits: fx.Node
    softmax: fx.Node | None
    best: fx.Node
    down: fx.Node


def products(block: Block) -> list[fx.Node]:
    """The products with experts in a block, in order."""
    return [node for node in sorted(block.nodes) if node.target is graft.expert_linear.default]


def mixture_of(block: Block) -> Mixture:
    """The parts of a mixture. Raises PassError where it has others."""
    up, *rest = products(block)
    index = up.args[2]
    best = index.args[0] if index.target is operator.getitem else index
    ranked = best.args[0] if best.target is aten.topk.default else best
    softmax = ranked if ranked.target in SOFTMAXES and set(ranked.users) == {best} else None
    logits = ranked.args[0] if softmax is not None else ranked
    ends = len(rest) == 1 and rest[0].args[2] is index and set(index.users) == {up, *rest}
    sizes = ends and rest[0].meta["val"].shape[-1] == up.args[0].meta["val"].shape[-1]
    scores = best.target is aten.topk.default and logits.target is aten.linear.default
    count = int(up.args[1].meta["val"].shape[0])
    if not sizes or not scores or logits.meta["val"].shape[-1] != count:
        raise PassError(
            "this mixture cannot have experts that compute nothing",
            expected="topk of a linear's scores, or of their softmax, that is read by two products with experts alone",
            found=place_of(best),
            where=f"layer {block.layer}",
        )
    return Mixture(up.args[0], index, count, logits, softmax, best, rest[0])


def extend(function: Function, mixture: Mixture, config: ZeroComputationConfig, path: str, by: str) -> None:
    """Rank the experts at a path together with the mixture's own, and add what they give."""
    graph, x, down = function.graph, mixture.x, mixture.down

    def make(target: Any, *args: Any) -> fx.Node:
        return new_node(graph, target, args, like=down, by=by)

    with graph.inserting_before(mixture.softmax or mixture.best):
        more = make(aten.linear.default, mixture.logits.args[0], parameter_node(function, f"{path}.router", down, by))
        scores = make(aten.cat.default, [mixture.logits, more], -1)
    for node in filter(None, (mixture.softmax, mixture.best)):
        with graph.inserting_before(node):
            scores = new_node(graph, node.target, (scores, *node.args[1:]), node.kwargs, like=node, by=by)
        node.replace_all_uses_with(scores)
    first = mixture.count + config.zero
    readers = list(down.users)
    with graph.inserting_before(down.next):
        chosen, total = make(aten.unsqueeze.default, mixture.index, -1), down
        given = [x] * config.copy
        if config.constant:
            mix, vectors = (parameter_node(function, f"{path}.{name}", down, by) for name in ("mix", "vectors"))
            both = make(aten.linear.default, x, mix)
        for at in range(config.constant):
            a = make(aten.softmax.int, make(aten.slice.Tensor, both, -1, 2 * at, 2 * at + 2), -1)
            one, two = (make(aten.slice.Tensor, a, -1, part, part + 1) for part in (0, 1))
            vector = make(aten.slice.Tensor, vectors, 0, at, at + 1)
            given.append(make(aten.add.Tensor, make(aten.mul.Tensor, x, one), make(aten.mul.Tensor, vector, two)))
        for number, value in enumerate(given, first):
            other = make(aten.ne.Scalar, chosen, number)
            total = make(aten.add.Tensor, total, make(aten.masked_fill.Scalar, value, other, 0.0))
    for user in readers:
        user.replace_input_with(down, total)
