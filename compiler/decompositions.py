"""From export's graph to functional operators: writes become values, norms come apart into row-wise nodes.

export leaves in-place operators, casts that cast nothing and whole norms in its graph. `run_decompositions` removes
them by tracing everything again, which takes as long as export did. Nearly every model needs none of it: where the
graph has no writes and no operator outside what is known here, the few operators are replaced node by node instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout})
KEPT_COMPOSITES = frozenset(
    {aten.reshape.default, aten.chunk.default, aten.contiguous.default, aten.flatten.using_ints}
)
"""Composite operators returning views that canonical form takes as they are, or that `canonicalise` respells."""


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The program without writes, norms, or casts that cast nothing; everything else stays whole."""
    graph = exported.graph
    if not is_simple(graph):
        return exported.run_decompositions(decompositions())
    table = decompositions()
    bodies: dict[Any, fx.Graph] = {}
    for node in list(graph.nodes):
        if is_write(node):
            replace_write(node)
        elif node.target in table:
            replace_by_body(node, table[node.target], bodies)
        elif node.target in CASTS:
            replace_cast(node)
        elif node.target is aten.flatten.using_ints:
            replace_flatten(node)
        elif is_outer_product(node):
            node.target = aten.mul.Tensor  # ropes of transformers before 5.20
    return exported


def is_simple(graph: fx.Graph) -> bool:
    """Whether `functional` takes the graph as it is, and need not trace it again."""
    return all(is_plain(node) for node in graph.nodes)


def is_outer_product(node: fx.Node) -> bool:
    """Whether the node multiplies matrices [..., n, 1] and [..., 1, m], which no sum has part in."""
    if node.target is not aten.matmul.default:
        return False
    left, right = (source.meta["val"].shape for source in node.args)
    return len(left) == len(right) > 1 and left[-1] == 1 and right[-2] == 1


def is_plain(node: fx.Node) -> bool:
    """Whether the node can stay, or is one that `functional` replaces by itself."""
    if node.op != "call_function" or node.target in CASTS | KEPT_COMPOSITES:
        return True
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True  # arithmetic on sizes
    if schema.is_mutable:
        return is_simple_write(node)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd")
    return not (returns_view(node) and composite)


def returns_view(node: fx.Node) -> bool:
    """Whether the result may share memory with an argument, a write's own result aside."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def is_write(node: fx.Node) -> bool:
    """Whether the call writes an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def is_simple_write(node: fx.Node) -> bool:
    """Whether the call writes a tensor that was made in this graph and that nothing else shares memory with."""
    arguments = node.target._schema.arguments
    writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in arguments]
    names = [node.args[0]]
    while is_write(names[-1]):
        names.append(names[-1].args[0])
    fresh = names[-1].op == "call_function" and not returns_view(names[-1])
    users = {user for name in names for user in name.users if user < node and not is_write(user)}
    shared = any(returns_view(user) for user in users)
    return writes[0] and not any(writes[1:]) and fresh and not shared and functional_twin(node) is not None


def functional_twin(node: fx.Node) -> Callable | None:
    """The operator that returns what this one writes: aten.add.Tensor for aten.add_.Tensor."""
    packet = getattr(aten, node.target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, node.target._overloadname, None)


def replace_write(node: fx.Node) -> None:
    """The write's result as a new value, which everything from here on reads."""
    written = node.args[0]
    with node.graph.inserting_before(node):
        new = node.graph.call_function(functional_twin(node), node.args, node.kwargs)
    new.meta = dict(node.meta)
    for user in [user for user in written.users if user > node]:
        user.replace_input_with(written, new)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def replace_by_body(node: fx.Node, body: Callable, bodies: dict[Any, fx.Graph]) -> None:
    """Put the operator's decomposition in its place, traced once for all calls on operands of the same type."""
    operands = node.all_input_nodes
    types = [(str(operand.meta["val"].dtype), str(operand.meta["val"].shape)) for operand in operands]
    signature = fx.map_arg((node.args, node.kwargs), operands.index)
    key = (node.target, str(types), str(signature))
    if key not in bodies:

        def on_operands(*values: Tensor) -> Tensor:
            given = dict(zip(operands, values, strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: given[operand])
            return body(*args, **kwargs)

        bodies[key] = make_fx(on_operands)(*(operand.meta["val"] for operand in operands)).graph
    places = dict(zip(bodies[key].find_nodes(op="placeholder"), operands, strict=True))
    with node.graph.inserting_before(node):
        for inner in bodies[key].nodes:
            if inner.op == "call_function":
                places[inner] = node.graph.node_copy(inner, lambda argument: places[argument])
                places[inner].meta = {**node.meta, "val": inner.meta["val"]}
    result = bodies[key].output_node().args[0]
    node.replace_all_uses_with(places[result])
    node.graph.erase_node(node)


def replace_cast(node: fx.Node) -> None:
    """One spelling for a cast, and none for a cast to what the tensor is already."""
    source, result = node.args[0].meta["val"], node.meta["val"]
    if source.dtype == result.dtype and source.device == result.device:
        new = node.args[0]
    else:
        kwargs: dict[str, Any] = {"dtype": result.dtype}
        if source.device != result.device:
            kwargs["device"] = result.device
        with node.graph.inserting_before(node):
            new = node.graph.call_function(aten._to_copy.default, (node.args[0],), kwargs)
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def replace_flatten(node: fx.Node) -> None:
    """A reshape that names its sizes, the symbolic ones as nodes."""
    source: fx.Node = node.args[0]
    start, end = (node.args[dim] if len(node.args) > dim else default for dim, default in ((1, 0), (2, -1)))
    shape = source.meta["val"].shape
    start, end = start % len(shape), end % len(shape)
    merged = math.prod(shape[start : end + 1])
    with node.graph.inserting_before(node):
        sizes: list[int | fx.Node] = [dim_size(source, dim) for dim in range(len(shape))]
        sizes[start : end + 1] = [merged if isinstance(merged, int) else -1]
        new = node.graph.call_function(aten.reshape.default, (source, sizes))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def dim_size(source: fx.Node, dim: int) -> int | fx.Node:
    """The size as a number, or the node that reads it."""
    size = source.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    node = source.graph.call_function(aten.sym_size.int, (source, dim))
    node.meta = {**source.meta, "val": size}
    return node


def decompositions() -> dict[torch._ops.OperatorBase, Callable]:
    """The operators that come apart, and how; everything else stays whole."""
    return {aten.layer_norm.default: layer_norm, aten.rms_norm.default: rms_norm}


def layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """aten.layer_norm over the last len(shape) dims; statistics in float32 for 16-bit inputs, as ATen computes them."""
    dims = list(range(-len(shape), 0))
    wide = widened(x)
    centred = wide - wide.mean(dims, keepdim=True)
    result = centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    return affine(result, weight, bias).to(x.dtype)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """aten.rms_norm over the last len(shape) dims, likewise."""
    dims = list(range(-len(shape), 0))
    wide = widened(x)
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    return affine(wide * torch.rsqrt((wide * wide).mean(dims, keepdim=True) + eps), weight, None).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """x in float32 if it is a 16-bit tensor, else x."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x * weight + bias, each where given."""
    x = x * weight if weight is not None else x
    return x + bias if bias is not None else x
