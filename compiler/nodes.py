"""The one place where graph nodes are made, so that no pass can forget shapes or provenance."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg

aten = torch.ops.aten


@dataclass(frozen=True)
class Origin:
    """Where a node comes from."""

    module: str = ""
    """Path of the module whose forward made it, e.g. "model.layers.3.mlp"."""
    source: str = ""
    """Line of the model's code, e.g. "modeling_llama.py:176"."""
    passes: tuple[str, ...] = ()
    """The passes that made or touched it, in order."""


def origin_of(node: fx.Node) -> Origin:
    """The node's provenance; empty where none was recorded."""
    return node.meta.get("origin", Origin())


def place_of(node: fx.Node) -> str:
    """A node as errors name it: the call, the module whose forward made it, the line of its code."""
    origin = origin_of(node)
    return f"{node.format_node()} in {origin.module or 'no module'}" + (f" ({origin.source})" if origin.source else "")


def value_of(argument: Any) -> Any:
    """The argument with every node replaced by its fake value (meta["val"])."""
    return map_arg(argument, lambda node: node.meta["val"])


def evaluate(target: Callable, args: tuple, kwargs: dict) -> Any:
    """The fake value of a call on nodes' fake values."""
    with enable_python_dispatcher():  # without it torch 2.11's C++ asks symbolic sizes of linear for numbers
        return target(*value_of(args), **value_of(kwargs))


def new_node(
    graph: fx.Graph, target: Callable, args: tuple = (), kwargs: dict | None = None, *, like: fx.Node, by: str = ""
) -> fx.Node:
    """A call_function node at the graph's insertion point, with its fake value and provenance filled in.

    `like` is the node whose place in the model this one takes over; `by` names the pass that makes it.
    """
    kwargs = kwargs or {}
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = evaluate(target, args, kwargs)
    node.meta["origin"] = touched(origin_of(like), by)
    return node


def untyped_node(
    graph: fx.Graph, target: Callable, args: tuple, kwargs: dict | None = None, *, like: fx.Node
) -> fx.Node:
    """A call_function node without a fake value, for passes that change a signature and then derive the function."""
    node = graph.call_function(target, args, kwargs or {})
    node.meta["origin"] = origin_of(like)
    return node


def stored_node(graph: fx.Graph, op: str, name: str, target: Any, args: tuple, kwargs: dict) -> fx.Node:
    """A node as it was written to a file or stands in another graph, without a fake value: the function is derived when
    it is whole, or the value is that of the other node."""
    return graph.create_node(op, target, args, kwargs, name)


def new_input(graph: fx.Graph, name: str) -> fx.Node:
    """A placeholder behind the last one, without a fake value: the signature gives it one."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        return graph.placeholder(name)


def touched(origin: Origin, by: str) -> Origin:
    """The origin with one more pass in its history."""
    return replace(origin, passes=(*origin.passes, by)) if by and by not in origin.passes[-1:] else origin


def call_nodes(graph: fx.Graph, targets: Iterable[Callable]) -> list[fx.Node]:
    """The call_function nodes with one of these targets, in graph order."""
    wanted = set(targets)
    return [node for node in graph.nodes if node.op == "call_function" and node.target in wanted]


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the names in its operator's schema, defaults filled in."""
    known = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in known if argument.has_default_value()}
    return given | dict(zip((argument.name for argument in known), node.args, strict=False)) | dict(node.kwargs)


class Value:
    """A node as passes handle it: arithmetic on it makes nodes, right behind the operands."""

    def __init__(self, node: fx.Node, by: str = "") -> None:
        self.node, self.by = node, by

    @property
    def shape(self) -> tuple:
        """Sizes; symbolic where the model's are."""
        return tuple(self.node.meta["val"].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self.node.meta["val"].dtype

    def apply(self, target: Callable, *args: Any, **kwargs: Any) -> Value:
        """`target(self, *args, **kwargs)` as a new node; other Values among the arguments become their nodes."""
        unwrap = lambda argument: argument.node if isinstance(argument, Value) else argument  # noqa: E731
        args = tuple(unwrap(argument) for argument in (self, *args))
        kwargs = {name: unwrap(argument) for name, argument in kwargs.items()}
        operands = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, fx.Node)]
        graph = self.node.graph
        with graph.inserting_after(last_before(graph, operands)):
            node = new_node(graph, target, args, kwargs, like=self.node, by=self.by)
        return Value(node, self.by)

    def __add__(self, other: Any) -> Value:
        return self.apply(aten.add.Tensor, other)

    def __sub__(self, other: Any) -> Value:
        return self.apply(aten.sub.Tensor, other)

    def __mul__(self, other: Any) -> Value:
        return self.apply(aten.mul.Tensor, other)

    def __truediv__(self, other: Any) -> Value:
        return self.apply(aten.div.Tensor, other)

    def __neg__(self) -> Value:
        return self.apply(aten.neg.default)

    __radd__ = __add__
    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"Value({self.node.name}: {self.dtype} {list(self.shape)})"


def last_before(graph: fx.Graph, operands: Sequence[fx.Node]) -> fx.Node:
    """Behind which node one that reads the operands belongs: the last of them, and in a graph that is being made, which
    has no output yet, the last of all, so that the graph reads in the order in which it was made."""
    last: fx.Node = next(iter(reversed(graph.nodes)))
    return max(operands) if last.op == "output" else last


def cat(values: Sequence[Value], dim: int = -1) -> Value:
    """Values side by side."""
    nodes = [value.node for value in values]
    with nodes[0].graph.inserting_after(last_before(nodes[0].graph, nodes)):
        by = values[0].by
        return Value(new_node(nodes[0].graph, aten.cat.default, (nodes, dim), like=nodes[0], by=by), by)


def sort_nodes(graph: fx.Graph) -> None:
    """Bring the nodes into topological order, each as near to its place as that allows; for passes that let a node
    read what stands behind it."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    order = nx.DiGraph()
    order.add_nodes_from(place)
    order.add_edges_from((source, node) for node in place for source in node.all_input_nodes)
    last = next(iter(reversed(graph.nodes)))
    for node in list(nx.lexicographical_topological_sort(order, key=place.__getitem__)):
        if node is not last:
            last.prepend(node)


def symbolic(value: Any) -> bool:
    """Whether a size is symbolic rather than a number."""
    return isinstance(value, torch.SymInt)


PYTHON_ARITHMETIC = frozenset({operator.add, operator.sub, operator.mul, operator.floordiv, operator.getitem})
"""Python's own functions that may appear as targets: size arithmetic and unpacking."""
