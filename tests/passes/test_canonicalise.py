"""canonicalise: the listing in its docstring, and each rule by itself."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from graft.compiler.canonical import NOT_CANONICAL, aten
from graft.compiler.program import Input
from graft.passes import canonicalise
from graft.passes.canonicalise import Canonicalise
from tests.passes.listings import Sheet, expression, listings, outputs, transform

H = (Input("h", (1, 8), torch.float32),)
WEIGHTS = {"w": (16, 8), "w_in_out": (4, 6), "bias": (6,)}


def test_the_docstring_shows_what_it_does() -> None:
    before, after = listings(canonicalise)
    sheet = Sheet(H, WEIGHTS)
    sheet.run(before)
    function = sheet.function(sheet["z"], sheet["b"])
    expected = Sheet(H, WEIGHTS | {"w_in_out_T": (6, 4)})
    expected.run(after.replace("w_in_out.T", "w_in_out_T"))
    unused, z = expression(expected["b"]) if "b" in expected else None, expression(expected["z"])
    transform(function, Canonicalise())
    assert outputs(function)[0] == z
    assert unused is None or outputs(function)[1] == unused
    assert not [node for node in function.graph.nodes if node.target in NOT_CANONICAL]


X = (Input("x", ("B", 6, 4), torch.float32),)


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        (aten.view.default, ([-1, 24],), "aten.reshape.default(x, [-1, 24])"),
        (aten.type_as.default, ("x",), "x"),
        (aten.to.dtype, (torch.float16,), "aten._to_copy.default(x, dtype=torch.float16)"),
        (aten.square.default, (), "aten.mul.Tensor(x, x)"),
        (aten.clone.default, (), "x"),
        (aten._to_copy.default, (), "x"),
        (aten.mul.Tensor, (1.0,), "x"),
        (aten.mul.Tensor, (2.0,), "aten.mul.Tensor(x, 2.0)"),
        (aten.slice.Tensor, (1, 0, 2**63 - 1), "x"),
        (aten.slice.Tensor, (1, 0, 5), "aten.slice.Tensor(x, 1, 0, 5)"),
    ],
)
def test_one_meaning_has_one_spelling(target: Any, args: tuple, expected: str) -> None:
    sheet = Sheet(X, {})
    node = sheet.graph.call_function(target, (sheet["x"], *(sheet["x"] if a == "x" else a for a in args)))
    function = sheet.function(node)
    transform(function, Canonicalise())
    assert outputs(function) == [expected]


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        (aten.split.Tensor, (4, 1), ["aten.slice.Tensor(x, 1, 0, 4)", "aten.slice.Tensor(x, 1, 4, 6)"]),
        (aten.chunk.default, (2, -1), ["aten.slice.Tensor(x, -1, 0, 2)", "aten.slice.Tensor(x, -1, 2, 4)"]),
        (aten.unbind.int, (2,), ["aten.select.int(x, 2, 0)", "aten.select.int(x, 2, 1)"]),
    ],
)
def test_a_list_of_parts_becomes_one_view_for_each_part(target: Any, args: tuple, expected: list[str]) -> None:
    sheet = Sheet(X, {})
    parts = sheet.graph.call_function(target, (sheet["x"], *args))
    function = sheet.function(*(sheet.graph.call_function(operator.getitem, (parts, i)) for i in (0, 1)))
    transform(function, Canonicalise())
    assert outputs(function) == expected


def test_polar_coordinates_keep_their_value_and_their_dynamic_sizes() -> None:
    sheet = Sheet(X, {})
    function = sheet.function(sheet.graph.call_function(aten.polar.default, (sheet["x"], sheet["x"])))
    x = torch.rand(2, 6, 4)
    (expected,) = function.copy().module()(x)
    transform(function, Canonicalise())
    (found,) = function.module()(x)
    torch.testing.assert_close(found, expected)
    assert isinstance(function.output.args[0][0].meta["val"].shape[0], torch.SymInt)
