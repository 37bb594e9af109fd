"""Row kernels as C++: loops over the elements of every row, the last dim as vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from graft.codegen.kernel_ir import Access, Compute, Const, Convert, Load, Loop, Reduce, RowKernel, Store
from graft.codegen.row_builder import computing

TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "int64_t",
    torch.bool: "float",
}
CONVERSIONS = {
    torch.float32: "to_f32",
    torch.float64: "to_f64",
    torch.bfloat16: "to_bf16",
    torch.float16: "to_f16",
    torch.int64: "to_i64",
    torch.int32: "to_i64",
}
NEUTRAL = {"sum": "0", "max": "-INFINITY", "min": "INFINITY"}
COMBINE = {"sum": "op::add", "max": "op::max", "min": "op::min"}


def row_kernel(kernel: RowKernel) -> str:
    """Loops over the elements of every row."""
    selected = {
        one.access.operand
        for loop in kernel.loops
        for one in loop.body
        if isinstance(one, Load) and one.access.selected
    }
    lines = [
        f"for (Share share(step.count('{kernel.rows}'), part, step.parts); share.first < share.last; "
        "++share.first) {",
        "    const int64_t row = share.first;",
    ]
    for index, array in enumerate(kernel.arrays):
        row = "step.call.wanted[row]" if index in selected else "row"
        shift = f" + {row} * {array.width}" if array.rows else ""
        lines.append(f"    auto* a{index} = step.array<{TYPES[array.dtype]}>(argument[{index}]){shift};")
    used = {one.access.operand for loop in kernel.loops for one in loop.body if isinstance(one, (Load, Store, Reduce))}
    for index, (size, dtype) in enumerate(kernel.locals):
        if index + len(kernel.arrays) not in used:
            continue  # the value has moved to an array that other kernels read
        lines.append(f"    alignas(64) {TYPES[dtype]} a{index + len(kernel.arrays)}[{size}];")
    for loop in kernel.loops:
        braces = any(isinstance(one, Reduce) for one in loop.body) and len(loop.sizes) == loop.reduced
        lines += ["    {", *("        " + line for line in print_loop(loop)), "    }"] if braces else [
            "    " + line for line in print_loop(loop)
        ]
    return indented([*lines, "}"])


def print_loop(loop: Loop) -> Iterator[str]:
    """One loop, the last dim as vectors."""
    depth = max(len(loop.sizes) - 1, 0)
    outer = min(depth, len(loop.sizes) - loop.reduced) if loop.reduced else depth
    indent = ""
    for dim in range(outer):
        yield f"{indent}for (int64_t i{dim} = 0; i{dim} < {loop.sizes[dim]}; ++i{dim}) {{"
        indent += "    "
    reductions = [(at, one) for at, one in enumerate(loop.body) if isinstance(one, Reduce)]
    types = value_types(loop)
    for at, reduction in reductions:
        kind = types[reduction.operand]
        yield f"{indent}vec<{kind}> r{at} = splat<{kind}>({NEUTRAL[reduction.op]});"
    for dim in range(outer, depth):
        yield f"{indent}for (int64_t i{dim} = 0; i{dim} < {loop.sizes[dim]}; ++i{dim})"
        indent += "    "
    yield f"{indent}sweep<{loop.sizes[-1] if loop.sizes else 1}>([&](int64_t i, auto lanes) {{"
    for at, one in enumerate(loop.body):
        yield f"{indent}    {statement(at, one, types, depth)}"
    yield f"{indent}}});"
    indent = indent[: len(indent) - 4 * (depth - outer)]
    for at, reduction in reductions:
        kind = types[reduction.operand]
        total = f"fold<{kind}>(r{at}, [](auto a, auto b) {{ return {COMBINE[reduction.op]}(a, b); }})"
        total += f" / {literal(reduction.divisor, kind)}" if reduction.divisor != 1 else ""
        if TYPES[reduction.dtype] not in (kind, "int64_t"):
            total = f"rounded<{TYPES[reduction.dtype]}>({total})"
        yield f"{indent}store_one({pointer(reduction.access, depth, inner=False)}, {total});"
    for _ in range(outer):
        indent = indent[:-4]
        yield f"{indent}}}"


def value_types(loop: Loop) -> dict[int, str]:
    """The type that each value of a body is computed in."""
    return {at: TYPES[computing(one.dtype)] for at, one in enumerate(loop.body) if not isinstance(one, (Store, Reduce))}


def statement(at: int, one: object, types: dict[int, str], depth: int) -> str:
    """One instruction."""
    match one:
        case Load(access):
            return f"const auto v{at} = {load(access, depth)};"
        case Const(number):
            return f"const auto v{at} = splat<{types[at]}>({literal(number, types[at])});"
        case Compute(op, operands):
            return f"const auto v{at} = op::{op}({', '.join(f'v{x}' for x in operands)});"
        case Convert(operand, dtype):
            return f"const auto v{at} = {CONVERSIONS[dtype]}(v{operand});"
        case Store(access, operand, dtype):
            kind = TYPES[computing(dtype)]
            value = f"v{operand}" if types[operand] == kind else f"{CONVERSIONS[computing(dtype)]}(v{operand})"
            stride = access.strides[-1] if access.strides else 1
            if stride in (0, 1):
                return f"store({pointer(access, depth)}, {value}, lanes);"
            return f"store_strided({pointer(access, depth)}, {stride}, {value}, lanes);"
        case Reduce(op, operand):
            neutral = f"splat<{types[operand]}>({NEUTRAL[op]})"
            return f"r{at} = {COMBINE[op]}(r{at}, keep(v{operand}, {neutral}, lanes));"
    raise AssertionError(one)


def load(access: Access, depth: int) -> str:
    """Reading sixteen elements, or one for all sixteen."""
    stride = access.strides[-1] if access.strides else 1
    if stride == 1:
        return f"load({pointer(access, depth)}, lanes)"
    if stride == 0:
        return f"load_one({pointer(access, depth, inner=False)})"
    return f"load_strided({pointer(access, depth)}, {stride}, lanes)"


def pointer(access: Access, depth: int, *, inner: bool = True) -> str:
    """Where the elements of an index start."""
    terms = [f"a{access.operand}", *([str(access.offset)] if access.offset else [])]
    terms += (f"i{dim} * {access.strides[dim]}" for dim in range(depth) if access.strides[dim])
    if inner and access.strides:
        terms.append("i" if access.strides[-1] == 1 else f"i * {access.strides[-1]}")
    elif inner:
        terms.append("i")
    return " + ".join(terms)


def literal(value: float, kind: str) -> str:
    """A number as C++ writes it, with all its digits."""
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = np.format_float_scientific(np.float32(value), unique=True) if kind == "float" else repr(float(value))
    return text + ("f" if kind == "float" else "")


def indented(lines: list[str]) -> str:
    """Lines of a function's body."""
    return "".join(f"    {line}\n" for line in lines)
