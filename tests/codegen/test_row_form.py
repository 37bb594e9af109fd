"""Views as arithmetic on strides, against torch's own."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from graft.codegen.heavy import flat_row
from graft.codegen.row_form import ROW, Form, View, form_of, look_through, whole
from graft.compiler.canonical import aten
from tests.programs import program_of

ROWS = 97
"""A prime that no other size is a multiple of, so that the dim of rows can be told from the others."""

VIEWED = [
    *(aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.select.int, aten.expand.default),
    *(aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim),
]


def form(value: Tensor) -> Form:
    return Form(tuple(ROW if size == ROWS else size for size in value.shape), "N", value.dtype)


def elements(base: Tensor, view: View, row: int) -> Tensor:
    """What a kernel reads of one row through a view."""
    dense = base.select(list(form(base).dims).index(ROW), row).flatten().clone()
    return dense.as_strided(view.sizes, view.steps, view.offset)


def row_of(value: Tensor, row: int) -> Tensor:
    return value.select(list(form(value).dims).index(ROW), row)


@st.composite
def bases(draw: st.DrawFn) -> list[int]:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    sizes.insert(draw(st.integers(0, len(sizes))), ROWS)
    return sizes


def factors(draw: st.DrawFn, size: int) -> list[int]:
    """Sizes whose product is `size`."""
    found = []
    while size > 1:
        found.append(draw(st.sampled_from([one for one in range(2, size + 1) if size % one == 0])))
        size //= found[-1]
        if draw(st.integers(0, 3)) == 0:
            found.append(1)
    return found


def arguments(draw: st.DrawFn, target: Any, value: Tensor) -> tuple[Any, ...] | None:
    """Random arguments that keep rows apart; None where the operator cannot be applied."""
    dims, rows_at = value.dim(), list(value.shape).index(ROWS)
    any_dim = st.integers(-dims, dims - 1)
    dim = draw(any_dim)
    if target is aten.transpose.int:
        return dim, draw(any_dim)
    if target is aten.permute.default:
        order = draw(st.permutations(range(dims)))
        return ([axis - dims if draw(st.booleans()) else axis for axis in order],)
    if target is aten.unsqueeze.default:
        return (draw(st.integers(-dims - 1, dims)),)
    if target is aten.squeeze.dim:
        return (dim,)
    if target is aten.expand.default:
        wide = [draw(st.integers(1, 4)) if size == 1 else draw(st.sampled_from([size, -1])) for size in value.shape]
        return (wide if draw(st.booleans()) else [draw(st.integers(1, 3)), *wide],)
    if target is aten.reshape.default:
        before, after = math.prod(value.shape[:rows_at]), math.prod(value.shape[rows_at + 1 :])
        return ([*factors(draw, before), ROWS, *factors(draw, after)],)
    size = value.shape[dim]
    if target is aten.select.int:
        return None if size == ROWS else (dim, draw(st.integers(-size, size - 1)))
    if size == ROWS:
        return dim, draw(st.sampled_from([0, None])), draw(st.sampled_from([ROWS, 2**63 - 1]))
    return dim, draw(st.integers(-size - 2, size - 1)), draw(st.integers(size, 2**63 - 1)), draw(st.integers(1, 3))


@settings(max_examples=400, deadline=None)
@given(sizes=bases(), data=st.data())
def test_a_chain_of_views_reads_what_torch_reads(sizes: list[int], data: st.DataObject) -> None:
    base = torch.arange(math.prod(sizes)).reshape(sizes)
    graph = fx.Graph()
    node = graph.placeholder("x")
    view, value = whole(node, form(base)), base
    for _ in range(data.draw(st.integers(1, 5))):
        target = data.draw(st.sampled_from(VIEWED))
        given_arguments = arguments(data.draw, target, value)
        if given_arguments is None:
            continue
        result = target(value, *given_arguments)
        assume(result.numel() < 10**5)
        found = look_through(graph.call_function(target, (node, *given_arguments)), view, form(result))
        if found is None:
            # A row's elements would have to move: torch cannot view it that way either.
            assert target is aten.reshape.default
            assert not viewable(elements(base, view, 0), view.dims, form(result).dims)
            return
        view, value = found, result
        assert view.dims == form(value).dims
        for row in (0, ROWS - 1):
            assert torch.equal(elements(base, view, row), row_of(value, row))
        consecutive = torch.arange(math.prod(view.sizes)) + view.offset
        places = torch.arange(form(base).width).as_strided(view.sizes, view.steps, view.offset)
        assert (flat_row(view) is not None) == torch.equal(places.flatten(), consecutive)


def viewable(row: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether torch can give a row the new dims without a copy, both sides of the rows' dim by themselves."""
    before = math.prod(old[: old.index(ROW)])
    assert before == math.prod(new[: new.index(ROW)])
    try:
        row.view([size for size in new if size != ROW])
    except RuntimeError:
        return False
    return True


def test_elements_do_not_move_from_row_to_row() -> None:
    graph = fx.Graph()
    base = torch.arange(2 * ROWS * 3).reshape(2, ROWS, 3)
    node, view = graph.placeholder("x"), whole(graph.placeholder("y"), form(base))
    moved = graph.call_function(aten.reshape.default, (node, [ROWS, 6]))
    assert look_through(moved, view, form(base.reshape(ROWS, 6))) is None
    picked = graph.call_function(aten.select.int, (node, 1, 5))
    assert look_through(picked, view, Form((2, 3), "", torch.int64)) is None


def test_a_row_that_is_one_number_repeated_is_not_dense() -> None:
    # All strides are zero, as those of a row of one element are.
    node = fx.Graph().placeholder("x")
    assert flat_row(View(node, (ROW, 16), (0, 0))) is None
    assert flat_row(View(node, (ROW, 1), (0, 0))) == 1
    assert flat_row(View(node, (ROW, 4, 4), (0, 4, 1))) == 16


def test_a_form_counts_rows_by_symbol() -> None:
    function = program_of("llama")["forward"]
    tokens = function.placeholder("tokens").meta["val"]
    rows = {tokens.shape[0].node.expr: "N"}
    hidden = function.output.args[0][1].meta["val"]
    assert form_of(hidden, rows) == Form((ROW, 64), "N", torch.float32)
    assert form_of(hidden, {}) is None
    assert form_of(hidden.new_empty((*hidden.shape, tokens.shape[0])), rows) is None
    assert form_of(3, rows) is None
