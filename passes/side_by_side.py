"""Products of blocks that do not depend on each other as one wide product over the parameters as they are.

before:
    y0 = linear(x0, w_0)
    y1 = linear(x1, w_1)
after:
    l = linear_rows(cat([x0, x1], -1), [w_0, w_1], [], [0, 8, 0, 8], [0, 16])
    y0 = slice(l, -1, 0, 8)
    y1 = slice(l, -1, 8, 16)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graft.compiler.canonical import aten, graft
from graft.compiler.nodes import new_node
from graft.compiler.passing import View
from graft.compiler.trunk import Block

Key = tuple
"""Dtype, inputs, and whether there is a bias: what products must share to stand in one."""


def widen_ends(blocks: Sequence[Block], view: View) -> int:
    """Bring together the products that the blocks begin with, and those that they end with.

    Returns how many were brought together. Nodes are left in the order in which they were made: sort them.
    """
    begin, end = [], []
    for block in blocks:
        linears = [node for node in block.nodes if is_plain(node)]
        behind = {node: behind_others(node, linears, set(block.nodes)) for node in linears}
        read = set().union(*behind.values())
        begin += [node for node in linears if not behind[node]]
        end += [node for node in linears if behind[node] and node not in read]
    return sum(widen(group, view) for part in (begin, end) for group in alike(part))


def is_plain(node: fx.Node) -> bool:
    """Whether the node is a linear over parameters."""
    return node.target is aten.linear.default and all(one is None or one.op == "get_attr" for one in node.args[1:])


def behind_others(node: fx.Node, linears: Sequence[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """Those of the linears that the node depends on, through nodes of the block."""
    found, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source in inside and source not in found:
                found.add(source)
                todo.append(source)
    return found.intersection(linears) - {node}


def alike(linears: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The linears by what they must share."""
    groups: dict[Key, list[fx.Node]] = {}
    for node in linears:
        weight = node.args[1].meta["val"]
        biased = len(node.args) > 2 and node.args[2] is not None
        groups.setdefault((weight.dtype, int(weight.shape[1]), biased), []).append(node)
    return list(groups.values())


def widen(linears: Sequence[fx.Node], view: View) -> int:
    """Replace the linears by one over their inputs side by side; how many they are, or 0 where there is but one."""
    if len(linears) < 2:
        return 0
    graph, last = linears[0].graph, linears[-1]
    inputs = list(dict.fromkeys(node.args[0] for node in linears))
    depth = int(linears[0].args[1].meta["val"].shape[1])
    starts = [depth * inputs.index(node.args[0]) for node in linears]
    weights = [node.args[1] for node in linears]
    biases = [node.args[2] for node in linears if len(node.args) > 2 and node.args[2] is not None]
    sizes = [int(weight.meta["val"].shape[0]) for weight in weights]
    ranges = [bound for size in sizes for bound in (0, size)]
    with graph.inserting_before(last):
        x = inputs[0]
        if len(inputs) > 1:
            x = new_node(graph, aten.cat.default, (inputs, -1), like=last, by=view.by)
        merged = new_node(graph, graft.linear_rows.default, (x, weights, biases, ranges, starts), like=last, by=view.by)
    at = 0
    for node, size in zip(linears, sizes, strict=True):
        with graph.inserting_after(merged):
            part = new_node(graph, aten.slice.Tensor, (merged, -1, at, at + size), like=node, by=view.by)
        node.replace_all_uses_with(part)
        graph.erase_node(node)
        at += size
    return len(linears)
