"""Let the layers of a group read the group's input, so that their products stand side by side in one.

before:
    h1 = add(h0, attention(norm(h0)))
    h2 = add(h1, feed_forward(norm(h1)))
    h3 = add(h2, attention(norm(h2)))
    h4 = add(h3, feed_forward(norm(h3)))
after (layer-parallel{groups=((0,1),)}):
    h1 = add(h0, attention(norm(h0)))
    h2 = add(h1, feed_forward(norm(h1)))
    h3 = add(h2, attention(norm(h0)))
    h4 = add(h3, feed_forward(norm(h3)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from graft.compiler.canonical import aten
from graft.compiler.errors import PassError, PlanError
from graft.compiler.nodes import new_node, sort_nodes
from graft.compiler.passing import Contract, Pass, View, approximate
from graft.compiler.trunk import Block, Trunk
from graft.passes.side_by_side import widen_ends


@dataclass(frozen=True)
class LayerParallel(Pass):
    """Layers of a group at once (EasySpec, 2502.02493, whose order of additions is not published; this is our choice).

    With kind "attention", x being the group's input, every attention reads x: a_j = attention_j(norm_j(x)), all of them
    at once; then x <- x + a_j and x <- x + feed_forward_j(norm_j(x)) one layer after the other. With kind "layer" the
    feed-forward blocks are at once too, each reading x + a_0 + ... + a_n; in models whose blocks stand side by side
    anyway, both read x. The products that a group's blocks begin with become one `linear_rows`, and those that they end
    with another, over the parameters as they are: no weight is copied. Layers are counted as the trunk has them when
    the pass runs, and a group is one layer behind it: put exits and dropped blocks in front.
    """

    group: int = 2
    """How many consecutive layers form a group."""
    keep_first: int = 2
    """Layers in front that stay as they are."""
    keep_last: int = 2
    """Layers in the end that stay as they are."""
    kind: Literal["attention", "layer"] = "attention"
    groups: tuple[tuple[int, ...], ...] = ()
    """The groups by their layers' numbers, in the place of the three options above."""

    contract: ClassVar[Contract] = approximate
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "cache-free"})

    def __post_init__(self) -> None:
        if min(self.group - 2, self.keep_first, self.keep_last) < 0:
            found = f"group {self.group}, keep_first {self.keep_first}, keep_last {self.keep_last}"
            raise PlanError("layers cannot be grouped so", expected="groups of 2 layers or more", found=found)

    def run(self, view: View) -> None:
        for function in view.functions:
            trunk = view.trunk
            for group in self.chosen(trunk):
                layers = [trunk.layers[number] for number in group]
                fused = regroup(layers, self.kind, view)
                sort_nodes(function.graph)
                function.graph.eliminate_dead_code()
                view.match()
                view.note(f"layers {group[0]} to {group[-1]}: {fused} products in wide ones")

    def chosen(self, trunk: Trunk) -> list[tuple[int, ...]]:
        """The groups, in order. Raises PassError unless they are consecutive layers that exist, each in one group."""
        count = len(trunk.layers)
        inner = range(self.keep_first, count - self.keep_last)
        regular = [tuple(inner[at : at + self.group]) for at in range(0, len(inner), self.group)]
        groups = sorted(self.groups) if self.groups else [group for group in regular if len(group) > 1]
        numbers = [number for group in groups for number in group]
        consecutive = all(list(group) == list(range(group[0], group[0] + len(group))) for group in groups)
        if not groups or not consecutive or len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(count)):
            raise PassError(
                "layer-parallel cannot form the groups",
                expected=f"consecutive layers from 0 to {count - 1}, none in two groups",
                found=groups or f"no two layers between the first {self.keep_first} and the last {self.keep_last}",
                where="groups" if self.groups else "group",
            )
        return groups


def regroup(layers: list[list[Block]], kind: str, view: View) -> int:
    """Let the layers read the group's input; how many products were brought together."""
    blocks = [block for layer in layers for block in layer]
    check_stream(blocks)
    first = blocks[0].stream
    if any(block.kind == "parallel" for block in blocks):
        if kind == "attention":
            raise PassError(
                "attention alone cannot be grouped where it stands beside the feed-forward",
                found="blocks that are both in one residual step",
                remedy='use kind="layer"',
            )
        for block in blocks[1:]:
            read_instead(block, first)
        return widen_ends(blocks, view)
    attention, rest = ([b for b in blocks if (b.kind == "attention") == flag] for flag in (True, False))
    for block in attention:
        read_instead(block, first)
    if kind == "attention":
        return widen_ends(attention, view)
    last, graph = blocks[-1].residual, first.graph
    middle = first
    for block in attention:
        middle = add_after(graph, middle, block, view)
    for block in rest:
        read_instead(block, middle)
    total = middle
    for block in rest:
        total = add_after(graph, total, block, view)
    last.replace_all_uses_with(total)
    return widen_ends(attention, view) + widen_ends(rest, view)


def check_stream(blocks: list[Block]) -> None:
    """Raise PassError unless each block hands the stream to the next as it is."""
    for before, block in zip([None, *blocks], blocks, strict=False):
        if (before and block.stream is not before.residual) or len(block.attention) > 1:
            raise PassError(
                "layers cannot be grouped where the stream is not handed on as it is",
                expected="one attention for each layer, and blocks that add to the stream before them",
                found=f"block {block.index} of layer {block.layer} reads {block.stream.name}",
                remedy="leave these layers out, or group them once only",
            )


def read_instead(block: Block, stream: fx.Node) -> None:
    """Let the block work on another point of the stream; it adds to the same one as before."""
    old = block.stream
    for node in block.nodes:
        node.replace_input_with(old, stream)


def add_after(graph: fx.Graph, stream: fx.Node, block: Block, view: View) -> fx.Node:
    """The stream with the block's output added."""
    term = block.output.node
    with graph.inserting_after(term):
        return new_node(graph, aten.add.Tensor, (stream, term), like=block.residual, by=view.by)
