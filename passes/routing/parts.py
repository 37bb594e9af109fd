"""A dense feed-forward taken apart: the products with its input, what happens to each neuron, the product behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graft.compiler.canonical import ATTENTION, MATMULS, ROW_WISE, aten, graft
from graft.compiler.errors import PassError
from graft.compiler.nodes import new_node, place_of
from graft.compiler.trunk import Block
from graft.passes.side_by_side import behind_others, is_plain


@dataclass(frozen=True)
class DenseFeedForward:
    """Gated or not: the products that it begins with (one, or gate and up), and the one that it ends with."""

    x: fx.Node
    """What the first products read, [..., width]."""
    first: tuple[fx.Node, ...]
    inner: tuple[fx.Node, ...]
    """Element by element between them, in graph order."""
    down: fx.Node

    @property
    def intermediate(self) -> int:
        """Neurons."""
        return int(self.down.args[1].meta["val"].shape[1])

    def block(self, start: int, end: int, by: str) -> fx.Node:
        """Nodes, at the graph's insertion point, that compute the neurons from `start` to `end` and what they add to
        the result, its bias left out; over ranges of the parameters as they are."""
        graph = self.down.graph

        def make(target: Any, *args: Any, like: fx.Node) -> fx.Node:
            return new_node(graph, target, args, like=like, by=by)

        weights = [one.args[1] for one in self.first]
        biases = [one.args[2] for one in self.first if has_bias(one)]
        known: dict[fx.Node, fx.Node] = {}
        if len(biases) in (0, len(weights)):
            ranges = [start, end] * len(weights)
            product = make(graft.linear_rows.default, self.x, weights, biases, ranges, like=self.first[0])
            for place, one in enumerate(self.first):
                at = place * (end - start), (place + 1) * (end - start)
                known[one] = make(aten.slice.Tensor, product, -1, *at, like=one) if len(weights) > 1 else product
        else:
            for one in self.first:
                own = [one.args[2]] if has_bias(one) else []
                known[one] = make(
                    graft.linear_rows.default, self.x, [one.args[1]], own, [start, end], like=one
                )
        for node in self.inner:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: known.get(source, source))
            known[node] = new_node(graph, node.target, args, kwargs, like=node, by=by)
        width = int(self.down.meta["val"].shape[-1])
        hidden, weight = known[self.down.args[0]], self.down.args[1]
        return make(
            graft.linear_rows.default, hidden, [weight], [], [0, width], None, [start, end], like=self.down
        )


def has_bias(linear: fx.Node) -> bool:
    """Whether a linear adds a bias."""
    return len(linear.args) > 2 and linear.args[2] is not None


def take_apart(block: Block) -> DenseFeedForward:
    """The parts of a feed-forward block. Raises PassError, saying what is in the way, where it has others."""
    inside = set(block.nodes)
    linears = [node for node in block.nodes if is_plain(node)]
    behind = {node: behind_others(node, linears, inside) for node in linears}
    first, last = [node for node in linears if not behind[node]], [node for node in linears if behind[node]]
    others = [node for node in block.nodes if node.target in MATMULS | ATTENTION and node not in linears]
    if others or len(last) != 1 or len(first) not in (1, 2) or len({node.args[0] for node in first}) != 1:
        raise refusal(block, f"{len(first)} first and {len(last)} last, {len(others)} of other kinds", block.residual)
    inner = between_products(first, last[0], inside)
    width = last[0].args[1].meta["val"].shape[1]
    for node in inner:
        sources = set(node.all_input_nodes) <= {*first, *inner}
        if not sources or node.target not in ROW_WISE or node.meta["val"].shape[-1] != width:
            raise refusal(block, "neurons that do not stay apart", node)
    return DenseFeedForward(first[0].args[0], tuple(first), tuple(inner), last[0])


def between_products(first: Sequence[fx.Node], last: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """What the last product reads, back to the first ones, in graph order."""
    found: set[fx.Node] = set()
    todo = [last.args[0]]
    while todo:
        node = todo.pop()
        if node not in first and node not in found and node in inside:
            found.add(node)
            todo += node.all_input_nodes
    return sorted(found)


def refusal(block: Block, found: str, node: fx.Node) -> PassError:
    """The error for a feed-forward of another form."""
    return PassError(
        "this feed-forward cannot be cut into blocks of neurons",
        expected="one or two products with its input, element by element what follows, one product behind",
        found=found,
        where=f"layer {block.layer}, {place_of(node)}",
    )
