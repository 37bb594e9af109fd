"""Drop nodes whose results nobody reads, and states that nothing writes.

before:
    a = linear(h, w)
    b = silu(a)
    return h
after:
    return h
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graft.compiler.passing import Contract, Pass, View, exact


@dataclass(frozen=True)
class DeadCode(Pass):
    """Every operator is functional, so a call without users is dead; inputs stay, they are the signature."""

    contract: ClassVar[Contract] = exact
    tidies: ClassVar[bool] = True

    def run(self, view: View) -> None:
        for function in view.functions:
            for node in reversed(list(function.graph.nodes)):
                if node.op in {"call_function", "get_attr"} and not node.users:
                    function.graph.erase_node(node)
                    view.match(node.op == "call_function")
        if not view.matches:
            view.miss("every function", "each call has a user")
