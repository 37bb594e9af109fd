"""How a value and a call are written wherever a program is shown: `f32[1, N, 64]`, `x[..., 0:64]`, `a + b`.

Sizes carry the names of the function's signature, parameters their path, and what an operator's schema has a default
for is left out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graft.compiler.canonical import VIEWS, aten, graft
from graft.compiler.program import Function

DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}

INFIX: dict[Any, str] = {
    aten.add.Tensor: "+",
    aten.sub.Tensor: "-",
    aten.mul.Tensor: "*",
    aten.div.Tensor: "/",
    aten.pow.Tensor_Scalar: "**",
    aten.pow.Tensor_Tensor: "**",
    aten.pow.Scalar: "**",
    aten.eq.Scalar: "==",
    aten.ne.Scalar: "!=",
    aten.gt.Scalar: ">",
    aten.ge.Scalar: ">=",
    aten.lt.Scalar: "<",
    aten.le.Scalar: "<=",
    aten.gt.Tensor: ">",
    aten.ge.Tensor: ">=",
    aten.lt.Tensor: "<",
    aten.le.Tensor: "<=",
    aten.bitwise_and.Tensor: "&",
    aten.bitwise_or.Tensor: "|",
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
}

OPEN_END = 2**63 - 1
"""The end of a slice that runs to the last element."""


def dtype_text(dtype: torch.dtype) -> str:
    """`torch.float32` -> "f32"."""
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def count_text(count: float, unit: str = "") -> str:
    """A number with a decimal prefix and three digits: 1.23 M, 45.6 k."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= factor * 0.9995:
            return f"{count / factor:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}".rstrip()


def bytes_text(count: float) -> str:
    """A number of bytes with a decimal prefix: 269 MB."""
    return count_text(count, "B")


def size_names(function: Function) -> dict[sympy.Symbol, sympy.Symbol]:
    """The symbols behind the function's dynamic sizes -> symbols named as in its signature."""
    inputs = {spec.name: spec for spec in function.signature}
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    for node in function.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in inputs and isinstance(value, Tensor):
            for name, size in zip(inputs[node.name].sizes, value.shape, strict=False):
                if isinstance(name, str) and isinstance(size, torch.SymInt):
                    names.setdefault(size.node.expr, size_symbol(name))
    return names


def size_symbol(name: str) -> sympy.Symbol:
    """The symbol of a size: a positive integer."""
    return sympy.Symbol(name, integer=True, positive=True)


class Notation:
    """How the values and calls of one function are written."""

    def __init__(self, function: Function) -> None:
        self.function, self.names = function, size_names(function)

    def size(self, size: Any) -> str:
        """A size: a number, or an expression in the signature's names."""
        return str(self.expression(size))

    def expression(self, size: Any) -> Any:
        """A size as a sympy expression in the signature's names, or as a number."""
        return size.node.expr.xreplace(self.names) if isinstance(size, torch.SymInt) else size

    def type(self, value: Any) -> str:
        """Dtype and sizes of a tensor, `(f32[N], i64[N])` for several, a size's expression, "?" for what is unknown."""
        if isinstance(value, Tensor):
            return f"{dtype_text(value.dtype)}[{', '.join(self.size(size) for size in value.shape)}]"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self.type(element) for element in value)})"
        return "?" if value is None else self.size(value)

    def node_type(self, node: fx.Node) -> str:
        """The type of the node's value."""
        return self.type(node.meta.get("val"))

    def argument(self, value: Any, prefix: str = "") -> str:
        """An argument: a node's name, a parameter's path (relative to `prefix`, with a dot in front), a constant."""
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return relative(str(value.target), prefix)
            known = value.meta.get("val")
            return self.size(known) if isinstance(known, torch.SymInt) or type(known) is int else value.name
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.argument(element, prefix) for element in value)}]"
        if isinstance(value, slice):
            return f"{self.argument(value.start, prefix)}:{self.argument(value.stop, prefix)}"
        if isinstance(value, torch.dtype):
            return dtype_text(value)
        return self.size(value) if isinstance(value, torch.SymInt) else repr(value)

    def call(self, node: fx.Node, prefix: str = "") -> str:
        """The node's right-hand side."""
        write = lambda value: self.argument(value, prefix)  # noqa: E731
        if node.target in INFIX and len(node.args) == 2 and not node.kwargs:
            return f"{write(node.args[0])} {INFIX[node.target]} {write(node.args[1])}"
        if node.target is aten.neg.default:
            return f"-{write(node.args[0])}"
        special = SPECIAL.get(node.target)
        text = special(node, write) if special else None
        return text if text is not None else self.plain_call(node, write)

    def plain_call(self, node: fx.Node, write: Callable[[Any], str]) -> str:
        """`name(operands, option=value)`, or `operand.name(...)` for a view."""
        arguments = [f"{name}={write(value)}" if name else write(value) for name, value in shown_arguments(node)]
        name = target_name(node.target)
        if node.target in VIEWS:
            values = [write(value) for value in node.args[1:]]
            return f"{arguments[0]}.{name}({', '.join(values).strip('[]')})"
        return f"{name}({', '.join(arguments)})"


def relative(path: str, prefix: str) -> str:
    """The path with `prefix` taken off; a dot in front says so."""
    return path[len(prefix) :] if prefix and path.startswith(prefix + ".") else path


def target_name(target: Any) -> str:
    """An operator's name without namespace and overload."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def shown_arguments(node: fx.Node) -> list[tuple[str | None, Any]]:
    """(None, operand) and (name, option) in the schema's order, options at their default left out; an operand behind an
    option is named too."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [(None, value) for value in node.args] + list(node.kwargs.items())
    shown: list[tuple[str | None, Any]] = []
    for index, argument in enumerate(schema.arguments):
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        given = index < len(node.args) or argument.name in node.kwargs
        if not given or (argument.has_default_value() and same_constant(value, argument.default_value)):
            continue
        elements = value if isinstance(value, (list, tuple)) else [value]
        first = all(name is None for name, _ in shown)
        operand = first and any(isinstance(element, fx.Node) for element in elements)
        single = len(elements) == 1 and not isinstance(elements[0], fx.Node)
        if elements:
            shown.append((None if operand else argument.name, elements[0] if single else value))
    return shown


def same_constant(value: Any, default: Any) -> bool:
    """Whether an argument is the schema's default."""
    return type(value) is type(default) and not isinstance(value, fx.Node) and bool(value == default)


def subscript(dim: int, index: str, rank: int | None) -> str:
    """`[..., index]` or `[:, index]` for an index into one dim."""
    from_end = dim - rank if rank is not None and dim >= 0 else dim
    if from_end == -1 and dim != 0:
        return f"[..., {index}]"
    if dim >= 0:
        return f"[{':, ' * dim}{index}]"
    return f"[..., {index}{', :' * (-dim - 1)}]"


def rank_of(node: Any) -> int | None:
    """Number of dims of a node's value, None where it is unknown."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else None


def write_slice(node: fx.Node, write: Callable[[Any], str]) -> str:
    """`x[..., 0:64]`."""
    given = dict(zip(("source", "dim", "start", "end", "step"), node.args, strict=False))
    source, dim = given["source"], given.get("dim", 0)
    start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
    text = f"{'' if start in (None, 0) else write(start)}:{'' if end in (None, OPEN_END) else write(end)}"
    text += f":{write(step)}" if step != 1 else ""
    return write(source) + subscript(dim, text, rank_of(source))


def write_select(node: fx.Node, write: Callable[[Any], str]) -> str:
    """`x[:, 0]`."""
    source, dim, index = node.args
    return write(source) + subscript(dim, write(index), rank_of(source))


def write_index(node: fx.Node, write: Callable[[Any], str]) -> str:
    """`x[:, rows]`."""
    source, indices = node.args
    return f"{write(source)}[{', '.join(':' if index is None else write(index) for index in indices)}]"


def write_getitem(node: fx.Node, write: Callable[[Any], str]) -> str:
    """`pair[0]`."""
    return f"{write(node.args[0])}[{write(node.args[1])}]"


def write_cast(node: fx.Node, write: Callable[[Any], str]) -> str | None:
    """`x.to(f32)`."""
    return f"{write(node.args[0])}.to({write(node.kwargs['dtype'])})" if set(node.kwargs) == {"dtype"} else None


def write_linear_rows(node: fx.Node, write: Callable[[Any], str]) -> str:
    """`linear_rows(x, [q.weight, k.weight[0:32]])`: ranges are shown where they are not the whole parameter."""
    x, weights, biases, ranges, *rest = node.args
    named = zip(("starts", "columns"), rest, strict=False)
    more = [f"{name}={list(given)}" for name, given in named if given is not None]

    def part(operand: fx.Node, index: int) -> str:
        start, end = ranges[2 * index : 2 * index + 2]
        value = operand.meta.get("val")
        whole = isinstance(value, Tensor) and (start, end) == (0, value.shape[0])
        return write(operand) + ("" if whole else f"[{start}:{end}]")

    lists = [[part(operand, index) for index, operand in enumerate(operands)] for operands in (weights, biases)]
    operands = [write(x), *("[" + ", ".join(parts) + "]" for parts in lists if parts), *more]
    return f"linear_rows({', '.join(operands)})"


SPECIAL: dict[Any, Callable[[fx.Node, Callable[[Any], str]], str | None]] = {
    aten.slice.Tensor: write_slice,
    aten.select.int: write_select,
    aten.index.Tensor: write_index,
    operator.getitem: write_getitem,
    aten._to_copy.default: write_cast,
    graft.linear_rows.default: write_linear_rows,
}
