"""Values as kernels see them: the elements of one row, and views of them as offsets and strides.

On flat functions every dynamic size counts rows (N of the call, R whose logits are wanted), and nothing but attention
lets rows see each other. So a value is one row's elements, and every operator that rearranges is arithmetic on strides.
The dim of rows keeps its place in `dims`, because broadcasting aligns dims by place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from graft.compiler.canonical import aten

ROW = -1
"""Stands in `View.dims` for the dim of rows."""


@dataclass(frozen=True)
class Form:
    """Shape of a value: dims with ROW where the rows are, and which rows: "N", "R", or "" for a constant."""

    dims: tuple[int, ...]
    rows: str
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Elements of one row."""
        return math.prod(size for size in self.dims if size != ROW)


@dataclass(frozen=True)
class View:
    """Elements of a base value, by their place in a row of it."""

    base: fx.Node
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """The dims without that of rows."""
        return tuple(size for size in self.dims if size != ROW)

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides of `sizes`."""
        return tuple(step for size, step in zip(self.dims, self.strides, strict=True) if size != ROW)


def form_of(value: Any, rows: dict[Any, str]) -> Form | None:
    """The row form of a fake value, or None where it has none; `rows` names the symbols that count rows."""
    if not isinstance(value, Tensor):
        return None
    dims, kind = [], ""
    for size in value.shape:
        if isinstance(size, torch.SymInt):
            expression = size.node.expr
            if not expression.is_number:
                if expression not in rows or kind:
                    return None
                kind = rows[expression]
                dims.append(ROW)
                continue
        dims.append(int(size))
    return Form(tuple(dims), kind, value.dtype)


def contiguous(dims: Sequence[int]) -> tuple[int, ...]:
    """Strides of a row stored densely in the order of its dims; that of the dim of rows is 0."""
    strides, step = [], 1
    for size in reversed(dims):
        strides.append(0 if size == ROW else step)
        step *= 1 if size == ROW else size
    return tuple(reversed(strides))


def whole(base: fx.Node, form: Form) -> View:
    """A value as it is stored."""
    return View(base, form.dims, contiguous(form.dims))


def look_through(node: fx.Node, source: View, form: Form) -> View | None:
    """The view of a value that a rearranging operator makes, or None where elements would have to move."""
    match node.target:
        case aten.reshape.default:
            return reshaped(source, form.dims)
        case aten.unsqueeze.default | aten.squeeze.dim | aten.squeeze.dims | aten.squeeze.default:
            return reshaped(source, form.dims)
        case aten.transpose.int:
            first, second = (dim % len(source.dims) for dim in node.args[1:])
            order = list(range(len(source.dims)))
            order[first], order[second] = order[second], order[first]
            return permuted(source, order)
        case aten.permute.default:
            return permuted(source, [dim % len(source.dims) for dim in node.args[1]])
        case aten.slice.Tensor:
            return sliced(node, source, form)
        case aten.select.int:
            dim, index = node.args[1] % len(source.dims), node.args[2]
            if source.dims[dim] == ROW:
                return None
            index %= source.dims[dim]
            keep = [axis for axis in range(len(source.dims)) if axis != dim]
            picked = permuted(source, keep)
            return replace(picked, offset=source.offset + index * source.strides[dim])
        case aten.expand.default:
            return broadcast(source, form.dims)
    return None


def permuted(source: View, order: Sequence[int]) -> View:
    """The dims in another order; those not named are left out."""
    return replace(
        source, dims=tuple(source.dims[axis] for axis in order), strides=tuple(source.strides[axis] for axis in order)
    )


def sliced(node: fx.Node, source: View, form: Form) -> View | None:
    """A stretch of one dim, or of none where the slice takes all rows."""
    given = dict(zip(("dim", "start", "end", "step"), node.args[1:], strict=False)) | node.kwargs
    dim, start, step = given.get("dim", 0) % len(source.dims), given.get("start") or 0, given.get("step", 1)
    if source.dims[dim] == ROW:
        return source if form.dims[dim] == ROW and start == 0 and step == 1 else None
    start = min(max(start + source.dims[dim] if start < 0 else start, 0), source.dims[dim])
    strides = [*source.strides]
    offset = source.offset + start * strides[dim]
    strides[dim] *= step
    return replace(source, dims=form.dims, strides=tuple(strides), offset=offset)


def broadcast(source: View, dims: Sequence[int]) -> View | None:
    """The view stretched to `dims` as operators broadcast; None where a row would have to become several."""
    missing = len(dims) - len(source.dims)
    old = [1] * missing + [*source.dims]
    strides = [0] * missing + [*source.strides]
    for axis, (size, wanted) in enumerate(zip(old, dims, strict=True)):
        if size == wanted:
            continue
        if size != 1:
            return None
        strides[axis] = 0
    return replace(source, dims=tuple(dims), strides=tuple(strides))


def reshaped(source: View, dims: Sequence[int]) -> View | None:
    """The same elements in other dims; the dim of rows stays between the same elements, or there is no such view."""
    old, new = split_at_rows(source.dims), split_at_rows(dims)
    if len(old) != len(new) or [math.prod(part) for part in old] != [math.prod(part) for part in new]:
        return None
    strides: list[int] = []
    start = 0
    for part, wanted in zip(old, new, strict=True):
        found = regroup(part, source.strides[start : start + len(part)], wanted)
        if found is None:
            return None
        strides += ([0] if start else []) + found
        start += len(part) + 1
    return replace(source, dims=tuple(dims), strides=tuple(strides))


def split_at_rows(dims: Sequence[int]) -> list[list[int]]:
    """The dims before and behind that of rows; all of them where there is none."""
    if ROW not in dims:
        return [[*dims]]
    place = list(dims).index(ROW)
    return [[*dims[:place]], [*dims[place + 1 :]]]


def regroup(sizes: Sequence[int], strides: Sequence[int], wanted: Sequence[int]) -> list[int] | None:
    """Strides for `wanted` sizes over the same elements in the same order; None where a copy would be needed."""
    old = [(size, step) for size, step in zip(sizes, strides, strict=True) if size != 1]
    found: list[int] = []
    left = 1
    step = 0
    for size in reversed(wanted):
        if size == 1:
            found.append(0)
            continue
        if left == 1:
            if not old:
                return None
            left, step = old.pop()
        while left % size:
            if not old or old[-1][1] != left * step:
                return None
            left *= old.pop()[0]
        found.append(step)
        left, step = left // size, step * size
    return found[::-1]
