"""The experts of a mixture as products that a slot chooses: what `canonicalise` makes of a captured batched product.

A token runs k of the experts. Captured, its k slots are k rows of their own, for each of which the matrix that it
chose is copied out of the parameter. Here slots are a dim of their token, and nothing is copied.

before:
    slots = repeat_interleave(x, 2, 0)
    i = reshape(chosen, [-1])
    y = squeeze(bmm(index(w, [i]), unsqueeze(slots, -1)), -1)
    z = mul(y, unsqueeze(reshape(gates, [-1]), -1))
    out = reshape(z, [-1, 2, 8])
after:
    y = expert_linear(unsqueeze(x, 1), w, chosen)
    out = mul(y, unsqueeze(gates, -1))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graft.compiler.canonical import ROW_WISE, aten, graft
from graft.compiler.nodes import new_node
from graft.compiler.passing import View
from graft.compiler.program import Function
from graft.compiler.token_rule import same_size
from graft.passes.mixture.products import Product, product_of, transposed, with_bias

MOVED_DIMS = frozenset({aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int})
"""Views that name one dim, which is the next one where slots have become a dim."""


def choose_experts(function: Function, view: View) -> None:
    """Bring every mixture whose slots are rows into the form above; others stay as they are."""
    for node in list(function.graph.nodes):
        if node.target is aten.reshape.default:
            slots = Slots(node)
            if slots.find() and slots.products:
                slots.rewrite(function, view)
                view.match()


@dataclass
class Slots:
    """What lies between the nodes that make k rows of every token and the one that makes tokens of them again."""

    last: fx.Node
    """A reshape of [k N, ...] to [N, k, ...]."""
    nodes: set[fx.Node] = field(default_factory=set)
    products: dict[fx.Node, Product] = field(default_factory=dict)

    def find(self) -> bool:
        """Look for all of it; False where something stands there that has no form with slots as a dim."""
        before, behind = (node.meta["val"].shape for node in (self.last.args[0], self.last))
        apart = len(behind) == len(before) + 1 and type(behind[1]) is int and type(behind[0]) is not int
        if not apart or any(map(different, behind[2:], before[1:])):
            return False
        todo = [self.last.args[0]]
        while todo:
            node = todo.pop()
            if node in self.nodes or self.is_first(node):
                continue
            sources = self.sources(node)
            if sources is None:
                return False
            self.nodes.add(node)
            todo += sources
        inside = self.nodes.union(*(product.inner for product in self.products.values()))
        return all(user in inside or user is self.last for node in inside for user in node.users)

    def is_first(self, node: fx.Node) -> bool:
        """Whether the node makes slots of tokens, or of what there is for each slot of each token."""
        size, count = self.last.meta["val"].shape[:2]
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not same_size(source.meta["val"].shape[0], size):
            return False
        if node.target is aten.repeat_interleave.self_int:
            return tuple(node.args[1:]) == (count, 0)
        flat = node.target is aten.reshape.default and len(node.meta["val"].shape) == 1
        return flat and tuple(source.meta["val"].shape[1:]) == (count,)

    def sources(self, node: fx.Node) -> list[fx.Node] | None:
        """The slots that a node is computed from; None for a node that cannot be rewritten."""
        product = with_bias(node) or product_of(node)
        if product is not None:
            self.products[node] = product
            return [product.x, product.index]
        rank, size = len(node.meta["val"].shape), self.last.args[0].meta["val"].shape[0]
        if node.target in MOVED_DIMS:
            ours = rank + (node.target is aten.squeeze.dim or node.target is aten.select.int)
            return [node.args[0]] if node.args[1] % ours else None
        if node.target not in ROW_WISE:
            return None
        found = []
        for source in node.all_input_nodes:
            shape = source.meta["val"].shape
            if len(shape) == rank and same_size(shape[0], size):
                found.append(source)
            elif source.op != "get_attr" or len(shape) >= rank:
                return None
        return found

    def rewrite(self, function: Function, view: View) -> None:
        """The same nodes with slots as a dim, in front of the last one, and in its place."""
        graph, known = function.graph, dict[fx.Node, fx.Node]()

        def slots(source: Any) -> Any:
            if source not in known and isinstance(source, fx.Node) and self.is_first(source):
                token = known[source] = source.args[0]
                if source.target is aten.repeat_interleave.self_int:
                    known[source] = new_node(graph, aten.unsqueeze.default, (token, 1), like=source, by=view.by)
            return known.get(source, source)

        with graph.inserting_before(self.last):
            for node in sorted(self.nodes):
                if node in self.products:
                    one = self.products[node]
                    weights = transposed(function, one.weights) if one.transposed else one.weights
                    args = (slots(one.x), weights, slots(one.index), *([one.bias] if one.bias is not None else []))
                    known[node] = new_node(graph, graft.expert_linear.default, args, like=node, by=view.by)
                    continue
                args, kwargs = fx.map_arg((node.args, node.kwargs), slots)
                if node.target in MOVED_DIMS:
                    args = (args[0], args[1] + (args[1] >= 0), *args[2:])
                known[node] = new_node(graph, node.target, args, kwargs, like=node, by=view.by)
        self.last.replace_all_uses_with(slots(self.last.args[0]))


def different(size: Any, other: Any) -> bool:
    """Whether two sizes are not known to be one."""
    return not same_size(size, other)
