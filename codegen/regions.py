"""A function cut into kernels, by rules over classes of nodes and never over models.

Matmuls, gathers and attention are kernels of their own, in the order of the graph. Everything row-wise goes into the
first row kernel in which its operands can be had: right behind the last of the kernels that it depends on. What no
rule takes runs through ATen, a row at a time.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graft.codegen.guards import Guarding
from graft.codegen.heavy import append_kernel, attend_kernel, flat_row, gather_kernel, inner_dense, matmul_kernel
from graft.codegen.kernel_ir import Array, AtenKernel, Kernel, Kernels
from graft.codegen.row_builder import RowBuilder
from graft.codegen.row_form import ROW, Form, View, form_of, look_through, whole
from graft.codegen.scalar_ops import REDUCERS, TREES
from graft.compiler.canonical import MATMULS, SIZES, VIEWS, aten, graft
from graft.compiler.errors import LoweringError
from graft.compiler.nodes import new_node
from graft.compiler.program import Function
from graft.compiler.shapes import attribute

CATS = frozenset({aten.cat.default, aten.concat.default, aten.stack.default})
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default})
REARRANGING = VIEWS | {aten.squeeze.default}
FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
DTYPES = FLOATING | {torch.int64, torch.bool}
"""What row kernels load, compute and store."""


@dataclass
class Group:
    """One kernel that is no row kernel, in the making."""

    nodes: list[fx.Node]
    rows: str
    reason: str = ""
    """Why the nodes run through ATen; empty for a kernel of ours."""


@dataclass
class Cut:
    """The state of cutting one function."""

    function: Function
    graph: fx.Graph
    rows: dict[Any, str]
    """Symbol -> "N" or "R"."""
    views: dict[fx.Node, View] = field(default_factory=dict)
    forms: dict[fx.Node, Form] = field(default_factory=dict)
    constant: set[fx.Node] = field(default_factory=set)
    stage: dict[fx.Node, int] = field(default_factory=dict)
    """Value -> the last of `groups`, counted from 1, that it depends on."""
    groups: list[Group] = field(default_factory=list)
    row_nodes: dict[tuple[int, str], list[fx.Node]] = field(default_factory=lambda: defaultdict(list))
    """(stage, rows) -> the nodes of a row kernel."""
    bound: list[fx.Node] = field(default_factory=list)
    """Base values that are written straight into the output tensors."""
    owner: dict[fx.Node, tuple[int, str]] = field(default_factory=dict)
    """Base value -> the kernel that makes it: (stage, rows), or (group, "group")."""


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
    copied = function.copy()
    tokens, wanted = (copied.placeholder(name).meta["val"].shape[0].node.expr for name in ("tokens", "wanted"))
    state = Cut(copied, copied.graph, {tokens: "N", wanted: "R"})
    for node in list(copied.graph.nodes):
        if node.op != "output":
            visit(state, node)
    outputs = tuple(bind_output(state, node) for node in copied.output.args[0][:2])
    return assemble(state, outputs)


def visit(state: Cut, node: fx.Node) -> None:
    """Decide where a node is computed."""
    form = form_of(node.meta.get("val"), state.rows)
    state.stage[node] = max((state.stage[source] for source in node.all_input_nodes), default=0)
    if form is not None:
        state.forms[node] = form
    if node.op == "placeholder":
        if form is not None:
            state.views[node] = whole(node, form)
    elif node.op == "get_attr" or (node.target not in SIZES and all(x in state.constant for x in node.all_input_nodes)):
        state.constant.add(node)
        if form is not None:
            state.views[node] = whole(node, form)
    elif node.target in SIZES and not isinstance(node.meta["val"], Tensor):
        return
    elif not alias(state, node) and not heavy(state, node) and not row_wise(state, node):
        through_aten(state, node)


def alias(state: Cut, node: fx.Node) -> bool:
    """Whether the node only rearranges elements of one row, so that it costs nothing."""
    source, form = node.args[0] if node.args else None, state.forms.get(node)
    if node.target is aten._to_copy.default and is_widened(source):
        state.views[node] = state.views[source]
        return True
    if node.target is aten.repeat_interleave.self_int and form is not None:
        return spread(state, node)
    if node.target not in REARRANGING or form is None or source not in state.views:
        return False
    found = look_through(node, state.views[source], form)
    if found is None and ROW in form.dims:
        found = look_through(node, state.views[copied(state, source)], form)
    if found is None:
        return False
    state.views[node] = found
    return True


def is_widened(node: Any) -> bool:
    """Whether a product of narrow dtype is only read as float32, and so never has to be rounded."""
    if not isinstance(node, fx.Node) or node.target not in MATMULS or len(node.users) != 1:
        return False
    user = next(iter(node.users))
    narrow = node.meta["val"].dtype in (torch.bfloat16, torch.float16, torch.float32)
    return narrow and user.target is aten._to_copy.default and user.kwargs == {"dtype": torch.float32}


def spread(state: Cut, node: fx.Node) -> bool:
    """repeat_interleave as a copy of a stretched view."""
    source, repeats, dim = (*node.args, node.kwargs.get("dim"))[:3]
    if source not in state.views or dim is None or state.forms[source].dims[dim] == ROW:
        return False
    dim %= len(state.forms[source].dims)
    sizes = [-1] * (dim + 1) + [repeats] + [-1] * (len(state.forms[source].dims) - dim - 1)
    shape = list(node.meta["val"].shape)
    with state.graph.inserting_before(node):
        apart = new_node(state.graph, aten.unsqueeze.default, (source, dim + 1), like=node)
        wide = new_node(state.graph, aten.expand.default, (apart, sizes), like=node)
        dense = new_node(state.graph, aten.clone.default, (wide,), like=node)
        flat = new_node(state.graph, aten.reshape.default, (dense, shape), like=node)
    for one in (apart, wide, dense, flat):
        visit(state, one)
    node.replace_all_uses_with(flat)
    state.views[node] = state.views[flat]
    return True


def copied(state: Cut, source: fx.Node) -> fx.Node:
    """A copy of a view, dense."""
    with state.graph.inserting_after(source):
        copy = new_node(state.graph, aten.clone.default, (source,), like=source)
    visit(state, copy)
    return copy


def row_wise(state: Cut, node: fx.Node) -> bool:
    """Take the node into a row kernel, if there is a rule for it."""
    form = state.forms.get(node)
    if form is None or not form.rows or form.dtype not in DTYPES or not fits(state, node, form):
        return False
    state.views[node] = whole(node, form)
    state.row_nodes[state.stage[node], form.rows].append(node)
    state.owner[node] = state.stage[node], form.rows
    return True


def fits(state: Cut, node: fx.Node, form: Form) -> bool:
    """Whether row kernels can compute a node from the views of its operands."""
    sources = node.all_input_nodes
    if any(source not in state.views or state.forms[source].dtype not in DTYPES for source in sources):
        return False
    if node.target is aten.index_select.default:
        dims, axis = state.forms[node.args[0]].dims, node.args[1]
        return node.args[2].name == "wanted" and dims[axis] == ROW and state.forms[node.args[0]].rows == "N"
    if any(state.forms[source].rows not in ("", form.rows) for source in sources):
        return False
    if form.dtype == torch.int64 and any(state.forms[source].dtype != torch.int64 for source in sources):
        return False
    if node.target in TREES or node.target is aten.clone.default:
        return all(x is None or isinstance(x, (fx.Node, int, float)) for x in node.args)
    dims = state.forms[sources[0]].dims if sources else ()
    if node.target in CATS:
        axis = node.args[1] if len(node.args) > 1 else 0
        return form.dims[axis] != ROW and all(state.forms[piece].dtype == form.dtype for piece in node.args[0])
    if node.target in REDUCERS:
        named = node.args[1] if len(node.args) > 1 else None
        axes = [named] if isinstance(named, int) else named or range(len(dims))
        return form.dtype in FLOATING and all(dims[axis] != ROW for axis in axes)
    return node.target in SOFTMAXES and dims[node.args[1]] != ROW and node.kwargs.get("dtype") in (None, form.dtype)


def heavy(state: Cut, node: fx.Node) -> bool:
    """Make the node a kernel of its own, if it is a matmul, a gather or attention that there is a kernel for."""
    if node.target in MATMULS:
        ours = matmul_fits(state, node)
    elif node.target is aten.embedding.default:
        ours = gather_fits(state, node)
    else:
        ours = node.target in (graft.kv_append.default, graft.kv_attend.default) and attention_fits(state, node)
    if not ours:
        return False
    if is_widened(node):
        node.meta["val"] = node.meta["val"].to(torch.float32)
        state.forms[node] = Form(state.forms[node].dims, state.forms[node].rows, torch.float32)
    rows = state.forms[node].rows if node in state.forms else "N"
    state.groups.append(Group([node], rows))
    state.stage[node] = len(state.groups)
    state.owner[node] = len(state.groups), "group"
    if node in state.forms:
        state.views[node] = whole(node, state.forms[node])
    return True


def dense_operand(state: Cut, node: fx.Node, source: fx.Node, *, whole_row: bool) -> None:
    """Let an operand of a kernel lie dense in memory: all of a row, or every head of it."""
    view = state.views[source]
    dense = flat_row(view) is not None if whole_row else inner_dense(view)
    if not dense:
        node.replace_input_with(source, copied(state, source))
        state.stage[node] = max(state.stage[x] for x in node.all_input_nodes)


def matmul_fits(state: Cut, node: fx.Node) -> bool:
    """A linear of rows over parameters of the same dtype."""
    x = node.args[0]
    weights = [node.args[1]] if node.target is aten.linear.default else node.args[1]
    if x not in state.views or node not in state.forms or state.forms[x].dtype not in FLOATING:
        return False
    dims = state.forms[x].dims
    if any(w.op != "get_attr" for w in weights) or ROW not in dims or dims[-1] == ROW:
        return False
    if state.forms[x].width != dims[-1] or any(w.meta["val"].dtype != state.forms[x].dtype for w in weights):
        return False
    dense_operand(state, node, x, whole_row=True)
    return True


def gather_fits(state: Cut, node: fx.Node) -> bool:
    """An embedding of one index per row."""
    weight, index = node.args[:2]
    known = weight.op == "get_attr" and index in state.views and node in state.forms
    return known and state.forms[index].rows != "" and state.forms[index].width == 1 and (
        state.forms[node].dtype in FLOATING and state.forms[index].dtype == torch.int64
    )


def attention_fits(state: Cut, node: fx.Node) -> bool:
    """Attention on vectors of heads."""
    append = node.target is graft.kv_append.default
    operands = node.args[1:3] if append else node.args[1:2]
    if any(x not in state.views or state.forms[x].dtype != node.args[0].meta["val"].dtype for x in operands):
        return False
    if not append and len(node.args) > 10 and node.args[10] is not None and node.args[10] not in state.constant:
        return False
    for operand in operands:
        dense_operand(state, node, operand, whole_row=False)
    return True


def through_aten(state: Cut, node: fx.Node) -> None:
    """Run the node through ATen; together with the nodes before it where nothing of ours lies between."""
    known = [x for x in node.all_input_nodes if x not in state.constant]
    kinds = {state.forms[x].rows for x in known if x in state.forms} | {group_rows(state, x) for x in known}
    kinds |= {state.forms[node].rows} if node in state.forms else set()
    kinds -= {""}
    if len(kinds) > 1:
        raise LoweringError("an operator mixes all rows with those that are wanted", found=node.format_node())
    rows, index = kinds.pop() if kinds else "N", len(state.groups)
    last = state.groups[-1] if state.groups else None
    outside = [x for x in known if state.owner.get(x) != (index, "group")]
    if not (last and last.reason and last.rows == rows and all(state.stage[x] < index for x in outside)):
        name = getattr(node.target, "__name__", str(node.target))
        state.groups.append(Group([], rows, f"no rule for {name}"))
        index += 1
    state.groups[-1].nodes.append(node)
    state.stage[node] = index
    state.owner[node] = index, "group"
    if node in state.forms:
        state.views[node] = whole(node, state.forms[node])


def group_rows(state: Cut, node: fx.Node) -> str:
    """The rows of the group that makes a value; "" where none does."""
    place, kind = state.owner.get(node, (0, ""))
    return state.groups[place - 1].rows if kind == "group" else ""


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
    if node.target in MATMULS:
        return matmul_kernel(node, state.views, arrays)
    if node.target is aten.embedding.default:
        return gather_kernel(node, state.views, arrays)
    states = [spec.name for spec in state.function.states]
    if node.target is graft.kv_append.default:
        return append_kernel(node, state.views, arrays, states)
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
