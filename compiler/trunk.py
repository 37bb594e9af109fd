"""The trunk: a model's residual stream, recovered from dataflow alone.

Every path from the embedding to the logits runs through the residual stream, so its points are dominators of the
logits (networkx immediate_dominators). Between two consecutive residual adds lies one block: with an attention
operator in it, it is attention, without, feed-forward; with both side by side, parallel. No operator pattern and no
model name is looked at, so pre-norm, post-norm, parallel and mixture-of-experts blocks are all the same to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import networkx as nx
from torch import fx

from graft.compiler.canonical import ATTENTION, MASKS, MATMULS, STATE_WRITES, aten
from graft.compiler.errors import CheckError
from graft.compiler.nodes import Value, call_nodes, new_node, origin_of

BlockKind = Literal["attention", "feed-forward", "parallel"]
HIDDEN = "hidden"
"""Name of the input of functions that go on from the stream behind some layer."""
PART_KINDS: tuple[BlockKind, BlockKind] = ("attention", "feed-forward")


@dataclass(eq=False)
class Block:
    """One residual step, or one of the two parts of a parallel one."""

    index: int
    """Among the trunk's blocks; the parts of a parallel block share its index."""
    kind: BlockKind
    residual: fx.Node
    """The residual add."""
    terms: list[fx.Node]
    """What the block adds to the stream: one node, or several where the model adds them one by one."""
    nodes: list[fx.Node]
    """The block's own nodes, in graph order, the residual add not among them."""
    adds: list[fx.Node]
    """The adds that bring terms and stream together, the residual add first; a parallel block shares them with its
    parts."""
    layer: int = 0
    parts: list[Block] = field(default_factory=list)
    whole: Block | None = None
    """The parallel block that this is a part of."""
    by: str = ""
    """The pass on whose behalf changes are made."""

    @property
    def attention(self) -> list[fx.Node]:
        """Its attention nodes."""
        return [node for node in self.nodes if node.target in ATTENTION]

    @property
    def stream(self) -> fx.Node:
        """The stream that goes past the block: what the residual adds start from, as the graph stands now."""
        whole, node = self.whole or self, self.residual
        while node in self.adds:
            node = next(source for source in node.all_input_nodes if source not in whole.terms)
        return node

    @property
    def output(self) -> Value:
        """What the block adds to the stream. Terms that the model adds one by one are added to each other first,
        which changes the order of additions and so the last bits."""
        if len(self.terms) > 1:
            parts = self.whole.parts if self.whole is not None else []
            partners = [term for part in parts if part is not self for term in part.terms]
            stream, terms = self.stream, self.terms
            past, total = self.sum_of([stream, *partners]), self.sum_of(terms)
            self.residual.args = (past, total)
            self.terms = [total]
            if self.whole is not None:
                self.whole.terms = [*partners, total]
        return Value(self.terms[0], self.by)

    @output.setter
    def output(self, value: Value) -> None:
        old = self.output.node
        for add in [user for user in old.users if user in self.adds]:
            add.replace_input_with(old, value.node)
        for block in (self, self.whole):
            if block is not None:
                block.terms = [value.node if term is old else term for term in block.terms]

    def sum_of(self, terms: list[fx.Node]) -> fx.Node:
        """The terms added up in order, right before the residual add."""
        total = terms[0]
        for term in terms[1:]:
            with self.residual.graph.inserting_before(self.residual):
                total = new_node(self.residual.graph, aten.add.Tensor, (total, term), like=term, by=self.by)
            self.adds.append(total)
        return total

    def drop(self) -> None:
        """Take the block out of the stream: what followed it reads the stream that went past. States that it wrote
        are no longer written."""
        for write in [node for node in self.nodes if node.target in STATE_WRITES]:
            write.replace_all_uses_with(write.args[0])
        if self.whole is None:
            self.residual.replace_all_uses_with(self.stream)
            return
        for term in self.terms:
            add = next(add for add in self.adds if term in add.all_input_nodes)
            other = next(source for source in add.all_input_nodes if source is not term)
            add.replace_all_uses_with(other)
            self.whole.terms = [other if node is add else node for node in self.whole.terms if node is not term]


@dataclass
class Trunk:
    """The residual stream of one function."""

    embedding: fx.Node
    """The token embedding's gather."""
    entry: fx.Node
    """The stream before the first block."""
    blocks: list[Block]
    exit: fx.Node
    """The stream after the last block, before the final norm."""
    hidden: fx.Node
    """What the unembedding reads: the final hidden states."""
    unembedding: fx.Node
    """The matmul that makes logits."""

    @property
    def layers(self) -> list[list[Block]]:
        """Blocks by decoder layer."""
        layers: dict[int, list[Block]] = {}
        for block in self.blocks:
            layers.setdefault(block.layer, []).append(block)
        return list(layers.values())

    @property
    def attention(self) -> list[Block]:
        """Attention blocks, and the attention parts of parallel ones."""
        return self.of_kind("attention")

    @property
    def feed_forward(self) -> list[Block]:
        """Feed-forward blocks, and the feed-forward parts of parallel ones."""
        return self.of_kind("feed-forward")

    def of_kind(self, kind: BlockKind) -> list[Block]:
        """Blocks and parts of that kind, in stream order."""
        return [part for block in self.blocks for part in (block, *block.parts) if part.kind == kind]

    def roles(self) -> dict[fx.Node, str]:
        """Node -> "embedding", "attention", "feed-forward", "parallel", "residual", "final-norm" or "unembedding"."""
        roles: dict[fx.Node, str] = {self.embedding: "embedding", self.unembedding: "unembedding"}
        for block in self.blocks:
            roles.update(dict.fromkeys(block.nodes, block.kind))
            for part in block.parts:
                roles.update(dict.fromkeys(part.nodes, part.kind))
            roles[block.residual] = "residual"
        for node in between(self.exit, self.hidden):
            roles.setdefault(node, "final-norm")
        return roles


def find_trunk(graph: fx.Graph, by: str = "") -> Trunk:
    """Recover the trunk. Raises CheckError, saying which condition failed, where there is none."""
    embedding = find_embedding(graph)
    logits = graph.output_node().args[0][0]
    flow = dataflow(graph, embedding)
    if logits not in flow:
        raise CheckError("the logits do not depend on the token embedding", where=logits)
    dominators = nx.immediate_dominators(flow, embedding)
    chain = [logits]
    while chain[-1] is not embedding:
        chain.append(dominators[chain[-1]])
    chain.reverse()
    adds = [node for node in chain if is_residual_add(node, flow)]
    if not adds:
        raise CheckError(
            "the graph has no residual stream",
            expected="adds that every path from the embedding to the logits runs through",
            found="none",
        )
    blocks: list[Block] = []
    start = embedding
    for add in adds:
        blocks.append(make_block(len(blocks), add, chain, flow, by))
        start = add
    matmuls = [node for node in chain[chain.index(start) :] if node.target in MATMULS]
    if not matmuls:
        raise CheckError("no matmul makes the logits from the stream", where=start)
    number_layers(blocks)
    entry = blocks[0].stream
    return Trunk(embedding, entry, blocks, start, matmuls[-1].args[0], matmuls[-1])


def find_embedding(graph: fx.Graph) -> fx.Node:
    """The gather that reads the tokens, or the input of hidden states where there is none."""
    tokens = next(node for node in graph.nodes if node.op == "placeholder")
    reached = {tokens}
    for node in graph.nodes:
        if node.target is aten.embedding.default and node.args[1] in reached:
            return node
        if node.op == "call_function" and reached & set(node.all_input_nodes):
            reached.add(node)
    # A function that goes on from hidden states starts with those.
    given = [node for node in graph.nodes if node.op == "placeholder" and node.name == HIDDEN and node.users]
    if given:
        return given[0]
    raise CheckError("no embedding reads the tokens", where="tokens")


def dataflow(graph: fx.Graph, root: fx.Node) -> nx.DiGraph:
    """Everything reachable from `root`. An append's edge from the state before it is left out: a state carries
    tokens between calls, not the stream between layers. So is a mask's edge to what it chooses between: it says whether
    a value joins the stream and is none of it."""
    flow = nx.DiGraph()
    flow.add_node(root)
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.target in STATE_WRITES:
            inputs = [source for source in inputs if source is not node.args[0]]
        if node.target in MASKS:
            inputs = [source for source in inputs if source is not node.args[MASKS[node.target]]]
        flow.add_edges_from((source, node) for source in inputs if source in flow)
    return flow


def is_residual_add(node: fx.Node, flow: nx.DiGraph) -> bool:
    """An add of two values that both come from the embedding."""
    plain = node.target is aten.add.Tensor and not node.kwargs  # no alpha
    return plain and len(set(node.all_input_nodes) & flow.nodes) == 2


def make_block(index: int, add: fx.Node, chain: list[fx.Node], flow: nx.DiGraph, by: str) -> Block:
    """The block that ends in the residual add, given the stream's points up to it."""
    before = set(chain[: chain.index(add)])
    cone = ancestors_until(add, before, flow)
    inside = flow.subgraph(cone).copy()  # what lies between two nodes of the block is in it; a view would be slow
    working = {node for node in cone if node.target in MATMULS | ATTENTION}
    works = working.union(*(nx.descendants(inside, node) for node in working))
    split = split_stream(add, works, flow)
    if split is None:
        raise CheckError("a residual add has no operand that goes past the block", where=add.format_node())
    stream, terms = split
    nodes = sorted(cone - {add})
    attention = {node for node in cone if node.target in ATTENTION}
    downstream = attention.union(*(nx.descendants(inside, node) for node in attention))
    parts = leaves(terms, downstream, works)
    kinds = ["attention" if part in downstream else "feed-forward" for part in parts]
    kind: BlockKind = "parallel" if len(set(kinds)) == 2 else "attention" if attention else "feed-forward"
    adds = adds_above({stream, *(parts if kind == "parallel" else terms)}, add)
    block = Block(index, kind, add, terms, nodes, adds, by=by)
    if kind == "parallel":
        block.parts = [
            part_of(block, kind, [part for part, k in zip(parts, kinds, strict=True) if k == kind], flow, before)
            for kind in PART_KINDS
        ]
    return block


def part_of(block: Block, kind: BlockKind, terms: list[fx.Node], flow: nx.DiGraph, before: set[fx.Node]) -> Block:
    """One part of a parallel block."""
    nodes = set(terms).union(*(ancestors_until(term, before, flow) for term in terms))
    return Block(block.index, kind, block.residual, terms, sorted(nodes), block.adds, whole=block, by=block.by)


def adds_above(leaves: set[fx.Node], residual: fx.Node) -> list[fx.Node]:
    """The residual add and the adds between it and the leaves."""
    found = [residual]
    for add in found:
        found += [source for source in add.all_input_nodes if source not in leaves]
    return found


def ancestors_until(node: fx.Node, stop: set[fx.Node], flow: nx.DiGraph) -> set[fx.Node]:
    """`node` and what it is computed from, back to but not including `stop`."""
    found, todo = {node}, [node]
    while todo:
        for source in flow.predecessors(todo.pop()):
            if source not in stop and source not in found:
                found.add(source)
                todo.append(source)
    return found


def split_stream(add: fx.Node, works: set[fx.Node], flow: nx.DiGraph) -> tuple[fx.Node, list[fx.Node]] | None:
    """(stream, terms) of a possibly nested residual add: the operand no matmul or attention worked on, and the rest."""
    left, right = add.all_input_nodes
    for stream, term in ((left, right), (right, left)):
        if stream not in works:
            return stream, [term]
    for inner, other in ((left, right), (right, left)):
        if is_residual_add(inner, flow):
            found = split_stream(inner, works, flow)
            if found:
                return found[0], [*found[1], other]
    return None


def leaves(terms: Iterable[fx.Node], attention: set[fx.Node], works: set[fx.Node]) -> list[fx.Node]:
    """The terms, with an add of attention's result and something else that works taken apart."""
    result = []
    for term in terms:
        inputs = term.all_input_nodes
        mixed = term.target is aten.add.Tensor and term in attention and len(inputs) == 2
        if mixed and all(source in works for source in inputs) and not all(source in attention for source in inputs):
            result += leaves(inputs, attention, works)
        else:
            result.append(term)
    return result


def number_layers(blocks: list[Block]) -> None:
    """A layer starts at every block with attention that follows one; blocks in front of the first belong to it."""
    layer, seen = 0, False
    for block in blocks:
        if block.attention:
            layer, seen = layer + seen, True
        block.layer = layer
        for part in block.parts:
            part.layer = layer


def between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Nodes on the way from `start` to `end`, both excluded, in graph order; `end` included unless it is `start`."""
    found, todo = set(), [end]
    while todo:
        node = todo.pop()
        if node is not start and node not in found and node.op == "call_function" and node > start:
            found.add(node)
            todo += node.all_input_nodes
    return sorted(found)


def module_layer(node: fx.Node) -> int | None:
    """The decoder layer that the node's module path names; for cross-checking, not for finding anything."""
    match = re.search(r"\.(\d+)(?:\.|$)", f".{origin_of(node).module}")
    return int(match.group(1)) if match else None


def attention_nodes(graph: fx.Graph) -> list[fx.Node]:
    """All attention nodes, in graph order."""
    return call_nodes(graph, ATTENTION)
