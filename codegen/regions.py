"""A function cut into kernels: what codegen/rules.py decided for its nodes, lined up in the order in which it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graft.codegen.guards import Guarding
from graft.codegen.heavy import (
    append_kernel,
    attend_kernel,
    attend_pages_kernel,
    expert_kernel,
    flat_row,
    gather_kernel,
    matmul_kernel,
    state_name,
    top_kernel,
)
from graft.codegen.kernel_ir import Array, AtenKernel, Kernel, Kernels
from graft.codegen.row_builder import RowBuilder
from graft.codegen.rules import Cut, Group, copied, visit
from graft.compiler.canonical import MATMULS, aten, graft
from graft.compiler.errors import LoweringError
from graft.compiler.program import Function
from graft.compiler.shapes import attribute


def cut(function: Function) -> Kernels:
    """The kernels of a function on flat rows, in the order in which they run.

    Raises LoweringError for a function that is not on flat rows.
    """
    if not function.flat:
        raise LoweringError(
            "only functions on flat rows can be lowered",
            found=", ".join(spec.name for spec in function.inputs),
            where=f"function {function.name}",
            remedy="run the kv-cache pass first",
        )
    own = function.copy()
    tokens, wanted = (own.placeholder(name).meta["val"].shape[0].node.expr for name in ("tokens", "wanted"))
    state = Cut(own, own.graph, {tokens: "N", wanted: "R"})
    for node in list(own.graph.nodes):
        if node.op != "output":
            visit(state, node)
    outputs = tuple(bind_output(state, node) for node in own.output.args[0][:2])
    return assemble(state, outputs)


def bind_output(state: Cut, node: fx.Node) -> fx.Node:
    """The base value that is written straight into an output tensor; a copy where the output is a view of something."""
    view, form = state.views.get(node), state.forms.get(node)
    if view is None or form is None or not form.rows:
        raise LoweringError("an output of the function is not made of rows", found=node.format_node())
    base = view.base
    place, kind = state.owner.get(base, (0, ""))
    ours = kind in ("N", "R") or (kind == "group" and not state.groups[place - 1].reason)
    dense = view.offset == 0 and flat_row(view) == form.width and state.forms.get(base) is not None
    if ours and dense and state.forms[base].width == form.width and base not in state.bound:
        state.bound.append(base)
        return base
    copy = copied(state, node)
    state.bound.append(copy)
    return copy


def assemble(state: Cut, outputs: tuple[fx.Node, ...]) -> Kernels:
    """The kernels in order: those of a stage's rows, then the next group."""
    arrays = {node: array_of(state, node) for node in state.views if state.views[node].base is node}
    results = read_by_others(state, outputs)
    kernels: list[Kernel] = []
    guarding = Guarding(state.graph, state.forms, state.views)
    for stage in range(len(state.groups) + 1):
        if stage:
            group = state.groups[stage - 1]
            kernels.append(guarding.guarded(group_kernel(state, group, arrays, results), group.rows, arrays))
        for rows in ("N", "R"):
            if nodes := state.row_nodes.get((stage, rows)):
                builder = RowBuilder(rows, state.views, arrays.__getitem__)
                for node in nodes:
                    builder.add(node)
                kernel = builder.finish([node for node in nodes if node in results])
                kernels.append(guarding.guarded(kernel, rows, arrays))
    used = {array.name for kernel in kernels for array in kernel.arrays if array.rows == ""}
    needed = [node for node in state.graph.nodes if node.name in used]
    return Kernels(tuple(kernels), constants(state, needed), tuple(arrays[node] for node in outputs), state.function)


def array_of(state: Cut, node: fx.Node) -> Array:
    """The array that holds a base value between kernels; masks are numbers there."""
    form = state.forms[node]
    dtype = torch.float32 if form.dtype == torch.bool else form.dtype
    return Array(node.name, dtype, form.width, form.rows)


def read_by_others(state: Cut, outputs: tuple[fx.Node, ...]) -> set[fx.Node]:
    """Values of row kernels that another kernel, or the caller, reads."""
    found = set(outputs)
    for node in state.owner:
        for source in node.all_input_nodes:
            if source in state.views:
                base = state.views[source].base
                if state.owner.get(base) != state.owner[node]:
                    found.add(base)
    return found


def group_kernel(state: Cut, group: Group, arrays: dict[fx.Node, Array], results: set[fx.Node]) -> Kernel:
    """The kernel of a group."""
    node = group.nodes[0]
    if group.reason:
        return aten_kernel(state, group, arrays, results)
    if node.target is graft.expert_linear.default:
        return expert_kernel(node, state.views, arrays)
    if node.target is aten.topk.default:
        return top_kernel(group.nodes, state.views, arrays)
    if node.target in MATMULS:
        return matmul_kernel(node, state.views, arrays)
    if node.target is aten.embedding.default:
        return gather_kernel(node, state.views, arrays)
    states = [spec.name for spec in state.function.states]
    if node.target is graft.kv_append.default:
        return append_kernel(node, state.views, arrays, states)
    if node.target is graft.kv_attend_pages.default:
        return attend_pages_kernel(node, state.views, arrays, states)
    return attend_kernel(node, state.views, arrays, states)


def aten_kernel(state: Cut, group: Group, arrays: dict[fx.Node, Array], results: set[fx.Node]) -> AtenKernel:
    """A group of nodes for ATen."""
    inside = set(group.nodes)
    operands = dict.fromkeys(x for node in group.nodes for x in node.all_input_nodes if x not in inside)
    given = tuple(x for x in operands if x in state.views or state.owner.get(x, (0, ""))[1] == "group")
    loose = {user for node in group.nodes for user in node.users if user not in inside and user.op != "output"}
    made = tuple(
        node for node in group.nodes if node in results or (node not in state.views and loose.intersection(node.users))
    )
    return AtenKernel(
        tuple(arrays[state.views[x].base] for x in (*given, *made) if x in state.views),
        tuple(group.nodes),
        given,
        made,
        {x: state.views[x] for x in (*given, *made) if x in state.views},
        group.reason,
        group.rows,
        [spec.name for spec in state.function.states].index(state_name(group.nodes[0])) if group.alone else -1,
    )


def constants(state: Cut, nodes: list[fx.Node]) -> dict[str, Tensor]:
    """Values that depend on parameters alone, computed by ATen, by name."""
    known: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in known:
            if node.op == "get_attr":
                known[node] = attribute(state.function.weights, node.target)
            else:
                known[node] = node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
        return known[node]

    with torch.no_grad():
        return {node.name: value(node).contiguous() for node in nodes}
