"""Everything known about one node: where it comes from, what it reads and feeds, who changed it, what it costs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from graft.compiler.cost import Workload, node_cost
from graft.compiler.errors import GraftError
from graft.compiler.layers import find_layers
from graft.compiler.listing import results, wrapped
from graft.compiler.nodes import origin_of
from graft.compiler.notation import Notation, bytes_text, count_text
from graft.compiler.program import Function, Program
from graft.compiler.shapes import attribute


@dataclass(frozen=True)
class Event:
    """A pass that made, changed or removed the node."""

    by: str
    """Name of the snapshot: "capture", or the pass."""
    what: str
    """"made", "changed", "resized" or "removed"."""
    line: str
    """The node as it was from then on; empty where it was removed."""


@dataclass(frozen=True)
class Explanation:
    """Everything known about one node; str() is the text."""

    function: str
    name: str
    kind: str
    """"call", "parameter", "input" or "output"."""
    type: str
    call: str
    """The right-hand side; a parameter's path."""
    module: str
    source: str
    role: str
    layer: int | None
    same_in: tuple[int, ...]
    """Other layers in which the same node stands in the same place."""
    operands: dict[str, str]
    """Name -> type."""
    users: dict[str, str]
    """Name -> call."""
    passes: tuple[str, ...]
    history: tuple[Event, ...]
    cost: dict[str, str]
    cost_at: str
    """The cost in numbers, and for which sizes."""

    def __str__(self) -> str:
        rows = [
            ("kind", self.kind),
            ("role", self.role + (f", layer {self.layer}" if self.layer is not None else "")),
            ("same in", f"layer{'s' * (len(self.same_in) > 1)} {numbers(self.same_in)}" if self.same_in else ""),
            ("module", self.module),
            ("source", self.source),
            ("passes", ", ".join(self.passes)),
            *([("FLOPs", self.cost["flops"]), ("bytes", self.cost["bytes"])] if self.cost_at else []),
            ("", self.cost_at),
        ]
        lines = wrapped(f"{self.function}: {self.name}: {self.type} = ", self.call, " " * 8)
        for title, text in rows:
            lines += wrapped(f"  {title:<9} ", text, " " * 14) if text else []
        for title, table in (("reads", self.operands), ("feeds", self.users)):
            width = max(map(len, table), default=0) + 1
            for index, (name, text) in enumerate(table.items()):
                start = f"  {title if index == 0 else '':<9} {name + ':':<{width}} "
                lines += wrapped(start, text, " " * len(start))
        for index, event in enumerate(self.history):
            start = f"  {'history' if index == 0 else '':<9} {event.what} by {event.by}"
            lines += wrapped(f"{start}: ", event.line, " " * 16) if event.line else [start]
        return "\n".join(lines)

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """The same as dicts and lists."""
        plain = {key: value for key, value in vars(self).items() if key not in {"history", "same_in", "passes"}}
        history = [vars(event) for event in self.history]
        return {**plain, "same_in": list(self.same_in), "passes": list(self.passes), "history": history}


def explain_node(program: Program, name: str, function: str | None = None) -> Explanation:
    """Everything known about the node or parameter of that name, in `function` or in the first that has it.

    A node that a pass removed is explained as it last was. Raises GraftError for an unknown name, naming the nearest.
    """
    if function is not None:
        program[function]
    snapshots = [("now", program), *reversed(list(program.snapshots.items()))]
    for _, snapshot in snapshots:
        for candidate in snapshot.functions.values():
            node = find_node(candidate, name) if function in (None, candidate.name) else None
            if node is not None:
                return explanation(program, candidate, node)
    known = dict.fromkeys(node.name for f in program.functions.values() for node in f.graph.nodes)
    known |= dict.fromkeys(n.target for f in program.functions.values() for n in f.graph.nodes if n.op == "get_attr")
    near = difflib.get_close_matches(name, known, 3)
    raise GraftError(
        "the program has no such node, and no pass removed one",
        expected="a node's name as in the listing, or a parameter's path",
        found=name,
        where=f"function {function}" if function else ", ".join(program.functions),
        remedy=f"did you mean {', '.join(near)}?" if near else "print(program) shows all names",
    )


def find_node(function: Function, name: str) -> fx.Node | None:
    """The node of that name, or the one that reads the parameter at that path."""
    nodes: Iterable[fx.Node] = function.graph.nodes
    return next((node for node in nodes if node.name == name or (node.op == "get_attr" and node.target == name)), None)


def explanation(program: Program, function: Function, node: fx.Node) -> Explanation:
    """What is known about a node of the function."""
    notation, layers = Notation(function), find_layers(function)
    layer = next((section.layer for section in layers.layers if node in section.nodes), None)
    twin = layers.twins.get(node)
    same = [s.layer for s in layers.layers if s.layer != layer and any(layers.twins.get(n) is twin for n in s.nodes)]
    roles = layers.trunk.roles() if layers.trunk else {}
    origin, cost = origin_of(node), node_cost(function, node)
    estimate = cost.at(Workload())
    sizes = f" at {Workload().text(cost.symbols)}" if cost.symbols else ""
    return Explanation(
        function=function.name,
        name=node.name,
        kind={"call_function": "call", "get_attr": "parameter", "placeholder": "input"}.get(node.op, node.op),
        type=notation.node_type(node),
        call=right_side(function, notation, node),
        module=origin.module,
        source=origin.source,
        role=roles.get(node, ""),
        layer=layer,
        same_in=tuple(same) if twin else (),
        operands={notation.argument(n): notation.node_type(n) for n in node.all_input_nodes if not is_number(n)},
        users={user.name: right_side(function, notation, user) for user in node.users},
        passes=origin.passes,
        history=history(program, function.name, node.name),
        cost=cost.to_json() if node.op == "call_function" else {},
        cost_at=f"{count_text(estimate.flops, 'FLOP')}, {bytes_text(estimate.bytes)}{sizes}" if estimate.bytes else "",
    )


def numbers(values: Iterable[int]) -> str:
    """Ascending numbers with ranges: "1-5, 7"."""
    ranges: list[list[int]] = []
    for value in values:
        if ranges and ranges[-1][1] == value - 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def is_number(node: fx.Node) -> bool:
    """Whether the node is a size, which is written out where it is used."""
    value = node.meta.get("val")
    return value is not None and not isinstance(value, (Tensor, tuple, list))


def right_side(function: Function, notation: Notation, node: fx.Node) -> str:
    """What stands behind the equals sign, for nodes of every kind."""
    if node.op == "call_function":
        return notation.call(node)
    if node.op == "output":
        return f"return {', '.join(notation.argument(value) for value in results(function))}"
    if node.op == "get_attr":
        held = attribute(function.weights, node.target)
        return f"{node.target} ({bytes_text(held.nbytes)})" if isinstance(held, Tensor) else str(node.target)
    return f"input of {function.name}"


def history(program: Program, function: str, name: str) -> tuple[Event, ...]:
    """When the node was made, changed, resized and removed, by the program's snapshots."""
    events: list[Event] = []
    before: tuple[str, str] | None = None
    for by, snapshot in program.snapshots.items():
        found = snapshot.functions.get(function)
        node = find_node(found, name) if found else None
        after = None
        if found and node:
            notation = Notation(found)
            after = right_side(found, notation, node), notation.node_type(node)
        if after != before:
            what = "made" if before is None else "removed" if after is None else "changed"
            if before and after and before[0] == after[0]:
                what = "resized"
            events.append(Event(by, what, f"{after[1]} = {after[0]}" if after else ""))
        before = after
    return tuple(events)
