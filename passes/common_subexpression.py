"""Compute once what is computed twice: equal operators on equal operands.

before:
    a = cos(angles)
    b = cos(angles)
    y = add(a, b)
after:
    a = cos(angles)
    y = add(a, a)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graft.compiler.passing import Contract, Pass, View, exact


@dataclass(frozen=True)
class CommonSubexpression(Pass):
    """Every operator is a function of its operands alone, so equal calls have equal results."""

    contract: ClassVar[Contract] = exact
    tidies: ClassVar[bool] = True

    def run(self, view: View) -> None:
        for function in view.functions:
            seen: dict[tuple, object] = {}
            for node in list(function.graph.nodes):
                if node.op not in {"call_function", "get_attr"}:
                    continue
                key = (node.op, node.target, repr(node.args), repr(node.kwargs))
                first = seen.setdefault(key, node)
                if first is not node:
                    node.replace_all_uses_with(first)
                    function.graph.erase_node(node)
                    view.match()
        if not view.matches:
            view.miss("every function", "no two calls are equal")
