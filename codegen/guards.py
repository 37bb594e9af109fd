"""Which kernels a choice makes unneeded.

`where(mask, a, b)` with one mask element for each row needs `a` only if some row's mask holds, and `b` only if some
row's does not; `masked_fill(a, mask, number)` needs `a` only in the latter case. What is computed for one of them
alone, and for nothing else, is guarded by the mask: a real branch around the kernel, which then reads no weights. Every
row still gets its own side of the choice, so its result does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from graft.codegen.kernel_ir import Array, Guard, Kernel
from graft.codegen.row_form import Form, View, form_of
from graft.compiler.canonical import ATTENTION, MASKS, MATMULS, STATE_WRITES, aten
from graft.compiler.program import Function

SIDES: dict[Any, dict[int, bool]] = {aten.where.self: {1: True, 2: False}, aten.masked_fill.Scalar: {0: False}}
"""Operator -> for each argument that is chosen or not, what the mask must be for it to count."""


@dataclass(frozen=True)
class Side:
    """One side of a choice: the mask, and which of its values needs this side."""

    mask: fx.Node
    wanted: bool


def sides(graph: fx.Graph, forms: Mapping[fx.Node, Form]) -> dict[fx.Node, list[Side]]:
    """For each node the sides of choices that alone need it, the innermost first."""
    found: dict[fx.Node, list[Side]] = {}
    for node in reversed(graph.nodes):
        if node.target in SIDES:
            place = MASKS[node.target]
            mask, result = forms.get(node.args[place]), forms.get(node)
            if mask is not None and result is not None and mask.rows == result.rows != "" and mask.width == 1:
                for operand, wanted in SIDES[node.target].items():
                    for needed in needed_for(node, operand):
                        found.setdefault(needed, []).insert(0, Side(node.args[place], wanted))
    return found


def needed_for(choice: fx.Node, place: int) -> Iterator[fx.Node]:
    """The nodes whose values reach nothing but that operand of the choice."""
    inside: set[fx.Node] = set()
    left = [choice.args[place]]
    while left:
        node = left.pop()
        if not isinstance(node, fx.Node) or node in inside or node.op != "call_function" or node.target in STATE_WRITES:
            continue
        elsewhere = [at for at, operand in enumerate(choice.args) if operand is node and at != place]
        if elsewhere or any(user is not choice and user not in inside for user in node.users):
            continue  # looked at again from each of its users
        inside.add(node)
        yield node
        left += node.all_input_nodes


@dataclass(frozen=True)
class GuardedNodes:
    """Products and attention that one side of choices alone needs."""

    mask: str
    """Name of the mask's node."""
    wanted: bool
    nodes: tuple[fx.Node, ...]
    regions: int
    """Runs of them with no other product, attention or append between."""

    @property
    def name(self) -> str:
        """As skips.guard_text has it."""
        return f"{'some' if self.wanted else 'not all'} {self.mask}"


def guarded_nodes(function: Function) -> list[GuardedNodes]:
    """What a function on flat rows guards, where it is not cut into kernels: of each product and attention the
    innermost side that needs it."""
    graph = function.graph
    if not any(node.target in SIDES for node in graph.nodes):
        return []
    rows = {function.placeholder(name).meta["val"].shape[0].node.expr: kind for name, kind in ROWS.items()}
    forms = {node: form_of(node.meta["val"], rows) for node in graph.nodes if node.op == "call_function"}
    needing = sides(graph, {node: form for node, form in forms.items() if form is not None})
    held: dict[Side, list[fx.Node]] = {}
    regions: dict[Side, int] = {}
    before: Side | None = None
    for node in graph.nodes:
        if node.target in MATMULS | ATTENTION | STATE_WRITES:
            side = next(iter(needing.get(node, ())), None)
            if side is not None:
                held.setdefault(side, []).append(node)
                regions[side] = regions.get(side, 0) + (side != before)
            before = side
    return [GuardedNodes(side.mask.name, side.wanted, tuple(nodes), regions[side]) for side, nodes in held.items()]


ROWS = {"tokens": "N", "wanted": "R"}
"""Inputs whose first sizes count rows of the call, and rows whose logits are wanted."""


class Guarding:
    """Puts guards on kernels as they are lined up: a mask has to be there before what it guards."""

    def __init__(self, graph: fx.Graph, forms: Mapping[fx.Node, Form], views: Mapping[fx.Node, View]) -> None:
        self.sides, self.views = sides(graph, forms), views
        self.made: set[fx.Node] = set()

    def guarded(self, kernel: Kernel, rows: str, arrays: Mapping[fx.Node, Array]) -> Kernel:
        """The kernel, with a guard where all that it computes is needed for one side of a choice only."""
        common = [
            side
            for side in self.sides.get(kernel.nodes[0], ())
            if all(side in self.sides.get(node, ()) for node in kernel.nodes)
        ]
        self.made.update(kernel.nodes)
        for side in common:
            view = self.views.get(side.mask)
            if view is not None and view.offset == 0 and view.base in self.made and arrays[view.base].width == 1:
                array = arrays[view.base]
                if array.rows == rows:
                    return replace(kernel, guard=Guard(array, side.wanted))
        return kernel
