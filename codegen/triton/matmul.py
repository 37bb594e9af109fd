"""Products with rows of parameters as Triton: one tile and one split of the inner dim for any number of rows.

So a row's sum is taken in one order whatever its company. The table is fixed by the product's shape; tuning would have
to choose once for all numbers of rows, and the shapes of decoding are bound by the weights' bytes anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

from graft.codegen.kernel_ir import GatherKernel, MatmulKernel
from graft.codegen.triton.printed import TYPES, Grid, Printed, narrowed, supported

ROWS = 32
"""Rows of a tile: as many as decode steps have, so that each weight is read once."""
PROGRAMS = 128
"""As many as keep a GPU's memory busy; products with fewer outputs are split along their inner dim."""
COLUMNS = 1024
"""Elements that a program adds up or copies."""


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: outputs of a tile, elements of the inner dim per step, steps of a part, parts."""

    outputs: int
    step: int
    steps: int
    parts: int

    @property
    def stages(self) -> int:
        """One more than the steps that are under way at once: 48 KiB of shared memory, of which every GPU has 64."""
        return 3 if self.outputs == 64 else 4


def tiling(ranges: tuple[tuple[int, int], ...], depth: int, itemsize: int) -> Tiling:
    """The table: steps of 256 bytes, 128 where that divides the inner dim better; wider tiles for vocabularies."""
    outputs = 64 if sum(end - start for start, end in ranges) >= 16384 else 32
    step = (256 if depth * itemsize % 256 == 0 else 128) // itemsize
    tiles = sum(-(-(end - start) // outputs) for start, end in ranges)
    every, parts = -(-depth // step), 1
    while tiles * parts < PROGRAMS and 4 * parts <= every:
        parts *= 2
    steps = -(-every // parts)
    return Tiling(outputs, step, steps, -(-every // steps))


def print_matmul(kernel: MatmulKernel) -> tuple[Printed, ...]:
    """The product; where its inner dim is split, also the sum of the parts."""
    supported(kernel.weight_dtype, f"a product with {kernel.weights[0]}")
    x, out = kernel.arrays
    cut = tiling(kernel.ranges, kernel.depth, kernel.weight_dtype.itemsize)
    count, kind = len(kernel.weights), TYPES[kernel.weight_dtype]
    column, stored = kernel.columns or (0, kernel.depth)
    tiles = [-(-(end - start) // cut.outputs) for start, end in kernel.ranges]
    firsts = [
        f"(tile - {sum(tiles[:at])}) * {cut.outputs} + {start}" for at, (start, _) in enumerate(kernel.ranges)
    ]
    inputs = [f"tile * 0 + {kernel.offset + start}" for start in kernel.starts]
    source = f"a0 + {pick(inputs, tiles)}" if any(kernel.starts) else f"a0 + {kernel.offset}"
    lines = [
        "row, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)",
        f"row = row * {ROWS} + tl.arange(0, {ROWS})",
        "weight = " + pick([f"w{piece}" for piece in range(count)], tiles),
        "first = " + pick(firsts, tiles),
        "last = " + pick([f"tile * 0 + {end}" for _, end in kernel.ranges], tiles),
        "shift = " + pick([f"tile * 0 + {shift}" for shift in shifts(kernel)], tiles),
        f"output = first + tl.arange(0, {cut.outputs})",
        f"x = {source} + row.to(tl.int64) * {x.width}",
        f"sums = multiply(x, row < rows, weight, output, last, part, {kernel.depth}, {cut.step}, {cut.steps}, "
        f"{column}, {stored})",
        "real = (row < rows)[:, None] & (output < last)[None, :]",
    ]
    weights = [(f"w{piece}", f"*{kind}", f"weight {name}") for piece, name in enumerate(kernel.weights)]
    biases = [(f"b{piece}", f"*{kind}", f"bias {name}") for piece, name in enumerate(kernel.biases)]
    place = f"row.to(tl.int64)[:, None] * {out.width} + (output + shift)[None, :]"
    given = [("a0", f"*{kind}", x.name), *weights]
    grid = Grid(out.rows, ROWS, sum(tiles), cut.parts)
    if cut.parts > 1:
        wide = cut.parts * out.width
        lines.append(f"place = row.to(tl.int64)[:, None] * {wide} + part * {out.width} + (output + shift)[None, :]")
        lines.append("tl.store(scratch + place, sums, real)")
        given += [("scratch", "*fp32", "scratch"), ("rows", "i32", f"rows {out.rows}")]
        product = printed("matmul", given, lines, grid, scratch=wide, stages=cut.stages)
        return product, print_sum(kernel, cut, biases)
    if biases:
        lines.append("bias = " + pick([name for name, _, _ in biases], tiles))
        lines.append("sums += tl.load(bias + output, output < last, other=0.0).to(tl.float32)[None, :]")
    value = "sums" if TYPES[out.dtype] == "fp32" else narrowed("sums", out.dtype)
    lines.append(f"tl.store(a1 + {place}, {value}, real)")
    given += [*biases, ("a1", f"*{TYPES[out.dtype]}", out.name), ("rows", "i32", f"rows {out.rows}")]
    return (printed("matmul", given, lines, grid, stages=cut.stages),)


def print_sum(kernel: MatmulKernel, cut: Tiling, biases: list[tuple[str, str, str]]) -> Printed:
    """The parts of every product added in order, then the bias."""
    out = kernel.arrays[1]
    lines = [
        "row = tl.program_id(0).to(tl.int64)",
        f"output = tl.program_id(1) * {COLUMNS} + tl.arange(0, {COLUMNS})",
        f"place = scratch + row * {cut.parts * out.width} + output",
        f"sums = tl.load(place, output < {out.width}, other=0.0)",
        f"for part in range(1, {cut.parts}):",
        f"    sums += tl.load(place + part * {out.width}, output < {out.width}, other=0.0)",
    ]
    for (name, _, _), (start, end), shift in zip(biases, kernel.ranges, shifts(kernel), strict=False):
        inside = f"(output >= {start + shift}) & (output < {end + shift})"
        lines.append(f"sums += tl.load({name} + output - {shift}, {inside}, other=0.0).to(tl.float32)")
    value = "sums" if TYPES[out.dtype] == "fp32" else narrowed("sums", out.dtype)
    lines.append(f"tl.store(a1 + row * {out.width} + output, {value}, output < {out.width})")
    given = [("scratch", "*fp32", "scratch"), *biases, ("a1", f"*{TYPES[out.dtype]}", out.name)]
    return printed("sum", given, lines, Grid(out.rows, 1, -(-out.width // COLUMNS)), scratch=cut.parts * out.width)


def shifts(kernel: MatmulKernel) -> list[int]:
    """For each parameter: the column of the result that its first row would have."""
    found, column = [], 0
    for start, end in kernel.ranges:
        found.append(column - start)
        column += end - start
    return found


def pick(values: list[str], tiles: list[int]) -> str:
    """The value of the parameter that a tile belongs to."""
    text = values[-1]
    for at in reversed(range(len(values) - 1)):
        text = f"tl.where(tile < {sum(tiles[: at + 1])}, {values[at]}, {text})"
    return text


def print_gather(kernel: GatherKernel) -> Printed:
    """Rows of a parameter."""
    where, out = kernel.arrays
    kind, width = TYPES[kernel.weight_dtype], out.width
    lines = [
        "row = tl.program_id(0).to(tl.int64)",
        f"at = tl.program_id(1) * {COLUMNS} + tl.arange(0, {COLUMNS})",
        f"number = tl.load(a0 + row * {where.width} + {kernel.offset})",
        f"tl.store(a1 + row * {width} + at, tl.load(w0 + number * {width} + at, at < {width}), at < {width})",
    ]
    given = [("a0", "*i64", where.name), ("a1", f"*{TYPES[out.dtype]}", out.name)]
    given.append(("w0", f"*{kind}", f"weight {kernel.weight}"))
    return printed("gather", given, lines, Grid(out.rows, 1, -(-width // COLUMNS)))


def printed(
    kind: str, given: list[tuple[str, str, str]], lines: list[str], grid: Grid, *, scratch: int = 0, stages: int = 2
) -> Printed:
    """A kernel from its parameters' names, types and arguments."""
    return Printed(
        kind,
        tuple((name, dtype) for name, dtype, _ in given),
        tuple(lines),
        tuple(argument for _, _, argument in given),
        grid,
        scratch=scratch,
        stages=stages,
    )
