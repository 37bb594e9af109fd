"""Row-wise nodes to loops: as few as their shapes allow, what passes between loops in local arrays.

Nodes with the same sizes share a loop, and what they hand to each other stays in a register. A value that is needed in
another shape, or in another loop, is stored in an array that lives as long as its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graft.codegen.kernel_ir import (
    Access,
    Array,
    Compute,
    Const,
    Convert,
    Load,
    Reduce,
    RowKernel,
    Store,
)
from graft.codegen.loops import Draft, moved, tidy
from graft.codegen.row_form import ROW, View, broadcast, contiguous
from graft.codegen.scalar_ops import REDUCERS, TREES, WIDE_NUMBERS, Tree
from graft.compiler.canonical import aten

FEW, LANES = 16, 16
"""Elements that are combined one by one where so many results lie side by side."""
EXACT_WHOLE = frozenset({torch.int64, torch.int32, torch.bool})


def computing(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of a dtype are computed in; whole numbers in float64, which holds them up to 2**53."""
    if dtype in (torch.float64, torch.int64, torch.int32):
        return torch.float64
    return torch.float32


@dataclass(frozen=True)
class Made:
    """Where a value of this kernel comes from."""

    loop: int
    register: int | None
    """None for what exists only as stored: reductions, concatenations."""
    sizes: tuple[int, ...]


class RowBuilder:
    """Builds one row kernel from nodes in order."""

    def __init__(self, rows: str, views: dict[fx.Node, View], array_of: Callable[[fx.Node], Array]) -> None:
        self.rows, self.views, self.array_of = rows, views, array_of
        self.loops: list[Draft] = []
        self.made: dict[fx.Node, Made] = {}
        self.arrays: list[Array] = []
        self.locals: list[tuple[int, torch.dtype]] = []
        self.stored: dict[fx.Node, int] = {}
        """Value -> the operand that holds it: an index of `arrays`, or -1 - an index of `locals`."""
        self.nodes: list[fx.Node] = []

    def finish(self, results: Sequence[fx.Node]) -> RowKernel:
        """The kernel; `results` are the nodes that others read."""
        for node in results:
            self.stored[node] = self.result(node)
        locals_at = len(self.arrays)
        loops = tuple(tidy(draft, locals_at) for draft in self.loops if draft.body)
        return RowKernel(tuple(self.arrays), tuple(self.nodes), self.rows, tuple(self.locals), loops)

    # Values of nodes.

    def add(self, node: fx.Node) -> None:
        """Compute one node."""
        self.nodes.append(node)
        if node.target in (aten.cat.default, aten.concat.default, aten.stack.default):
            self.concatenate(node)
        elif node.target in REDUCERS:
            self.reduce(node, self.views[node.args[0]], REDUCERS[node.target], node.args[1])
        elif node.target in (aten.softmax.int, aten._softmax.default):
            self.softmax(node)
        elif node.target in (aten.clone.default, aten.index_select.default):
            self.element_wise(node, lambda x: x, (node.args[0],), {})
        else:
            self.element_wise(node, TREES[node.target], node.args, node.kwargs)

    def element_wise(self, node: fx.Node, rule: Callable[..., Tree], args: Sequence, kwargs: dict) -> None:
        """One tree over all elements of the node."""
        value: Tensor = node.meta["val"]
        dims = self.views[node].dims
        operands = [broadcast(self.views[arg], dims) if isinstance(arg, fx.Node) else arg for arg in args]
        sizes = self.views[node].sizes
        loop = self.loop_for([x for x in operands if isinstance(x, View)], sizes)
        inside = value.dtype
        if inside == torch.bool:
            wide = any(computing(self.dtype(x)) == torch.float64 for x in operands if isinstance(x, View))
            inside = torch.float64 if wide else torch.float32
        inside = computing(inside)
        selected = node.target is aten.index_select.default
        first = next((self.dtype(x) for x in operands if isinstance(x, View)), inside)
        kept = inside if node.target in WIDE_NUMBERS else first if value.dtype == torch.bool else value.dtype
        leaves = [
            self.operand(loop, x, inside, selected) if isinstance(x, View) else literal(x, kept)
            for x in operands[: 1 if selected else None]
        ]
        options = {name: literal(x, kept) for name, x in kwargs.items()}
        register = self.emit(loop, rule(*leaves, **options), inside)
        self.define(node, loop, self.rounded(loop, register, value.dtype, inside))

    def emit(self, loop: Draft, tree: Tree, dtype: torch.dtype) -> int:
        """The register that a tree's value is in."""
        if isinstance(tree, tuple):
            operands = tuple(self.emit(loop, branch, dtype) for branch in tree[1:])
            return loop.add(Compute(tree[0], operands, dtype))
        if isinstance(tree, float):
            return loop.add(Const(tree, dtype))
        assert isinstance(tree, int)
        return tree

    def rounded(self, loop: Draft, register: int, dtype: torch.dtype, inside: torch.dtype) -> int:
        """The value rounded to the dtype that the node has."""
        if dtype in (inside, torch.bool) or (dtype in EXACT_WHOLE and inside == torch.float64 and dtype == torch.int64):
            return register
        return loop.add(Convert(register, dtype))

    def define(self, node: fx.Node, loop: Draft, register: int) -> None:
        """Say which register holds a node."""
        self.made[node] = Made(self.loops.index(loop), register, self.views[node].sizes)

    def dtype(self, view: View) -> torch.dtype:
        """The dtype of a view's base."""
        value: Tensor = view.base.meta["val"]
        return value.dtype

    # Loops.

    def loop_for(self, operands: Sequence[View], sizes: tuple[int, ...], reduced: int | None = None) -> Draft:
        """The first loop over these sizes in which all operands can be had; a new one where there is none."""
        first = max((self.available(view, sizes) for view in operands), default=0)
        for index in range(first, len(self.loops)):
            draft = self.loops[index]
            if draft.sizes == sizes and (reduced is None or draft.reduced in (None, reduced)):
                draft.reduced = draft.reduced if reduced is None else reduced
                return draft
        self.loops.append(Draft(sizes, reduced))
        return self.loops[-1]

    def available(self, view: View, sizes: tuple[int, ...]) -> int:
        """The first loop that can read a view: the one that makes it where a register will do, else the one after."""
        made = self.made.get(view.base)
        if made is None:
            return 0
        return made.loop if self.in_register(view, made, sizes) else made.loop + 1

    def in_register(self, view: View, made: Made, sizes: tuple[int, ...]) -> bool:
        """Whether the element that a loop over `sizes` needs is the one just computed."""
        same = made.register is not None and squeezed(made.sizes) == squeezed(sizes) == squeezed(view.sizes)
        steps = [step for size, step in zip(view.sizes, view.steps, strict=True) if size != 1]
        return same and view.offset == 0 and steps == [*contiguous(squeezed(sizes))]

    def operand(self, loop: Draft, view: View, inside: torch.dtype, selected: bool = False) -> int:
        """A view's element in a register of the loop, as a number of the dtype that is computed in."""
        dtype, made = self.dtype(view), self.made.get(view.base)
        if made is not None and self.loops.index(loop) == made.loop and self.in_register(view, made, loop.sizes):
            assert made.register is not None
            register, has = made.register, self.register_dtype(loop, made.register)
        else:
            place = self.stored[view.base] if view.base in self.stored else self.hold(view.base)
            register, has = loop.add(Load(Access(place, view.offset, view.steps, selected), dtype)), computing(dtype)
        return register if has == inside else loop.add(Convert(register, inside))

    def register_dtype(self, loop: Draft, register: int) -> torch.dtype:
        """The dtype that a register is computed in."""
        instruction = loop.body[register]
        assert not isinstance(instruction, (Store, Reduce))
        return computing(instruction.dtype)

    # Arrays.

    def hold(self, node: fx.Node) -> int:
        """An operand array for what another kernel made, or a local one for what this one makes."""
        made = self.made.get(node)
        if made is None:
            self.arrays.append(self.array_of(node))
            self.stored[node] = len(self.arrays) - 1
        else:
            self.stored[node] = self.local(math.prod(made.sizes), self.dtype(self.views[node]))
            self.store(node, self.stored[node], 0, contiguous(made.sizes))
        return self.stored[node]

    def local(self, size: int, dtype: torch.dtype) -> int:
        """A fresh local array, as an operand."""
        self.locals.append((size, computing(dtype) if dtype != torch.bool else torch.float32))
        return -len(self.locals)

    def store(self, node: fx.Node, place: int, offset: int, strides: tuple[int, ...]) -> None:
        """Write a node where it is computed."""
        made = self.made[node]
        assert made.register is not None
        dtype = self.dtype(self.views[node]) if place >= 0 else self.locals[-1 - place][1]
        self.loops[made.loop].add(Store(Access(place, offset, strides), made.register, dtype))

    def result(self, node: fx.Node) -> int:
        """The array that other kernels read a node from."""
        self.arrays.append(self.array_of(node))
        place, made = len(self.arrays) - 1, self.made[node]
        if made.register is not None:
            self.store(node, place, 0, contiguous(made.sizes))
        else:
            self.replace_local(self.stored[node], place)
        return place

    def replace_local(self, old: int, new: int) -> None:
        """Let a stored value live in an operand array in the place of a local one."""
        dtype = self.arrays[new].dtype
        for draft in self.loops:
            for index, one in enumerate(draft.body):
                if isinstance(one, (Load, Store, Reduce)) and one.access.operand == old:
                    access = Access(new, one.access.offset, one.access.strides, one.access.selected)
                    draft.body[index] = moved(one, access, dtype)

    # Values that are stored as they are made.

    def reduce(self, node: fx.Node, source: View, op: str, dims: Sequence[int] | int | None) -> None:
        """Combine along dims; the result is stored."""
        named = [dims] if isinstance(dims, int) else list(dims or range(len(source.dims)))
        axes = {dim % len(source.dims) for dim in named}
        if self.sum_of_few(node, source, op, axes):
            return
        kept = [axis for axis, size in enumerate(source.dims) if axis not in axes and size != ROW]
        order = [*kept, *sorted(axes)]
        sizes = tuple(source.dims[axis] for axis in order)
        view = View(source.base, sizes, tuple(source.strides[axis] for axis in order), source.offset)
        loop = self.loop_for([view], sizes, len(axes))
        value: Tensor = node.meta["val"]
        inside = computing(value.dtype)
        count = math.prod(source.dims[axis] for axis in axes)
        divisor = float(count) if node.target is aten.mean.dim else 1.0
        outer = sizes[: len(kept)]
        self.reduce_into(node, loop, op, self.operand(loop, view, inside), outer, divisor)

    def sum_of_few(self, node: fx.Node, source: View, op: str, axes: set[int]) -> bool:
        """Element by element, where few are combined that do not lie side by side, such as the slots of a mixture."""
        (axis, *others), value = sorted(axes), node.meta["val"]
        behind = math.prod(size for size in source.dims[axis + 1 :] if size != ROW)
        if others or source.dims[axis] > FEW or behind < LANES or node.target is aten.mean.dim:
            return False
        sizes = self.views[node].sizes
        steps = [0 if place == axis else step for place, step in enumerate(source.strides)]
        kept = len(self.views[node].dims) == len(source.dims)
        steps = [steps[at] for at, size in enumerate(source.dims) if size != ROW and (kept or at != axis)]
        starts = (source.offset + index * source.strides[axis] for index in range(source.dims[axis]))
        parts = [View(source.base, sizes, tuple(steps), start) for start in starts]
        loop, inside = self.loop_for(parts, sizes), computing(value.dtype)
        total, *rest = [self.operand(loop, part, inside) for part in parts]
        for register in rest:
            total = loop.add(Compute({"sum": "add"}.get(op, op), (total, register), inside))
        self.define(node, loop, self.rounded(loop, total, value.dtype, inside))
        return True

    def reduce_into(
        self, node: fx.Node, loop: Draft, op: str, register: int, outer: tuple[int, ...], divisor: float
    ) -> None:
        """Store a reduction over the last dims of a loop."""
        dtype = self.dtype(self.views[node])
        place = self.local(math.prod(outer), dtype)
        strides = (*contiguous(outer), *[0] * (len(loop.sizes) - len(outer)))
        loop.add(Reduce(op, register, Access(place, 0, strides), divisor, dtype))
        self.stored[node] = place
        self.made[node] = Made(self.loops.index(loop), None, self.views[node].sizes)

    def concatenate(self, node: fx.Node) -> None:
        """Every piece written to its stretch of the result."""
        pieces, dims = node.args[0], self.views[node].dims
        axis = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(dims)
        place = self.local(math.prod(self.views[node].sizes), self.dtype(self.views[node]))
        strides, start, last = contiguous(dims), 0, 0
        for piece in pieces:
            view = self.views[piece]
            if node.target is aten.stack.default:
                view = View(
                    view.base,
                    (*view.dims[:axis], 1, *view.dims[axis:]),
                    (*view.strides[:axis], 0, *view.strides[axis:]),
                    view.offset,
                )
            steps = tuple(step for size, step in zip(view.dims, strides, strict=True) if size != ROW)
            inside = self.locals[-1 - place][1]
            loop = self.loop_for([view], view.sizes)
            register = self.operand(loop, view, inside)
            loop.add(Store(Access(place, start * strides[axis], steps), register, inside))
            last = max(last, self.loops.index(loop))
            start += view.dims[axis]
        self.stored[node] = place
        self.made[node] = Made(last, None, self.views[node].sizes)

    def softmax(self, node: fx.Node) -> None:
        """exp(x - max) / sum, in three loops."""
        source = self.views[node.args[0]]
        axis = node.args[1] % len(source.dims)
        order = [other for other, size in enumerate(source.dims) if size != ROW and other != axis] + [axis]
        sizes = tuple(source.dims[one] for one in order)
        view = View(source.base, sizes, tuple(source.strides[one] for one in order), source.offset)
        inside, outer = computing(self.dtype(self.views[node])), sizes[:-1]
        narrow = (*contiguous(outer), 0)
        top, total = self.local(math.prod(outer), inside), self.local(math.prod(outer), inside)
        loop = self.loop_for([view], sizes, 1)
        loop.add(Reduce("max", self.operand(loop, view, inside), Access(top, 0, narrow), 1.0, inside))
        exponents = self.local(math.prod(sizes), inside)
        second = self.new_loop(sizes, 1)
        limit = second.add(Load(Access(top, 0, narrow), inside))
        shifted = second.add(Compute("sub", (self.operand(second, view, inside), limit), inside))
        power = second.add(Compute("exp", (shifted,), inside))
        second.add(Store(Access(exponents, 0, contiguous(sizes)), power, inside))
        second.add(Reduce("sum", power, Access(total, 0, narrow), 1.0, inside))
        third = self.new_loop(sizes)
        share = third.add(
            Compute(
                "div",
                (
                    third.add(Load(Access(exponents, 0, contiguous(sizes)), inside)),
                    third.add(Load(Access(total, 0, narrow), inside)),
                ),
                inside,
            )
        )
        place = self.local(math.prod(sizes), inside)
        dtype = self.dtype(self.views[node])
        register = self.rounded(third, share, dtype, inside)
        own = contiguous(source.dims)
        third.add(Store(Access(place, 0, tuple(own[axis] for axis in order)), register, inside))
        self.stored[node] = place
        self.made[node] = Made(self.loops.index(third), None, self.views[node].sizes)

    def new_loop(self, sizes: tuple[int, ...], reduced: int | None = None) -> Draft:
        """A loop behind all others."""
        self.loops.append(Draft(sizes, reduced))
        return self.loops[-1]


def literal(value: object, dtype: torch.dtype) -> object:
    """A number as a tree's leaf: what a dtype of narrow range makes of it."""
    if not isinstance(value, (int, float)):
        return value
    return torch.tensor(value, dtype=dtype).item() if dtype in (torch.bfloat16, torch.float16) else float(value)


def squeezed(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes without ones."""
    return tuple(size for size in sizes if size != 1)
