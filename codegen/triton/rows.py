"""Row kernels as Triton: one program for each row, a loop's elements as one block.

What one loop hands to the next stays in a register where it is read in the order in which it was made; otherwise it
goes through memory of the row's own, behind a barrier. A loop with reductions is a block [outer, reduced], or
[reduced] where it reduces everything; every other loop is a block [elements].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graft.codegen.kernel_ir import Access, Compute, Const, Convert, Load, Loop, Reduce, RowKernel, Store
from graft.codegen.row_builder import computing
from graft.codegen.triton.printed import NAMES, TYPES, Grid, Printed, literal, narrowed, rounded, widened

BLOCK = 8192
"""Elements that a program works on at once."""
WORD = 4
"""Bytes of a unit of scratch."""

SPELLING = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "divide({}, {})",
    "neg": "-{}",
    "abs": "tl.abs({})",
    "min": "smaller({}, {})",
    "max": "larger({}, {})",
    "sqrt": "square_root({})",
    "exp": "exp({})",
    "expm1": "expm1({})",
    "log": "tl.log({})",
    "log1p": "log1p({})",
    "sin": "tl.sin({})",
    "cos": "tl.cos({})",
    "tanh": "tanh({})",
    "erf": "tl.erf({})",
    "pow": "power({}, {})",
    "floor": "tl.floor({})",
    "lt": "({0} < {1}).to({0}.dtype)",
    "le": "({0} <= {1}).to({0}.dtype)",
    "eq": "({0} == {1}).to({0}.dtype)",
    "select": "tl.where({} != 0, {}, {})",
}
"""Primitive (scalar_ops.PRIMITIVES) -> Triton."""
NEUTRAL = {"sum": 0.0, "max": -math.inf, "min": math.inf}
REDUCE = {"sum": "tl.sum", "max": "largest", "min": "smallest"}
COMBINE = {"sum": "{} + {}", "max": "larger({}, {})", "min": "smaller({}, {})"}


@dataclass(frozen=True)
class Shape:
    """A loop as a block of `outer` times `inner` elements; `outer` is 1 but for reductions."""

    outer: int
    inner: int

    @property
    def steps(self) -> tuple[int, int]:
        """How many of them one block takes."""
        inner = min(power_of_two(self.inner), BLOCK)
        return min(power_of_two(self.outer), BLOCK // inner), inner

    @property
    def whole(self) -> bool:
        """Whether one block takes all."""
        return self.steps[0] >= self.outer and self.steps[1] >= self.inner


def power_of_two(size: int) -> int:
    """The first that is not smaller."""
    return 1 << (size - 1).bit_length()


def shape_of(loop: Loop) -> Shape:
    """How a loop is laid out as a block."""
    if not loop.reduced:
        return Shape(1, math.prod(loop.sizes))
    return Shape(math.prod(loop.sizes[: -loop.reduced]), math.prod(loop.sizes[-loop.reduced :]))


def index(sizes: Sequence[int], strides: Sequence[int], name: str) -> str:
    """The place of the element that `name` counts, row-major, over dims with strides; "" where it is 0."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if dims and dims[-1][1] == stride * size:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    terms, below = [], 1
    for at, (size, stride) in reversed([*enumerate(dims)]):
        term = name if below == 1 else f"{name} // {below}"
        term += f" % {size}" if at else ""
        if stride:
            terms.append(f"{term} * {stride}" if stride != 1 else term)
        below *= size
    return " + ".join(reversed(terms))


@dataclass(frozen=True)
class Spot:
    """Where a block's elements lie: of an operand, at offset + outer[:, None] + inner[None, :]."""

    operand: int
    offset: int
    outer: str
    inner: str
    shape: Shape
    """Of what lies there: 1 by 1 for one number that the whole block shares."""
    selected: bool = False


def spot_of(access: Access, loop: Loop, *, reduced: bool = False) -> Spot:
    """Where a loop reads or writes; `reduced`, where it writes the results of a reduction."""
    cut = len(loop.sizes) - loop.reduced if loop.reduced else 0
    shape = shape_of(loop)
    outer = index(loop.sizes[:cut], access.strides[:cut], "i" if reduced else "j")
    if reduced:
        return Spot(access.operand, access.offset, "", outer, Shape(1, shape.outer))
    inner = index(loop.sizes[cut:], access.strides[cut:], "i")
    if not inner:  # the same for the whole of the inner dims
        return Spot(access.operand, access.offset, "", outer.replace("j", "i"), Shape(1, shape.outer if outer else 1))
    return Spot(access.operand, access.offset, outer, inner, shape)


def writes(loop: Loop) -> list[tuple[int, Spot]]:
    """The instructions of a loop that write, and where."""
    return [
        (at, spot_of(one.access, loop, reduced=isinstance(one, Reduce)))
        for at, one in enumerate(loop.body)
        if isinstance(one, (Store, Reduce))
    ]


def in_registers(kernel: RowKernel) -> set[Spot]:
    """What is written once, by a loop that is one block, so that who reads just that need not read memory."""
    written: dict[int, list[tuple[Spot, bool]]] = {}
    for loop in kernel.loops:
        for _, spot in writes(loop):
            written.setdefault(spot.operand, []).append((spot, shape_of(loop).whole))
    return {spots[0][0] for spots in written.values() if len(spots) == 1 and spots[0][1]}


def spilled(kernel: RowKernel) -> dict[int, int]:
    """Locals that are read from memory -> where in the row's scratch they lie, in words; -1 -> how many there are."""
    held, places, words = in_registers(kernel), dict[int, int](), 0
    for loop in kernel.loops:
        for one in loop.body:
            if isinstance(one, Load) and one.access.operand >= len(kernel.arrays):
                operand = one.access.operand
                if operand not in places and spot_of(one.access, loop) not in held:
                    size, dtype = kernel.locals[operand - len(kernel.arrays)]
                    places[operand] = words
                    words += -(-size * dtype.itemsize // 16) * 16 // WORD
    return places | {-1: words}


def print_rows(kernel: RowKernel) -> Printed:
    """The kernel's code."""
    printer = RowPrinter(kernel)
    shapes = [shape_of(loop) for loop in kernel.loops]
    tiles = -(-shapes[0].inner // BLOCK) if printer.split else 1
    widest = max((math.prod(shape.steps) for shape in shapes), default=1)
    more = [("wanted", "*i64")] if printer.selected else []
    more += [("scratch", "*fp32")] if printer.places[-1] else []
    return Printed(
        "rows",
        (*((f"a{index}", f"*{TYPES[array.dtype]}") for index, array in enumerate(kernel.arrays)), *more),
        tuple(printer.lines),
        (*(array.name for array in kernel.arrays), *(name for name, _ in more)),
        Grid(kernel.rows, 1, tiles),
        scratch=printer.places[-1],
        warps=8 if widest > BLOCK // 4 else 4,
        barrier=any("tl.debug_barrier()" in line for line in printer.lines),
    )


class RowPrinter:
    """Prints one row kernel into `lines`."""

    def __init__(self, kernel: RowKernel) -> None:
        self.kernel, self.lines, self.depth, self.registers = kernel, list[str](), 0, 0
        self.held, self.places = in_registers(kernel), spilled(kernel)
        self.known: dict[Spot, str] = {}
        """What lies in a register of the whole kernel."""
        self.unseen: set[int] = set()
        """Operands written since the last barrier."""
        loops = kernel.loops
        plain = len(loops) == 1 and not any(isinstance(one, Reduce) for one in loops[0].body)
        self.split = plain and not shape_of(loops[0]).whole
        """Whether a row is so wide, and so simple, that each block is a program."""
        loads = [one.access for loop in loops for one in loop.body if isinstance(one, Load)]
        self.selected = {access.operand for access in loads if access.selected}
        self.print_arrays()
        for loop in loops:
            self.print_loop(loop)

    def put(self, line: str) -> None:
        """One line."""
        self.lines.append("    " * self.depth + line)

    def define(self, value: str) -> str:
        """A fresh register that holds a value."""
        self.registers += 1
        self.put(f"v{self.registers} = {value}")
        return f"v{self.registers}"

    def print_arrays(self) -> None:
        """Where the row's part of each operand starts."""
        self.put("row = tl.program_id(0).to(tl.int64)")
        for number, array in enumerate(self.kernel.arrays):
            row = "tl.load(wanted + row)" if number in self.selected else "row"
            if array.rows:
                self.put(f"a{number} += {row} * {array.width}")
        for operand, word in self.places.items():
            if operand >= 0:
                dtype = self.kernel.locals[operand - len(self.kernel.arrays)][1]
                cast = "" if dtype == torch.float32 else f".to(tl.pointer_type({NAMES[dtype]}))"
                self.put(f"a{operand} = (scratch + row * {self.places[-1]} + {word}){cast}")

    def dtype(self, operand: int) -> torch.dtype:
        """What an operand's elements are."""
        count = len(self.kernel.arrays)
        dtype = self.kernel.arrays[operand].dtype if operand < count else self.kernel.locals[operand - count][1]
        return torch.float32 if dtype == torch.bool else dtype

    def print_loop(self, loop: Loop) -> None:
        """One loop: one block, or block after block."""
        if not math.prod(loop.sizes):
            return  # an empty piece of a concatenation
        shape, before = shape_of(loop), self.depth
        (rows, columns), flat = shape.steps, shape.outer == 1
        spots = {spot_of(one.access, loop) for one in loop.body if isinstance(one, Load)}
        if any(spot.operand in self.unseen and spot not in self.known for spot in spots):
            self.put("tl.debug_barrier()")
            self.unseen.clear()
        self.put(f"# {' x '.join(map(str, loop.sizes)) or 'one number'}")
        if not flat:
            self.block("j", shape.outer, rows)
        sums = {at: one for at, one in enumerate(loop.body) if isinstance(one, Reduce)}
        types = {at: computing(one.dtype) for at, one in enumerate(loop.body) if not isinstance(one, (Store, Reduce))}
        several, size = bool(sums) and columns < shape.inner, [] if flat else [rows]
        totals = {
            at: self.define(f"tl.full({size}, {literal(NEUTRAL[one.op])}, {NAMES[types[one.operand]]})")
            for at, one in sums.items()
            if several
        }
        if shape.inner > 1 or sums:
            self.block("i", shape.inner, columns)
        names = self.print_elements(loop, shape, types)
        for at, one in sums.items():
            masked = f"tl.where({'i' if flat else 'i[None, :]'} < {shape.inner}, {names[one.operand]}, "
            total = f"{REDUCE[one.op]}({masked}{literal(NEUTRAL[one.op])}), {0 if flat else 1})"
            if several:
                self.put(f"{totals[at]} = {COMBINE[one.op].format(totals[at], total)}")
            else:
                totals[at] = self.define(total)
        self.depth = before + (not flat and rows < shape.outer)
        for at, one in sums.items():
            self.finish_reduction(one, totals[at], types[one.operand], loop, shape)
        self.depth = before

    def block(self, name: str, size: int, step: int) -> None:
        """The indices of a dim: those of the only block, of the program's, or of one after the other."""
        start = ""
        if step < size and self.split:
            start = f"tl.program_id(1) * {step} + "
        elif step < size:
            self.put(f"for {name}0 in range(0, {size}, {step}):")
            self.depth += 1
            start = f"{name}0 + "
        self.put(f"{name} = {start}tl.arange(0, {step})")

    def print_elements(self, loop: Loop, shape: Shape, types: dict[int, torch.dtype]) -> dict[int, str]:
        """The instructions but for reductions; the registers of their values."""
        names: dict[int, str] = {}
        for at, one in enumerate(loop.body):
            match one:
                case Load(access):
                    names[at] = self.load(access, loop, shape)
                case Const(value):
                    names[at] = self.define(f"tl.full([], {literal(value)}, {NAMES[types[at]]})")
                case Compute(op, operands):
                    names[at] = self.define(SPELLING[op].format(*(names[x] for x in operands)))
                case Convert(operand, dtype):
                    names[at] = self.define(rounded(names[operand], types[operand], dtype))
                case Store(access, operand):
                    spot = spot_of(access, loop)
                    text = rounded(names[operand], types[operand], computing(self.dtype(access.operand)))
                    self.store(spot, text, shape)
                    if spot in self.held:
                        self.known[spot] = text if text == names[operand] else self.define(text)
        return names

    def load(self, access: Access, loop: Loop, shape: Shape) -> str:
        """The register that an element is in."""
        spot = spot_of(access, loop)
        if spot in self.known:
            column = spot.shape != shape and spot.shape.inner > 1
            return f"{self.known[spot]}[:, None]" if column else self.known[spot]
        dtype = self.dtype(access.operand)
        wide = shape.outer > 1 and spot.shape.inner > 1
        if wide and spot.shape != shape:
            place, mask = self.pointer(spot, "j"), f"j < {shape.outer}" if shape.outer % shape.steps[0] else ""
            return self.define(widened(f"tl.load({place}{', ' * bool(mask)}{mask})", dtype)) + "[:, None]"
        return self.define(widened(f"tl.load({self.pointer(spot)}{self.mask(spot, shape)})", dtype))

    def pointer(self, spot: Spot, name: str = "i") -> str:
        """Where the elements lie."""
        terms = [f"a{spot.operand}", *([str(spot.offset)] if spot.offset else [])]
        if spot.shape.outer > 1:
            terms += [f"({spot.outer})[:, None]"] * bool(spot.outer) + [f"({spot.inner})[None, :]"]
        elif spot.inner:
            terms.append(spot.inner.replace("i", name))
        return " + ".join(terms)

    def mask(self, spot: Spot, shape: Shape) -> str:
        """Which lanes are elements, as a further argument."""
        (rows, columns), terms = shape.steps, []
        if spot.shape == Shape(1, 1):
            return ""
        if shape.inner % columns:
            terms.append(f"i < {shape.inner}" if shape.outer == 1 else f"(i < {shape.inner})[None, :]")
        if shape.outer % rows:
            terms.append(f"(j < {shape.outer})[:, None]")
        return "".join([", ", " & ".join(terms)]) if terms else ""

    def store(self, spot: Spot, value: str, shape: Shape) -> None:
        """Write to memory, if anybody reads it there."""
        if spot.operand < len(self.kernel.arrays) or spot.operand in self.places:
            dtype = self.dtype(spot.operand)
            value = value if computing(dtype) == dtype else narrowed(value, dtype)
            self.put(f"tl.store({self.pointer(spot)}, {value}{self.mask(spot, shape)})")
            self.unseen.add(spot.operand)

    def finish_reduction(self, one: Reduce, total: str, inside: torch.dtype, loop: Loop, shape: Shape) -> None:
        """Divide, round and keep what a reduction gave."""
        if one.divisor != 1:
            total = self.define(f"divide({total}, tl.full([], {literal(one.divisor)}, {NAMES[inside]}))")
        wanted = self.dtype(one.access.operand)
        for dtype in dict.fromkeys([one.dtype, wanted]):
            if dtype not in (inside, torch.int64):
                total = self.define(rounded(total, inside, dtype))
                inside = computing(dtype)
        spot = spot_of(one.access, loop, reduced=True)
        if spot in self.held:
            self.known[spot] = total
        if shape.outer > 1:  # the results are counted by j
            spot = Spot(spot.operand, spot.offset, "", spot.inner.replace("i", "j"), Shape(1, shape.outer))
            if spot.operand < len(self.kernel.arrays) or spot.operand in self.places:
                value = total if computing(wanted) == wanted else narrowed(total, wanted)
                mask = f", j < {shape.outer}" if shape.outer % shape.steps[0] else ""
                self.put(f"tl.store({self.pointer(spot)}, {value}{mask})")
                self.unseen.add(spot.operand)
        else:
            self.store(spot, total, Shape(1, 1))

