"""Products of slots with the experts that they chose, as captured: a gather of matrices and a batched product."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graft.compiler.canonical import aten
from graft.compiler.program import Function
from graft.compiler.shapes import attribute


@dataclass(frozen=True)
class Product:
    """A batched product of slots with the matrices that they chose."""

    x: fx.Node
    weights: fx.Node
    index: fx.Node
    transposed: bool
    """Whether the parameter is [experts, in, out]."""
    inner: tuple[fx.Node, ...]
    """Nodes that are part of it and of nothing else."""
    bias: fx.Node | None = None


def product_of(node: fx.Node) -> Product | None:
    """The product that a squeeze ends, if it is one of slots with the matrices of experts."""
    product = node.args[0] if node.target is aten.squeeze.dim else None
    if product is None or product.target is not aten.bmm.default:
        return None
    for place in (0, 1):
        chosen, vector = product.args[place], product.args[1 - place]
        if chosen.target is aten.index.Tensor and vector.target is aten.unsqueeze.default:
            dim = 2 - place  # of the one row or column that a slot is
            weights, (index, *others) = chosen.args
            thin = (vector.args[1] % 3, node.args[1] % 3) == (dim, dim)
            if thin and weights.op == "get_attr" and len(weights.meta["val"].shape) == 3 and not others:
                return Product(vector.args[0], weights, index, place == 1, (product, chosen, vector))
    return None


def with_bias(node: fx.Node) -> Product | None:
    """The product that an add of the biases of the same experts ends."""
    if node.target is not aten.add.Tensor or node.kwargs or not isinstance(node.args[1], fx.Node):
        return None
    base, offset = node.args
    product = product_of(base)
    if product is None or offset.target is not aten.index.Tensor or offset.args[1] != [product.index]:
        return None
    if offset.args[0].op != "get_attr":
        return None
    inner = (*product.inner, base, offset)
    return Product(product.x, product.weights, product.index, product.transposed, inner, offset.args[0])


def transposed(function: Function, weight: fx.Node) -> fx.Node:
    """A view of the parameter with its last two dims exchanged, which takes no memory, at the insertion point."""
    path = f"{weight.target.replace('.', '_')}_T"
    if not hasattr(function.weights, path):
        setattr(function.weights, path, attribute(function.weights, weight.target).detach().transpose(-1, -2))
    node = function.graph.get_attr(path)
    node.meta = {**weight.meta, "val": weight.meta["val"].transpose(-1, -2)}
    return node
