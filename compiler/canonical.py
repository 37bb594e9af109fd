"""The canonical form: which operators may appear in a function, and in which spelling.

One spelling for one meaning is what lets passes and codegen match anything at all. `passes/canonicalise.py` produces
the form, `compiler/checker.py` enforces it between passes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from graft.compiler import ops  # noqa: F401  (defines torch.ops.graft)
from graft.compiler.kv import attention  # noqa: F401  (defines graft::kv_attend_pages)
from graft.compiler.nodes import PYTHON_ARITHMETIC

aten = torch.ops.aten
graft = torch.ops.graft

NOT_CANONICAL: dict[Any, str] = {
    aten._assert_tensor_metadata.default: "nothing: shapes are checked between passes",
    aten._assert_scalar.default: "nothing: shapes are checked between passes",
    aten.sym_constrain_range_for_size.default: "nothing: shapes are checked between passes",
    aten.alias.default: "its input",
    aten.detach.default: "its input",
    aten.clone.default: "its input: values are immutable",
    aten.contiguous.default: "its input: layout is codegen's business",
    aten.dropout.default: "its input: the model is in eval mode",
    aten.lift_fresh_copy.default: "its input",
    aten.view.default: "aten.reshape.default",
    aten._unsafe_view.default: "aten.reshape.default",
    aten.flatten.using_ints: "aten.reshape.default",
    aten.type_as.default: "aten._to_copy.default",
    aten.to.dtype: "aten._to_copy.default",
    aten.square.default: "aten.mul.Tensor",
    aten.split.Tensor: "aten.slice.Tensor, one for each part used",
    aten.split_with_sizes.default: "aten.slice.Tensor, one for each part used",
    aten.chunk.default: "aten.slice.Tensor, one for each part used",
    aten.unbind.int: "aten.select.int, one for each part used",
    aten.addmm.default: "aten.linear.default over the transposed parameter",
    aten.layer_norm.default: "its row-wise parts",
    aten.rms_norm.default: "its row-wise parts",
    torch.ops.higher_order.wrap_with_set_grad_enabled: "its body; capture runs without gradients",
    torch.ops.higher_order.wrap_with_autocast: "its body; capture runs without autocast",
}
"""Operator -> what stands in its place in canonical form."""

VIEWS = frozenset(
    {aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim}
    | {aten.slice.Tensor, aten.select.int, aten.expand.default, aten.squeeze.dims}
)
"""Operators that only rearrange."""

ROW_WISE = frozenset(
    {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.pow.Tensor_Scalar}
    | {aten.rsqrt.default, aten.sqrt.default, aten.exp.default, aten.expm1.default, aten.log.default, aten.abs.default}
    | {aten.cos.default, aten.sin.default, aten.tanh.default, aten.sigmoid.default, aten.silu.default}
    | {aten.gelu.default, aten.relu.default, aten.softplus.default, aten.reciprocal.default, aten._to_copy.default}
    | {aten.clamp.default, aten.clamp_min.default, aten.minimum.default, aten.maximum.default, aten.where.self}
    | {aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar}
    | {aten.gt.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.logical_not.default}
    | {aten.bitwise_not.default, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.masked_fill.Scalar}
    | {aten.rsub.Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.erf.default, aten.min.other, aten.max.other}
)
"""Element by element, with broadcasting."""

REDUCTIONS: dict[Any, int] = {
    aten.mean.dim: 1,
    aten.sum.dim_IntList: 1,
    aten.amax.default: 1,
    aten.amin.default: 1,
    aten.var.correction: 1,
    aten.linalg_vector_norm.default: 2,
    aten.softmax.int: 1,
    aten._softmax.default: 1,
    aten.log_softmax.int: 1,
    aten._log_softmax.default: 1,
    aten.cumsum.default: 1,
    aten.argmax.default: 1,
    aten.topk.default: 2,
    aten.sort.default: 1,
    aten.logsumexp.default: 1,
    aten.max.dim: 1,
    aten.min.dim: 1,
    aten.prod.dim_int: 1,
    aten.any.dim: 1,
    aten.all.dim: 1,
    aten.roll.default: 2,
    aten.flip.default: 1,
}
"""Operators that combine elements along dims -> which argument names the dims (absent: the last, or all)."""

MATMULS = frozenset({aten.linear.default, graft.linear_rows.default, graft.expert_linear.default})
"""Matrix products with a constant weight."""

MASKS: dict[Any, int] = {aten.where.self: 0, aten.masked_fill.Scalar: 1}
"""Operators that choose -> which argument says what."""

ATTENTION = frozenset({graft.attention.default, graft.kv_attend.default, graft.kv_attend_pages.default})
STATE_WRITES = frozenset({graft.kv_append.default})
GATHERS = frozenset({aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default})
SIZES = frozenset({aten.sym_size.int}) | PYTHON_ARITHMETIC


def node_class(target: Callable) -> str:
    """The class of an operator: what codegen's rules and the cost model ask for."""
    classes = {
        "matmul": MATMULS,
        "attention": ATTENTION,
        "state": STATE_WRITES,
        "row-wise": ROW_WISE,
        "view": VIEWS,
        "gather": GATHERS,
        "size": SIZES,
        "reduction": REDUCTIONS,
    }
    return next((name for name, members in classes.items() if target in members), "other")


def is_functional(target: Callable) -> bool:
    """Whether the operator neither writes its arguments nor is unknown to the dispatcher."""
    if target in PYTHON_ARITHMETIC or target is operator.getitem:
        return True
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target is torch.ops.higher_order.cond
    schema = getattr(target, "_schema", None)
    return schema is not None and not schema.is_mutable
