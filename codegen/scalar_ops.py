"""The scalar operators: what an ATen operator computes for one element, as a tree of primitives that printers know.

An operator is added here, in one place, for every backend. Values are computed in float32 (float64 for float64) and
rounded to the node's dtype after every operator, as ATen does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from graft.compiler.canonical import aten

PRIMITIVES: dict[str, str] = {
    "add": "a + b",
    "sub": "a - b",
    "mul": "a * b",
    "div": "a / b",
    "neg": "-a",
    "abs": "|a|",
    "min": "the smaller, NaN if either is",
    "max": "the larger, NaN if either is",
    "sqrt": "square root",
    "exp": "e**a",
    "expm1": "e**a - 1",
    "log": "natural logarithm",
    "log1p": "log(1 + a)",
    "sin": "sine",
    "cos": "cosine",
    "tanh": "hyperbolic tangent",
    "erf": "error function",
    "pow": "a**b",
    "floor": "largest whole number not above",
    "lt": "1 if a < b else 0",
    "le": "1 if a <= b else 0",
    "eq": "1 if a == b else 0",
    "select": "b if a else c",
}
"""Primitive -> meaning; comparisons and masks are numbers, 0 for false."""

Tree = Any
"""A value of a loop (int), a literal (float), or ("primitive", *trees)."""


def sigmoid(x: Tree) -> Tree:
    return ("div", 1.0, ("add", 1.0, ("exp", ("neg", x))))


def gelu(x: Tree, *, approximate: str = "none") -> Tree:
    inner: Tree = ("erf", ("mul", x, math.sqrt(0.5)))
    if approximate == "tanh":
        cubic = ("add", x, ("mul", 0.044715, ("mul", ("mul", x, x), x)))
        inner = ("tanh", ("mul", math.sqrt(2 / math.pi), cubic))
    return ("mul", ("mul", 0.5, x), ("add", 1.0, inner))


def power(x: Tree, exponent: Tree) -> Tree:
    """Small whole and half exponents by multiplication and roots, exactly as ATen special-cases them."""
    by_exponent = {
        2.0: ("mul", x, x),
        3.0: ("mul", ("mul", x, x), x),
        0.5: ("sqrt", x),
        -0.5: ("div", 1.0, ("sqrt", x)),
        -1.0: ("div", 1.0, x),
        -2.0: ("div", 1.0, ("mul", x, x)),
    }
    return by_exponent.get(exponent) if isinstance(exponent, float) and exponent in by_exponent else (
        ("pow", x, exponent)
    )


def softplus(x: Tree, beta: float = 1.0, threshold: float = 20.0) -> Tree:
    scaled = ("mul", x, beta)
    return ("select", ("lt", threshold, scaled), x, ("div", ("log1p", ("exp", scaled)), beta))


def clamp(x: Tree, low: Tree = None, high: Tree = None) -> Tree:
    x = x if low is None else ("max", x, low)
    return x if high is None else ("min", x, high)


def scaled_sum(x: Tree, y: Tree, *, alpha: float = 1.0) -> Tree:
    return ("add", x, y if alpha == 1 else ("mul", y, alpha))


def scaled_difference(x: Tree, y: Tree, *, alpha: float = 1.0) -> Tree:
    return ("sub", x, y if alpha == 1 else ("mul", y, alpha))


def primitive(name: str) -> Callable[..., Tree]:
    return lambda *operands: (name, *operands)


def flipped(name: str) -> Callable[..., Tree]:
    return lambda x, y: (name, y, x)


def unequal(x: Tree, y: Tree) -> Tree:
    return ("sub", 1.0, ("eq", x, y))


TREES: dict[Any, Callable[..., Tree]] = {
    aten.add.Tensor: scaled_sum,
    aten.sub.Tensor: scaled_difference,
    aten.rsub.Scalar: lambda x, y, alpha=1.0: scaled_difference(y, x, alpha=alpha),
    aten.mul.Tensor: primitive("mul"),
    aten.div.Tensor: primitive("div"),
    aten.neg.default: primitive("neg"),
    aten.abs.default: primitive("abs"),
    aten.pow.Tensor_Scalar: power,
    aten.pow.Tensor_Tensor: primitive("pow"),
    aten.pow.Scalar: primitive("pow"),
    aten.sqrt.default: primitive("sqrt"),
    aten.rsqrt.default: lambda x: ("div", 1.0, ("sqrt", x)),
    aten.reciprocal.default: lambda x: ("div", 1.0, x),
    aten.exp.default: primitive("exp"),
    aten.expm1.default: primitive("expm1"),
    aten.log.default: primitive("log"),
    aten.sin.default: primitive("sin"),
    aten.cos.default: primitive("cos"),
    aten.tanh.default: primitive("tanh"),
    aten.erf.default: primitive("erf"),
    aten.floor.default: primitive("floor"),
    aten.sigmoid.default: sigmoid,
    aten.silu.default: lambda x: ("div", x, ("add", 1.0, ("exp", ("neg", x)))),
    aten.gelu.default: gelu,
    aten.relu.default: lambda x: ("max", x, 0.0),
    aten.softplus.default: softplus,
    aten.clamp.default: clamp,
    aten.clamp_min.default: primitive("max"),
    aten.minimum.default: primitive("min"),
    aten.maximum.default: primitive("max"),
    aten.min.other: primitive("min"),
    aten.max.other: primitive("max"),
    aten.where.self: primitive("select"),
    aten.masked_fill.Scalar: lambda x, mask, value: ("select", mask, value, x),
    aten.eq.Scalar: primitive("eq"),
    aten.ne.Scalar: unequal,
    aten.gt.Scalar: flipped("lt"),
    aten.gt.Tensor: flipped("lt"),
    aten.ge.Scalar: flipped("le"),
    aten.ge.Tensor: flipped("le"),
    aten.lt.Scalar: primitive("lt"),
    aten.lt.Tensor: primitive("lt"),
    aten.le.Scalar: primitive("le"),
    aten.le.Tensor: primitive("le"),
    aten.logical_not.default: lambda x: ("eq", x, 0.0),
    aten._to_copy.default: lambda x, **_: x,
}
"""Element-wise operator -> its tree, from its operands in order (trees or literals) and its keywords."""

WIDE_NUMBERS = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.softplus.default})
"""Operators whose literals ATen takes as they are; with all others it rounds them to the dtype of the tensors."""

REDUCERS: dict[Any, str] = {
    aten.mean.dim: "sum",
    aten.sum.dim_IntList: "sum",
    aten.amax.default: "max",
    aten.amin.default: "min",
}
"""Reduction -> how two elements are combined; a mean is a scaled sum."""
