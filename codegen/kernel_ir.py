"""What a function becomes before it is printed: kernels over rows, in order, each a value of its own.

A row is a token of the call (N of them) or one whose logits are wanted (R). Between kernels a value is an `Array`, one
stretch of numbers for each row; inside a row kernel it is a register or a local array. Two kernels that are equal but
for the arrays they are given print the same code, which is how identical layers share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graft.compiler.kv.codecs import Codec, InPlace
from graft.compiler.kv.selection import Selection
from graft.compiler.program import Function


@dataclass(frozen=True)
class Array:
    """`width` elements for each row, stored row after row; rows "" is one row that all share."""

    name: str
    dtype: torch.dtype
    width: int
    rows: str


@dataclass(frozen=True)
class Access:
    """A place for every index of a loop: element offset + sum(index * stride) of a row of an operand or local array."""

    operand: int
    """Which of the kernel's arrays; locals are counted behind them."""
    offset: int
    strides: tuple[int, ...]
    selected: bool = False
    """The row is the one that `wanted` names, rather than the one the kernel is at."""


@dataclass(frozen=True)
class Load:
    """The element as a number of the computing dtype."""

    access: Access
    dtype: torch.dtype


@dataclass(frozen=True)
class Const:
    """A literal."""

    value: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Compute:
    """A scalar operator (scalar_ops.PRIMITIVES) on values of the loop, by their index in the body."""

    op: str
    operands: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Convert:
    """A value rounded to `dtype`, then computed with as the computing dtype of that."""

    operand: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Store:
    """A value written to an array, rounded to its dtype."""

    access: Access
    operand: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Reduce:
    """A value combined ("sum", "max", "min") over the loop's reduced dims, divided by `divisor`, then stored."""

    op: str
    operand: int
    access: Access
    divisor: float
    dtype: torch.dtype


Instruction = Load | Const | Compute | Convert | Store | Reduce


@dataclass(frozen=True)
class Loop:
    """A body run for every index in `sizes`, the last `reduced` dims being those that its reductions combine."""

    sizes: tuple[int, ...]
    reduced: int
    body: tuple[Instruction, ...]


@dataclass(frozen=True)
class Guard:
    """A kernel runs only if the mask of some row is `wanted`."""

    mask: Array
    """One element for each row, 0 for false."""
    wanted: bool


@dataclass(frozen=True)
class Kernel:
    """What kernels of every kind have: their operands, and the nodes that they compute."""

    arrays: tuple[Array, ...]
    nodes: tuple[fx.Node, ...] = field(compare=False, repr=False)
    guard: Guard | None = field(default=None, kw_only=True)

    @property
    def reads(self) -> tuple[Array, ...]:
        """Its operands, and the mask that it is guarded by."""
        return self.arrays if self.guard is None else (*self.arrays, self.guard.mask)


@dataclass(frozen=True)
class RowKernel(Kernel):
    """Row-wise chains and reductions: for every row, loops over its elements."""

    rows: str = "N"
    locals: tuple[tuple[int, torch.dtype], ...] = ()
    """Elements and dtype of the arrays that live within a row."""
    loops: tuple[Loop, ...] = ()


@dataclass(frozen=True)
class MatmulKernel(Kernel):
    """arrays[1] = arrays[0] times the rows `ranges` of parameters side by side, plus their biases."""

    weights: tuple[str, ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()
    biases: tuple[str, ...] = ()
    offset: int = 0
    """First element of an input row that counts."""
    depth: int = 0
    """Elements of an input: the products' inner dim."""
    columns: tuple[int, int] | None = None
    """Which of how many columns of the parameters come first, where they are not all of them: (start, stored)."""
    sizes: tuple[int, ...] = ()
    """Rows of every parameter, whole."""
    weight_dtype: torch.dtype = torch.float32
    starts: tuple[int, ...] = ()
    """For every parameter the first element of its input behind `offset`."""


@dataclass(frozen=True)
class ExpertKernel(Kernel):
    """arrays[2] = every slot of arrays[0] times the matrix that arrays[1] names for it, plus that one's bias."""

    weight: str = ""
    bias: str = ""
    experts: int = 0
    slots: int = 0
    """Of each row."""
    depth: int = 0
    """Elements of an input: the products' inner dim."""
    outputs: int = 0
    offsets: tuple[int, int] = (0, 0)
    """First elements of an input row and of the numbers of its experts."""
    stride: int = 0
    """Elements from one slot's input to the next; 0 where a row's slots share theirs."""
    weight_dtype: torch.dtype = torch.float32
    transposed: bool = False
    """Whether the parameter is stored as [experts, depth, outputs]."""


@dataclass(frozen=True)
class TopKernel(Kernel):
    """The `count` largest of every `width` elements of arrays[0], largest first, of equals the first: what they are and
    where they stand, in the arrays behind it."""

    offset: int = 0
    groups: int = 1
    """Of `width` elements in a row."""
    width: int = 0
    count: int = 0
    results: tuple[int, ...] = (0, 1)
    """What is asked for, in order: 0 for the elements, 1 for their places."""


@dataclass(frozen=True)
class GatherKernel(Kernel):
    """arrays[1] = the row of a parameter that arrays[0] names."""

    weight: str = ""
    offset: int = 0
    weight_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Heads:
    """Where the vectors of a row's heads lie: `count` of them, `stride` elements apart, `width` elements each."""

    offset: int
    count: int
    stride: int
    width: int


@dataclass(frozen=True)
class AppendKernel(Kernel):
    """Keys (arrays[0]) and values (arrays[1]) written behind the committed tokens of their slots."""

    state: int = 0
    layer: int = 0
    keys: Heads = Heads(0, 0, 0, 0)
    values: Heads = Heads(0, 0, 0, 0)
    kv_dtype: torch.dtype = torch.float32
    tail: str = ""
    """Of a state with pages: the input that says how many tokens of each slot its tensor holds."""


@dataclass(frozen=True)
class AttendKernel(Kernel):
    """arrays[1] = attention of the queries arrays[0] over the row's path; arrays[2], if any, holds the sinks."""

    state: int = 0
    layer: int = 0
    queries: Heads = Heads(0, 0, 0, 0)
    kv_heads: int = 0
    value_dim: int = 0
    scale: float = 1.0
    window: int = 0
    softcap: float = 0.0
    kv_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class AttendPagesKernel(Kernel):
    """arrays[1] = attention of queries arrays[0] over far entries and the tail; arrays[2], if any, holds the sinks."""

    state: int = 0
    layer: int = 0
    queries: Heads = Heads(0, 0, 0, 0)
    kv_heads: int = 0
    value_dim: int = 0
    width: int = 0
    """Elements of the state's tensor that a token of a kv head takes."""
    scale: float = 1.0
    softcap: float = 0.0
    kv_dtype: torch.dtype = torch.float32
    codec: Codec = field(default_factory=InPlace)
    selection: Selection | None = None
    """Which far entries a row reads; None for all of them."""
    far: tuple[str, ...] = ()
    """The inputs lengths, starts, pages, table, counts, and with a selection labels and channels."""


@dataclass(frozen=True)
class AtenKernel(Kernel):
    """Nodes that no rule takes, run through ATen one row at a time, so that a row's result stays its own."""

    operands: tuple[fx.Node, ...] = field(default=(), compare=False, repr=False)
    results: tuple[fx.Node, ...] = field(default=(), compare=False, repr=False)
    views: dict[fx.Node, Any] = field(default_factory=dict, compare=False, repr=False)
    """Where operands and results lie in arrays (row_form.View); what is not there is handed on row by row."""
    reason: str = ""
    rows: str = "N"
    state: int = -1
    """The number of the state that its one node, attention over pages, reads; -1 for any other nodes."""


@dataclass(frozen=True)
class Kernels:
    """A function cut into kernels."""

    kernels: tuple[Kernel, ...]
    constants: dict[str, Tensor]
    """Values that no row enters, computed once, by the name of their array."""
    outputs: tuple[Array, ...]
    """Logits and hidden states."""
    function: Function
    """The function that was cut: a copy, with the nodes that kernels name."""


def multiplied(kernel: Kernel) -> tuple[str, ...]:
    """Names of the parameters that the kernel multiplies rows with."""
    match kernel:
        case MatmulKernel():
            return kernel.weights
        case ExpertKernel():
            return (kernel.weight,)
    return ()


def parameters_behind(nodes: Iterable[fx.Node], given: Iterable[fx.Node] = ()) -> set[str]:
    """Names of the parameters that computing the nodes reads, where the values of `given` are known."""
    found: set[str] = set()
    seen, left = set(given), list(nodes)
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += node.all_input_nodes
            if node.op == "get_attr":
                found.add(node.target)
    return found
