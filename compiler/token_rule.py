"""The rule that nothing but attention combines tokens.

Sequences of any number and length are rows of one call, so an operator that sums, sorts, shifts or multiplies along
rows would make a token's result depend on its neighbours. Rows are told by their sizes: every dynamic size of a
function counts rows of some kind (batch and length in a dense function; rows, slots and results in a flat one), so a
dim whose size has a symbol in it is a dim of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graft.compiler.canonical import ATTENTION, REDUCTIONS, STATE_WRITES, aten

EXEMPT = ATTENTION | STATE_WRITES | {aten.sym_size.int}


@dataclass(frozen=True)
class Sizes:
    """The names of the symbols in a function's sizes."""

    names: dict[sympy.Expr, str]

    def rows(self, size: Any) -> set[sympy.Expr]:
        """The symbols in a size; empty where it is a number."""
        return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()

    def text(self, size: Any) -> str:
        """A size in the signature's names."""
        return self.expression_text(size.node.expr) if self.rows(size) else str(size)

    def expression_text(self, expression: sympy.Expr) -> str:
        """An expression in the symbols, in the signature's names."""
        return str(expression.xreplace({symbol: sympy.Symbol(name) for symbol, name in self.names.items()}))


def mixes_tokens(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> str | None:
    """What the call combines across tokens, e.g. "cumsum along dim 1, of size L"; None where it combines nothing."""
    if node.target in EXEMPT or is_row_selection(node):
        return None
    rule = RULES.get(node.target, along_dims)
    result = rule(node, Arguments(node, values), sizes)
    return result or loses_rows(node, values, sizes)


class Arguments:
    """A call's arguments by their schema's names, nodes replaced by fake values, defaults filled in."""

    def __init__(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
        self.result = values[node]
        schema = getattr(node.target, "_schema", None)
        names = schema.arguments if schema else ()
        self.given = {argument.name: argument.default_value for argument in names if argument.has_default_value()}
        self.given |= dict(zip((argument.name for argument in names), args, strict=False)) | dict(kwargs)

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or `default` where the schema has none of that name."""
        return self.given.get(name, default)

    @property
    def tensor(self) -> Tensor | None:
        """The first tensor among the arguments."""
        return next((value for value in self.given.values() if isinstance(value, Tensor)), None)


def is_row_selection(node: fx.Node) -> bool:
    """The one permitted choice among rows: those whose logits are wanted."""
    if node.target is not aten.index_select.default:
        return False
    return node.args[2].op == "placeholder" and node.args[2].name == "wanted"


def name_of(node: fx.Node) -> str:
    """An operator's name without namespace and overload."""
    return node.target._schema.name.split("::")[1] if hasattr(node.target, "_schema") else str(node.target)


def along(node: fx.Node, tensor: Tensor, dims: Sequence[int], sizes: Sizes, verb: str = "along") -> str | None:
    """The complaint about the first of `dims` that is a dim of rows."""
    for dim in dims:
        if sizes.rows(tensor.shape[dim]):
            return f"{name_of(node)} {verb} dim {dim % tensor.dim()}, of size {sizes.text(tensor.shape[dim])}"
    return None


def along_dims(node: fx.Node, arguments: Arguments, sizes: Sizes) -> str | None:
    """Whatever names dims to work along; a reduction that names none works along all."""
    tensor = arguments.tensor
    if tensor is None or tensor.dim() == 0:
        return None
    named: Any = next((arguments.given[name] for name in ("dim", "dims") if name in arguments.given), "absent")
    if node.target not in REDUCTIONS and named in ("absent", None):
        return None
    if named in ("absent", None) or named == []:
        return along(node, tensor, range(tensor.dim()), sizes)
    return along(node, tensor, named if isinstance(named, (list, tuple)) else [named], sizes)


def no_rule(node: fx.Node, arguments: Arguments, sizes: Sizes) -> str | None:
    """For views, which only rearrange."""
    return None


def slice_rule(node: fx.Node, arguments: Arguments, sizes: Sizes) -> str | None:
    """A slice of rows, unless it takes all of them."""
    tensor, dim = arguments.get("self"), arguments.get("dim")
    size, start, end = tensor.shape[dim], arguments.get("start"), arguments.get("end")
    whole_end = end is None or (isinstance(end, int) and end >= 2**62) or same_size(end, size)
    if start in (None, 0) and whole_end and arguments.get("step") == 1:
        return None
    return along(node, tensor, [dim], sizes)


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are the same expression, without asking for a guard."""
    expression = lambda size: size.node.expr if isinstance(size, torch.SymInt) else size  # noqa: E731
    return bool(expression(left) == expression(right))


def cat_rule(node: fx.Node, arguments: Arguments, sizes: Sizes) -> str | None:
    """A concatenation of rows."""
    tensors = [tensor for tensor in arguments.get("tensors") if tensor.dim() > 0]
    return next(filter(None, (along(node, tensor, [arguments.get("dim")], sizes) for tensor in tensors)), None)


def contraction_rule(node: fx.Node, arguments: Arguments, sizes: Sizes) -> str | None:
    """A matrix product that sums over rows."""
    left = arguments.tensor
    return along(node, left, [-1], sizes, "sums over") if left is not None and left.dim() else None


def linear_rule(node: fx.Node, arguments: Arguments, sizes: Sizes) -> str | None:
    """A linear whose inputs, or whose weight, are rows."""
    x, weight = arguments.get("input"), arguments.get("weight")
    return along(node, x, [-1], sizes, "sums over") or along(node, weight, [0], sizes, "makes features of")


def convolution_rule(node: fx.Node, arguments: Arguments, sizes: Sizes) -> str | None:
    """A convolution whose window moves over rows."""
    tensor = arguments.tensor
    return along(node, tensor, range(2, tensor.dim()), sizes) if tensor is not None else None


def index_rule(node: fx.Node, arguments: Arguments, sizes: Sizes) -> str | None:
    """A choice among rows by index; choosing among a parameter's rows, such as experts, is free."""
    indexed = [dim for dim, index in enumerate(arguments.get("indices")) if index is not None]
    return along(node, arguments.get("self"), indexed, sizes)


def pad_rule(node: fx.Node, arguments: Arguments, sizes: Sizes) -> str | None:
    """Padding in front of or behind rows."""
    pad = arguments.get("pad")
    return along(node, arguments.get("self"), [-1 - i // 2 for i, amount in enumerate(pad) if amount != 0], sizes)


def count_rule(node: fx.Node, arguments: Arguments, sizes: Sizes) -> str | None:
    """A count over rows: a row's place in the call, which says nothing about its place in the text."""
    bounds = [arguments.get("start", 0), arguments.get("end", 0)]
    found = next((bound for bound in bounds if sizes.rows(bound)), None)
    return f"{name_of(node)} counts rows, up to {sizes.text(found)}" if found is not None else None


def repeat_rule(node: fx.Node, arguments: Arguments, sizes: Sizes) -> str | None:
    """Repeating each row in place keeps rows apart; a number of its own for each row does not tell which is whose."""
    return None if isinstance(arguments.get("repeats"), int) else f"{name_of(node)} by computed counts"


def reshape_rule(node: fx.Node, arguments: Arguments, sizes: Sizes) -> str | None:
    """A reshape that cuts across rows: it makes a dim of fixed size whose elements lie a number of rows apart."""
    fresh = spaced_dims(arguments.result.shape, sizes) - spaced_dims(arguments.get("self").shape, sizes)
    return f"{name_of(node)} takes elements of different rows for one row's" if fresh else None


def spaced_dims(shape: Sequence[Any], sizes: Sizes) -> set[tuple[str, int]]:
    """(symbols to the right, size) of every dim of fixed size with a dim of rows to its right."""
    found, behind = set(), set[str]()
    for size in reversed(shape):
        if sizes.rows(size):
            behind |= {str(symbol) for symbol in sizes.rows(size)}
        elif behind and size != 1:
            found.add((", ".join(sorted(behind)), int(size)))
    return found


def loses_rows(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> str | None:
    """Whatever the operator is: rows that go in and do not come out were combined, or chosen among."""
    found = set().union(*(rows_of(values[source], sizes) for source in node.all_input_nodes))
    lost = found - rows_of(values[node], sizes)
    if not lost or not isinstance(values[node], (Tensor, tuple, list)):
        return None
    return f"{name_of(node)} loses the dim of size {', '.join(sorted(map(sizes.expression_text, lost)))}"


def rows_of(value: Any, sizes: Sizes) -> set[sympy.Expr]:
    """The symbols in the sizes of a tensor, or of several."""
    if isinstance(value, Tensor):
        return set().union(*(sizes.rows(size) for size in value.shape)) if value.dim() else set()
    return set().union(*map(rows_of, value, [sizes] * len(value))) if isinstance(value, (tuple, list)) else set()


Rule = Callable[[fx.Node, Arguments, Sizes], str | None]

RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.expand.default), no_rule),
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims, aten.stack.default), no_rule),
    **dict.fromkeys((aten.bmm.default, aten.matmul.default, aten.mm.default, aten.baddbmm.default), contraction_rule),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.convolution.default), convolution_rule),
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), count_rule),
    aten.slice.Tensor: slice_rule,
    aten.cat.default: cat_rule,
    aten.linear.default: linear_rule,
    aten.index.Tensor: index_rule,
    aten.constant_pad_nd.default: pad_rule,
    aten.repeat_interleave.self_int: repeat_rule,
    aten.reshape.default: reshape_rule,
}
"""Operators with a rule of their own; every other one may not work along a dim of rows that it names."""
