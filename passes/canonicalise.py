"""Rewrite a captured graph into canonical form: one spelling for one meaning (compiler/canonical.py).

before:
    _assert_tensor_metadata(h, dtype=float32)
    a, b = split_with_sizes(linear(h, w), [8, 8], -1)
    y = view(clone(a), [2, 4])
    z = addmm(bias, y, w_in_out)
after:
    l = linear(h, w)
    a = slice(l, -1, 0, 8)
    y = reshape(a, [2, 4])
    z = linear(y, w_in_out.T, bias)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from graft.compiler.canonical import aten
from graft.compiler.nodes import new_node
from graft.compiler.passing import Contract, Pass, View, exact
from graft.compiler.program import Function
from graft.passes.experts import choose_experts
from graft.passes.mixture.products import transposed

SAME_AS_INPUT = frozenset(
    {aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default, aten.dropout.default}
    | {aten.lift_fresh_copy.default}
)
PARTS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int})
"""Operators that return a list of parts."""


@dataclass(frozen=True)
class Canonicalise(Pass):
    """Bring every function of the side into canonical form."""

    contract: ClassVar[Contract] = exact
    tidies: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset({"canonical", "cache-free"})

    def run(self, view: View) -> None:
        for function in view.functions:
            for node in list(function.graph.nodes):
                if node.op == "call_function":
                    rewrite(function, node, view)
            function.graph.eliminate_dead_code(is_impure)
            choose_experts(function, view)
            function.graph.eliminate_dead_code(is_impure)
            function.derive()


def is_impure(node: fx.Node) -> bool:
    """Only inputs and outputs must stay: every operator is functional, and export's assertions are not kept."""
    return node.op in {"placeholder", "output"}


def rewrite(function: Function, node: fx.Node, view: View) -> None:
    """Apply the first rule that fits the node, if any."""
    graph = function.graph
    with graph.inserting_before(node):
        if str(node.target).startswith(("aten._assert", "aten.sym_constrain", "aten._check")):
            graph.erase_node(node)
        elif node.target in SAME_AS_INPUT or is_no_op(node):
            node.replace_all_uses_with(node.args[0])
        elif node.target in PARTS:
            take_parts(node, view)
        elif node.target in RESPELLED:
            target, args, kwargs = RESPELLED[node.target](function, node)
            node.replace_all_uses_with(new_node(graph, target, args, kwargs, like=node, by=view.by))
        else:
            return
    view.match()


def is_no_op(node: fx.Node) -> bool:
    """Whether the node returns its first input's values unchanged."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return False
    value = source.meta["val"]
    if node.target is aten._to_copy.default:
        return set(node.kwargs) <= {"dtype", "device"} and node.meta["val"].dtype == value.dtype
    if node.target in (aten.type_as.default, aten.to.dtype):
        return node.meta["val"].dtype == value.dtype
    if node.target is aten.slice.Tensor:
        start, end, step = [*node.args, *(0, 0, None, None, 1)[len(node.args) :]][2:]
        return start in (0, None) and step == 1 and (end is None or (isinstance(end, int) and end >= 2**62))
    if node.target is aten.mul.Tensor:
        return type(node.args[1]) is float and node.args[1] == 1.0 and value.is_floating_point()
    if node.target is aten.expand.default:
        return value.shape == node.meta["val"].shape
    return False


def take_parts(node: fx.Node, view: View) -> None:
    """One slice or select for each part that is used, in place of the list of parts."""
    source = node.args[0]
    dim = node.kwargs.get("dim", node.args[-1] if len(node.args) == (2 if node.target is aten.unbind.int else 3) else 0)
    sizes = [1 if node.target is aten.unbind.int else part.shape[dim] for part in node.meta["val"]]
    for user in list(node.users):
        index, start = user.args[1], sum(sizes[: user.args[1]])
        if node.target is aten.unbind.int:
            part = new_node(node.graph, aten.select.int, (source, dim, index), like=user, by=view.by)
        else:
            end = start + sizes[index]
            part = new_node(node.graph, aten.slice.Tensor, (source, dim, start, end), like=user, by=view.by)
        user.replace_all_uses_with(part)


def reshape(function: Function, node: fx.Node) -> tuple[Callable, tuple, dict]:
    return aten.reshape.default, node.args, {}


def cast(function: Function, node: fx.Node) -> tuple[Callable, tuple, dict]:
    return aten._to_copy.default, (node.args[0],), {"dtype": node.meta["val"].dtype}


def square(function: Function, node: fx.Node) -> tuple[Callable, tuple, dict]:
    return aten.mul.Tensor, (node.args[0], node.args[0]), {}


def addmm(function: Function, node: fx.Node) -> tuple[Callable, tuple, dict]:
    """A transposed view of the parameter lets the product be a linear."""
    bias, x, weight = node.args
    return aten.linear.default, (x, transposed(function, weight), bias), {}


def polar(function: Function, node: fx.Node) -> tuple[Callable, tuple, dict]:
    make = lambda target, *args: new_node(node.graph, target, args, like=node)  # noqa: E731
    parts = [make(aten.mul.Tensor, node.args[0], make(w.default, node.args[1])) for w in (aten.cos, aten.sin)]
    return aten.view_as_complex.default, (make(aten.stack.default, parts, -1),), {}


RESPELLED: dict[Any, Callable[[Function, fx.Node], tuple[Callable, tuple, dict]]] = {
    aten.view.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.type_as.default: cast,
    aten.to.dtype: cast,
    aten.square.default: square,
    aten.addmm.default: addmm,
    aten.polar.default: polar,  # its fake kernel turns dynamic sizes into numbers
}
