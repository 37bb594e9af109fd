"""The experts of a mixture as Triton: products with the matrices that slots chose, and the choice of the largest.

Tiles and the order over the inner dim are fixed by the product's shape, as those of other products are, so that a
slot's sum is taken in one order whatever its company. The inner dim is not split: every slot has tiles of its own,
which are programs enough.
"""

from __future__ import annotations

from graft.codegen.kernel_ir import ExpertKernel, TopKernel
from graft.codegen.triton.attention import lanes
from graft.codegen.triton.matmul import printed, tiling
from graft.codegen.triton.printed import TYPES, Grid, Printed, narrowed, supported


def print_experts(kernel: ExpertKernel) -> Printed:
    """One program for a slot and a tile of outputs; a slot that chose no expert gets zeros."""
    supported(kernel.weight_dtype, f"a product with experts of {kernel.weight}")
    x, index, out = kernel.arrays
    kind, slots, named = TYPES[kernel.weight_dtype], kernel.slots, out.rows == "N"
    cut = tiling(((0, kernel.outputs),), kernel.depth, kernel.weight_dtype.itemsize)
    steps, tiles = -(-kernel.depth // cut.step), -(-kernel.outputs // cut.outputs)
    # From one element of a matrix to the next, along its outputs and its inputs.
    strides = (1, kernel.outputs) if kernel.transposed else (kernel.depth, 1)
    chose = f"a1 + {kernel.offsets[1]}, {'sequences' if named else 'a1'}, slot, rows * {slots}, "
    chose += f"{index.width}, {slots}, {kernel.experts}, {named}"
    zeros, sums = "tl.zeros(output.shape, tl.float32)", "sums"
    if TYPES[out.dtype] != "fp32":
        zeros, sums = narrowed(zeros, out.dtype), narrowed(sums, out.dtype)
    lines = [
        "row, tile = tl.program_id(0), tl.program_id(1)",
        f"slot, output = row * {slots} + tile % {slots}, tile // {slots} * {cut.outputs} + tl.arange(0, {cut.outputs})",
        f"expert = expert_of({chose})",
        "if expert < 0:",
        f"    tl.store(a2 + slot.to(tl.int64) * {kernel.outputs} + output, {zeros}, output < {kernel.outputs})",
        "    return",
        f"if before(expert, {chose}) % CHOSEN != 0:",
        "    return",
        f"slots = together(expert, {chose})",
        "real = slots >= 0",
        f"x = a0 + {kernel.offsets[0]} + (slots // {slots}).to(tl.int64) * {x.width}",
        f"x += slots % {slots} * {kernel.stride}",
        f"weight = w0 + expert * {kernel.outputs * kernel.depth}",
        f"sums = multiply(x, real, weight, output, {kernel.outputs}, 0, {kernel.depth}, {cut.step}, {steps}, 0, "
        f"{strides[0]}, {strides[1]})",
    ]
    if kernel.bias:
        bias = f"tl.load(b0 + expert * {kernel.outputs} + output, output < {kernel.outputs}, other=0.0)"
        lines.append(f"sums += {bias}.to(tl.float32)[None, :]")
    place = f"slots.to(tl.int64)[:, None] * {kernel.outputs} + output[None, :]"
    lines.append(f"tl.store(a2 + {place}, {sums}, real[:, None] & (output < {kernel.outputs})[None, :])")
    form = "transposed" if kernel.transposed else "weight"
    given = [("a0", f"*{kind}", x.name), ("a1", "*i64", index.name), ("w0", f"*{kind}", f"{form} {kernel.weight}")]
    given += [("b0", f"*{kind}", f"bias {kernel.bias}")] if kernel.bias else []
    given += [("sequences", "*i64", "sequences")] if named else []
    given += [("a2", f"*{TYPES[out.dtype]}", out.name), ("rows", "i32", f"rows {out.rows}")]
    return printed("experts", given, lines, Grid(out.rows, 1, slots * tiles), stages=cut.stages)


def print_top(kernel: TopKernel) -> Printed:
    """One program for a row and a group of its elements."""
    x, *results = kernel.arrays
    kind, found = TYPES[x.dtype], lanes(kernel.count)
    lines = [
        "row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)",
        f"x = a0 + row * {x.width} + {kernel.offset} + group * {kernel.width}",
        f"found = largest_few(x, {kernel.width}, {lanes(kernel.width)}, {kernel.count}, {found})",
        f"i = tl.arange(0, {found})",
        f"place = (row * {kernel.groups} + group) * {kernel.count} + i",
    ]
    given = [("a0", f"*{kind}", x.name)]
    for number, (result, array) in enumerate(zip(kernel.results, results, strict=True), 1):
        value = "found.to(tl.int64)" if result else f"tl.load(x + found, i < {kernel.count})"
        lines.append(f"tl.store(a{number} + place, {value}, i < {kernel.count})")
        given.append((f"a{number}", f"*{TYPES[array.dtype]}", array.name))
    return printed("top", given, lines, Grid(x.rows, 1, kernel.groups))
