"""The kernels that are not row-wise: matrix products, gathers, and attention over a KV state."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from graft.codegen.kernel_ir import (
    AppendKernel,
    Array,
    AttendKernel,
    AttendPagesKernel,
    ExpertKernel,
    GatherKernel,
    Heads,
    MatmulKernel,
    TopKernel,
)
from graft.codegen.row_form import ROW, View, regroup
from graft.compiler.canonical import aten
from graft.compiler.kv.attention import codec_of, selection_of
from graft.compiler.kv.codecs import Codec, KeyChannels
from graft.compiler.nodes import named_arguments

Views = dict[fx.Node, View]
Arrays = dict[fx.Node, Array]


def flat_row(view: View) -> int | None:
    """Elements of a row that lie side by side in the view's order, or None where they do not."""
    width = math.prod(view.sizes)
    return width if regroup(view.sizes, view.steps, [width]) == [1 if width > 1 else 0] else None


def inner_dense(view: View) -> bool:
    """Whether each head's vector lies side by side, and heads at equal distances: dims [1, heads, rows, head dim]."""
    heads, width = view.dims[1], view.dims[3]
    return view.dims[2] == ROW and heads != ROW and (width == 1 or view.strides[3] == 1)


def heads_of(view: View) -> Heads:
    """The heads of a view that is `inner_dense`."""
    return Heads(view.offset, view.dims[1], view.strides[1], view.dims[3])


def matmul_kernel(node: fx.Node, views: Views, arrays: Arrays) -> MatmulKernel:
    """aten.linear and graft.linear_rows."""
    view = views[node.args[0]]
    if node.target is aten.linear.default:
        weights, biases = [node.args[1]], [node.args[2]] if len(node.args) > 2 and node.args[2] is not None else []
        ranges, starts, columns = [(0, int(weights[0].meta["val"].shape[0]))], None, None
    else:
        weights, biases, flat, starts, columns = (*node.args[1:], None, None)[:5]
        ranges = list(zip(flat[::2], flat[1::2], strict=True))
    stored = int(weights[0].meta["val"].shape[1])
    return MatmulKernel(
        (arrays[view.base], arrays[node]),
        (node,),
        tuple(weight.target for weight in weights),
        tuple(ranges),
        tuple(bias.target for bias in biases),
        view.offset,
        stored if columns is None else columns[1] - columns[0],
        None if columns is None else (columns[0], stored),
        tuple(int(weight.meta["val"].shape[0]) for weight in weights),
        weights[0].meta["val"].dtype,
        tuple(starts or [0] * len(weights)),
    )


def expert_kernel(node: fx.Node, views: Views, arrays: Arrays) -> ExpertKernel:
    """graft::expert_linear."""
    given = named_arguments(node)
    (x, index), weight, bias = (views[given[name]] for name in ("x", "index")), given["weights"], given["bias"]
    experts, outputs, depth = (int(size) for size in weight.meta["val"].shape)
    return ExpertKernel(
        (arrays[x.base], arrays[index.base], arrays[node]),
        (node,),
        weight.target,
        bias.target if bias is not None else "",
        experts,
        index.dims[-1],
        depth,
        outputs,
        (x.offset, index.offset),
        x.strides[-2] if x.dims[-2] > 1 else 0,
        weight.meta["val"].dtype,
        weight.meta["val"].mT.is_contiguous() and not weight.meta["val"].is_contiguous(),
    )


def top_kernel(nodes: Sequence[fx.Node], views: Views, arrays: Arrays) -> TopKernel:
    """aten.topk and the results of it that are read."""
    node, *results = nodes
    view = views[node.args[0]]
    width, count = view.dims[-1], node.args[1]
    return TopKernel(
        (arrays[view.base], *(arrays[result] for result in results)),
        tuple(nodes),
        view.offset,
        math.prod(view.sizes) // width,
        width,
        count,
        tuple(result.args[1] for result in results),
    )


def gather_kernel(node: fx.Node, views: Views, arrays: Arrays) -> GatherKernel:
    """aten.embedding."""
    weight, index = node.args[:2]
    view = views[index]
    return GatherKernel(
        (arrays[view.base], arrays[node]), (node,), weight.target, view.offset, weight.meta["val"].dtype
    )


def append_kernel(node: fx.Node, views: Views, arrays: Arrays, states: list[str]) -> AppendKernel:
    """graft::kv_append."""
    keys, values = views[node.args[1]], views[node.args[2]]
    return AppendKernel(
        (arrays[keys.base], arrays[values.base]),
        (node,),
        states.index(state_name(node)),
        node.args[5],
        heads_of(keys),
        heads_of(values),
        node.args[0].meta["val"].dtype,
        node.args[4].name if node.args[4].name != "lengths" else "",
    )


def attend_kernel(node: fx.Node, views: Views, arrays: Arrays, states: list[str]) -> AttendKernel:
    """graft::kv_attend."""
    given = named_arguments(node)
    queries, kv = views[given["q"]], given["kv"].meta["val"]
    sinks = given["sinks"]
    return AttendKernel(
        (arrays[queries.base], arrays[node], *([arrays[sinks]] if sinks is not None else [])),
        (node,),
        states.index(state_name(node)),
        given["layer"],
        heads_of(queries),
        int(kv.shape[2]),
        int(kv.shape[4]) - queries.dims[3],
        float(given["scale"]),
        given["window"],
        float(given["softcap"]),
        kv.dtype,
    )


def attend_pages_kernel(node: fx.Node, views: Views, arrays: Arrays, states: list[str]) -> AttendPagesKernel:
    """graft::kv_attend_pages."""
    given = named_arguments(node)
    queries, kv, sinks = views[given["q"]], given["kv"].meta["val"], given["sinks"]
    selection = selection_of(given["selection"]) if given["selection"] else None
    far = ["lengths", "starts", "pages", "table", "counts"]
    if selection is not None and given["layer"] < selection.dense_layers:
        selection = None
    if selection is not None:
        far += ["labels", "channels"]
    return AttendPagesKernel(
        (arrays[queries.base], arrays[node], *([arrays[sinks]] if sinks is not None else [])),
        (node,),
        states.index(state_name(node)),
        given["layer"],
        heads_of(queries),
        int(kv.shape[2]),
        given["value_dim"],
        int(kv.shape[4]),
        float(given["scale"]),
        float(given["softcap"]),
        kv.dtype,
        codec_of(given["codec"]),
        selection,
        tuple(given[name].name for name in far),
    )


def without_loader(codec: Codec) -> str:
    """Why a codec's pages are not read by compiled code; "" where they are."""
    if not codec.loader:
        return f"{type(codec).__name__} has no loader"
    return without_loader(codec.inner) if isinstance(codec, KeyChannels) else ""


def state_name(node: fx.Node) -> str:
    """The placeholder that a state value comes from."""
    source = node.args[0]
    while source.op != "placeholder":
        source = source.args[0]
    return source.name
