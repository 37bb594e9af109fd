"""Where each node of a function is computed: rules over classes of nodes, never over models.

Matmuls, gathers and attention are kernels of their own, in the order of the graph. Everything row-wise goes into the
first row kernel in which its operands can be had: right behind the last of the kernels that it depends on. What no
rule takes runs through ATen, a row at a time.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graft.codegen.heavy import flat_row, inner_dense, without_loader
from graft.codegen.row_form import ROW, Form, View, form_of, look_through, whole
from graft.codegen.scalar_ops import REDUCERS, TREES
from graft.compiler.canonical import ATTENTION, MATMULS, SIZES, VIEWS, aten, graft
from graft.compiler.errors import LoweringError
from graft.compiler.kv.attention import codec_of
from graft.compiler.nodes import named_arguments, new_node
from graft.compiler.program import Function

CATS = frozenset({aten.cat.default, aten.concat.default, aten.stack.default})
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default})
REARRANGING = VIEWS | {aten.squeeze.default}
FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
DTYPES = FLOATING | {torch.int64, torch.bool}
"""What row kernels load, compute and store."""


MOST_BEST = 64
"""As in cpp/include/top.h."""


@dataclass
class Group:
    """One kernel that is no row kernel, in the making."""

    nodes: list[fx.Node]
    rows: str
    reason: str = ""
    """Why the nodes run through ATen; empty for a kernel of ours."""
    alone: bool = False
    """Whether no other node may join it: attention over pages through ATen."""


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
    elif node.target is operator.getitem and is_part(state, node):
        state.groups[state.stage[node] - 1].nodes.append(node)
        state.views[node] = whole(node, state.forms[node])
        state.owner[node] = state.stage[node], "group"
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


def is_part(state: Cut, node: fx.Node) -> bool:
    """Whether the node is one of several results of a kernel of ours."""
    place, kind = state.owner.get(node.args[0], (0, ""))
    return kind == "group" and not state.groups[place - 1].reason


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
    if node.target is graft.expert_linear.default:
        ours = experts_fit(state, node)
    elif node.target is aten.topk.default:
        ours = top_fits(state, node)
    elif node.target in MATMULS:
        ours = matmul_fits(state, node)
    elif node.target is aten.embedding.default:
        ours = gather_fits(state, node)
    else:
        ours = (node.target is graft.kv_append.default or node.target in ATTENTION) and attention_fits(state, node)
    if not ours:
        return False
    if is_widened(node):
        node.meta["val"] = node.meta["val"].to(torch.float32)
        state.forms[node] = Form(state.forms[node].dims, state.forms[node].rows, torch.float32)
    known = [state.forms[one].rows for one in (node, *node.all_input_nodes) if one in state.forms]
    state.groups.append(Group([node], next(filter(None, known), "N")))
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
    columns = node.args[5] if len(node.args) > 5 else None
    # Panels hold the inputs of 16-bit weights in pairs.
    if columns is not None and columns[0] % 2:
        return False
    dense_operand(state, node, x, whole_row=True)
    return True


def experts_fit(state: Cut, node: fx.Node) -> bool:
    """Slots of rows that name experts, which are parameters of the same dtype."""
    given = named_arguments(node)
    x, index, parameters = given["x"], given["index"], [given["weights"], given["bias"]]
    if any(one not in state.views for one in (x, index)) or node not in state.forms:
        return False
    dtype, dims = state.forms[x].dtype, state.forms[index].dims
    same = all(one is None or (one.op == "get_attr" and one.meta["val"].dtype == dtype) for one in parameters)
    slots = state.forms[index].rows != "" and state.forms[index].width == dims[-1] and ROW not in dims[-1:]
    if dtype not in FLOATING or not same or not slots or state.forms[x].rows != state.forms[index].rows:
        return False
    for operand in (x, index):
        dense_operand(state, node, operand, whole_row=True)
    return True


def top_fits(state: Cut, node: fx.Node) -> bool:
    """The largest few of the features of a row."""
    given = named_arguments(node)
    x = given["self"]
    if x not in state.views or state.forms[x].dtype not in FLOATING or not state.forms[x].rows:
        return False
    dims, count = state.forms[x].dims, given["k"]
    last = dims[given["dim"]] != ROW and given["dim"] % len(dims) == len(dims) - 1
    if not last or not given["largest"] or not isinstance(count, int) or not 0 < count <= min(MOST_BEST, dims[-1]):
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
    given = named_arguments(node)
    operands = node.args[1:3] if node.target is graft.kv_append.default else node.args[1:2]
    if any(x not in state.views or state.forms[x].dtype != node.args[0].meta["val"].dtype for x in operands):
        return False
    if given.get("sinks") is not None and given["sinks"] not in state.constant:
        return False
    if without_pages(node):
        return False
    for operand in operands:
        dense_operand(state, node, operand, whole_row=False)
    return True


def without_pages(node: fx.Node) -> str:
    """Why compiled code does not read the pages that a node does; "" where it does, or there are none."""
    pages = node.target is graft.kv_attend_pages.default
    return without_loader(codec_of(named_arguments(node)["codec"])) if pages else ""


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
    joined = last and last.reason and last.rows == rows and all(state.stage[x] < index for x in outside)
    alone = node.target is graft.kv_attend_pages.default
    if not joined or alone or (last and last.alone):
        name = getattr(node.target, "__name__", str(node.target))
        state.groups.append(Group([], rows, without_pages(node) or f"no rule for {name}", alone))
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
