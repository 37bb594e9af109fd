"""Which layers of a function are the same: compiled once, printed once.

A layer is cut out of the graph with its boundary: the stream, the states and the function's inputs by name, parameters
by shape and dtype, values that all layers share by name. Two layers are the same if an isomorphism of these labelled
graphs maps one to the other. Weisfeiler-Lehman hashes tell most different layers apart, VF2 decides.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from torch import Tensor, fx

from graft.compiler.canonical import STATE_WRITES
from graft.compiler.errors import CheckError
from graft.compiler.nodes import origin_of
from graft.compiler.program import Function
from graft.compiler.shapes import attribute
from graft.compiler.trunk import Block, Trunk, find_trunk

HEAD = -1
"""Section of what comes before the layers: the embedding, and whatever does not depend on the stream."""

LONGEST_PERIOD = 12
"""Layers in the longest repeating pattern that is looked for."""


@dataclass(frozen=True)
class Run:
    """Consecutive layers that repeat: `repeats` times the `period` layers from `first` on."""

    first: int
    period: int
    repeats: int
    inner: tuple[Run, ...] = ()
    """The first period's own runs, where it is longer than one layer."""

    @property
    def last(self) -> int:
        """The last layer of the run."""
        return self.first + self.period * self.repeats - 1

    @property
    def title(self) -> str:
        """Such as "layer 3", "layers 3-29, x27 (shown: layer 3)" or "layers 0-23, 4 x 6 (shown: layers 0-5)"."""
        if self.repeats == 1:
            return f"layer {self.first}"
        if self.period == 1:
            return f"layers {self.first}-{self.last}, x{self.repeats} (shown: layer {self.first})"
        shown = f"layers {self.first}-{self.first + self.period - 1}"
        return f"layers {self.first}-{self.last}, {self.repeats} x {self.period} (shown: {shown})"


@dataclass
class Section:
    """Nodes that are read together: what comes before the layers, one layer, or what comes after them."""

    layer: int
    """HEAD, the layer's number, or the number of layers for what comes after the last."""
    nodes: list[fx.Node]
    """call_function nodes in graph order, export's assertions left out."""
    blocks: list[Block] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Module path of the layer, such as "model.layers.3"; empty where there is none."""
        found = Counter(path for node in self.nodes if (path := layer_path(node)))
        return found.most_common(1)[0][0] if self.blocks and found else ""


@dataclass
class Layers:
    """A function cut into sections, with the equivalence classes of its layers."""

    head: Section
    layers: list[Section]
    tail: Section
    classes: list[int]
    """For each layer the first layer that is the same."""
    twins: dict[fx.Node, fx.Node]
    """Node of a layer -> the node in its place in the class's first layer; itself in that one."""
    trunk: Trunk | None
    """None where the function has no residual stream, such as a draft head; then everything is in `head`."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The layers in order, repetitions folded."""
        return fold(self.classes)

    @property
    def sections(self) -> list[Section]:
        """All sections, in an order in which operands precede their users."""
        return [self.head, *self.layers, self.tail]


def layer_path(node: fx.Node) -> str:
    """The path up to the first number in the node's module path, such as "model.layers.3"; empty without one."""
    match = re.match(r"(.*?\.\d+)(?:\.|$)", origin_of(node).module)
    return match.group(1) if match else ""


def is_assertion(node: fx.Node) -> bool:
    """Whether the node makes nothing that is used; a captured graph holds such, a canonical one does not."""
    return node.op == "call_function" and node.meta.get("val") is None and not node.users


def trunk_of(function: Function) -> Trunk | None:
    """The function's trunk, or None: not every function has one, and looking at it must work all the same."""
    try:
        return find_trunk(function.graph)
    except (CheckError, LookupError, TypeError, StopIteration, AttributeError):
        return None


def find_layers(function: Function) -> Layers:
    """Cut the function into sections and find which layers are the same."""
    trunk = trunk_of(function)
    count = len(trunk.layers) if trunk else 0
    sections = {number: Section(number, []) for number in range(HEAD, count + 1)}
    place = place_nodes(function.graph, trunk)
    for node in function.graph.nodes:
        if node.op == "call_function" and not is_assertion(node):
            sections[place[node]].nodes.append(node)
    for number, blocks in enumerate(trunk.layers if trunk else ()):
        sections[number].blocks = blocks
    layers = [sections[number] for number in range(count)]
    classes, twins = find_classes([layer_graph(layer, place, function) for layer in layers])
    return Layers(sections[HEAD], layers, sections[count], classes, twins, trunk) if trunk else Layers(
        sections[HEAD], [], Section(0, []), [], {}, None
    )


def place_nodes(graph: fx.Graph, trunk: Trunk | None) -> dict[fx.Node, int]:
    """Node -> number of its section. A node that belongs to no block stands where its operands are complete."""
    fixed: dict[fx.Node, int] = {}
    if trunk:
        roles = trunk.roles()
        tail = len(trunk.layers)
        fixed = {node: tail for node, role in roles.items() if role in {"final-norm", "unembedding"}}
        for number, blocks in enumerate(trunk.layers):
            for block in blocks:
                fixed.update(dict.fromkeys([*block.nodes, block.residual], number))
    place: dict[fx.Node, int] = {}
    for node in graph.nodes:
        operands = [place[operand] for operand in node.all_input_nodes]
        place[node] = max([HEAD, *operands, *([fixed[node]] if node in fixed else [])])
    for node in reversed(graph.nodes):
        # Made in a layer, read in one layer, but not from the stream: a norm's 1 + weight, a layer's view of the rope.
        users = {place[user] for user in node.users if not is_assertion(user)}
        if node.op == "call_function" and place[node] == HEAD and len(users) == 1 and layer_path(node):
            place[node] = users.pop()
    return place


def layer_graph(section: Section, place: dict[fx.Node, int], function: Function) -> nx.DiGraph:
    """The layer as a labelled graph. Vertices are its nodes, and ("boundary", node) for what it reads."""
    graph, inside = nx.DiGraph(), set(section.nodes)
    stream = section.blocks[0].stream
    for node in section.nodes:
        escapes = any(user not in inside and not is_assertion(user) for user in node.users)
        graph.add_node(node, label=f"{node.target} {value_label(node)} {constants(node)} {escapes}")
    for node in section.nodes:
        positions: dict[Any, list[str]] = {}
        for position, operand in operands_of(node):
            vertex: Any = operand
            if operand not in inside:
                vertex = ("boundary", operand)
                graph.add_node(vertex, label=boundary_label(operand, stream, section.layer, place, function))
            positions.setdefault(vertex, []).append(position)
        for vertex, where in positions.items():
            graph.add_edge(vertex, node, label=" ".join(where))
    return graph


def boundary_label(node: fx.Node, stream: fx.Node, layer: int, place: dict[fx.Node, int], function: Function) -> str:
    """What a layer sees of a value that it reads but does not make."""
    if node is stream:
        return f"stream {value_label(node)}"
    while node.target in STATE_WRITES:
        node = node.args[0]
    if node.op == "get_attr":
        held = attribute(function.weights, node.target)
        # A branch of torch.cond is compared by its code, a parameter by what it looks like.
        return f"parameter {value_label(node)}" if isinstance(held, Tensor) else f"branch {getattr(held, 'code', held)}"
    if node.op == "placeholder" or place[node] == HEAD:
        return f"shared {node.name}"
    return f"from {layer - place[node]} layers before: {node.target} {value_label(node)}"


def value_label(node: fx.Node) -> str:
    """Dtype and sizes of the node's value."""
    value = node.meta.get("val")
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else str(value)


def constants(node: fx.Node) -> str:
    """The arguments that are not nodes, by position, without the index of the layer's state."""
    return str([(where, repr(value)) for where, value in flat_arguments(node) if not isinstance(value, fx.Node)])


def operands_of(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """(position, operand) of every use of a node as an argument."""
    return ((position, value) for position, value in flat_arguments(node) if isinstance(value, fx.Node))


def flat_arguments(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """(name, value) of every argument, defaults and what is inside of lists too; graft's own `layer` is left out."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        named = [*((str(index), value) for index, value in enumerate(node.args)), *node.kwargs.items()]
    else:
        defaults = {argument.name: argument.default_value for argument in schema.arguments}
        given = dict(zip(defaults, node.args, strict=False)) | node.kwargs
        own = schema.name.startswith("graft::")
        named = [(name, value) for name, value in (defaults | given).items() if not (own and name == "layer")]
    for name, value in named:
        yield from flatten(name, value)


def flatten(position: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`value`, or what is in it where it is a list."""
    if isinstance(value, (list, tuple)):
        yield f"{position}[]", len(value)
        for index, element in enumerate(value):
            yield from flatten(f"{position}[{index}]", element)
    else:
        yield position, value


def find_classes(graphs: Sequence[nx.DiGraph]) -> tuple[list[int], dict[fx.Node, fx.Node]]:
    """For each graph the first one isomorphic to it, and for each node the one in its place there."""
    classes: list[int] = []
    twins: dict[fx.Node, fx.Node] = {}
    by_hash: dict[str, list[int]] = {}
    same = nx.algorithms.isomorphism.categorical_node_match("label", None)
    same_edge = nx.algorithms.isomorphism.categorical_edge_match("label", None)
    for index, graph in enumerate(graphs):
        key = graph_hash(graph)
        for first in by_hash.setdefault(key, []):
            matcher = nx.algorithms.isomorphism.DiGraphMatcher(graph, graphs[first], same, same_edge)
            if matcher.is_isomorphic():
                classes.append(first)
                twins.update((node, twin) for node, twin in matcher.mapping.items() if isinstance(node, fx.Node))
                break
        else:
            by_hash[key].append(index)
            classes.append(index)
            twins.update((node, node) for node in graph if isinstance(node, fx.Node))
    return classes, twins


def graph_hash(graph: nx.DiGraph) -> str:
    """The Weisfeiler-Lehman hash of a labelled graph."""
    with warnings.catch_warnings():
        # networkx says that release 3.5 changed the hashes of directed graphs; these are never stored.
        warnings.simplefilter("ignore", UserWarning)
        return nx.weisfeiler_lehman_graph_hash(graph, node_attr="label", edge_attr="label")


def fold(classes: Sequence[Any], start: int = 0, longest: int = LONGEST_PERIOD) -> tuple[Run, ...]:
    """Runs of equal elements and of repeating patterns, longest first come; `start` is the number of the first."""
    runs, at = [], 0
    while at < len(classes):
        best = (1, 1)
        for period in range(1, min(longest, (len(classes) - at) // 2) + 1):
            repeats = 1
            while classes[at : at + period] == classes[at + repeats * period : at + (repeats + 1) * period]:
                repeats += 1
            if repeats > 1 and repeats * period > best[0] * best[1]:
                best = (period, repeats)
        period, repeats = best
        inner = fold(classes[at : at + period], start + at, period - 1) if period > 1 else ()
        runs.append(Run(start + at, period, repeats, inner))
        at += period * repeats
    return tuple(runs)
