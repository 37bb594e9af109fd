"""Merge linears that read the same input (QKV, gate and up) into one, over an ordered list of parameters.

before:
    q = linear(x, w_q)
    k = linear(x, w_k)
after:
    l = linear_rows(x, [w_q, w_k], [], [0, 64, 0, 32])
    q = slice(l, -1, 0, 64)
    k = slice(l, -1, 64, 96)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graft.compiler.canonical import aten, graft
from graft.compiler.nodes import call_nodes, new_node
from graft.compiler.passing import Contract, Pass, View, exact


@dataclass(frozen=True)
class MergeLinears(Pass):
    """One read of x and one kernel in the place of several; no new parameter is made, nothing is held twice."""

    contract: ClassVar[Contract] = exact
    tidies: ClassVar[bool] = True

    def run(self, view: View) -> None:
        for function in view.functions:
            groups: dict[tuple, list[fx.Node]] = {}
            for node in call_nodes(function.graph, [aten.linear.default]):
                weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
                if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
                    view.miss(node.name, "weight or bias is computed, not a parameter")
                    continue
                groups.setdefault((node.args[0], bias is not None), []).append(node)
            for linears in groups.values():
                if len(linears) > 1:
                    merge(linears, view)
                else:
                    view.miss(linears[0].name, "no other linear reads its input")


def merge(linears: list[fx.Node], view: View) -> None:
    """Replace the linears by one node and a slice for each."""
    graph, first = linears[0].graph, linears[0]
    x, weights = first.args[0], [node.args[1] for node in linears]
    biases = [node.args[2] for node in linears if len(node.args) > 2 and node.args[2] is not None]
    sizes = [int(weight.meta["val"].shape[0]) for weight in weights]
    for operand in reversed([*weights, *biases]):
        if operand > first:
            first.prepend(operand)
    with graph.inserting_before(first):
        ranges = [bound for size in sizes for bound in (0, size)]
        merged = new_node(graph, graft.linear_rows.default, (x, weights, biases, ranges), like=first, by=view.by)
    start = 0
    for node, size in zip(linears, sizes, strict=True):
        with graph.inserting_before(node):
            part = new_node(graph, aten.slice.Tensor, (merged, -1, start, start + size), like=node, by=view.by)
        node.replace_all_uses_with(part)
        graph.erase_node(node)
        start += size
    view.match()
