"""common-subexpression: the listing in its docstring."""

from __future__ import annotations

import torch

from graft.compiler.program import Input
from graft.passes import common_subexpression
from graft.passes.common_subexpression import CommonSubexpression
from tests.passes.listings import Sheet, calls, expression, listings, outputs, transform

ANGLES = (Input("angles", ("B", 8), torch.float32),)


def test_the_docstring_shows_what_it_does() -> None:
    before, after = listings(common_subexpression)
    sheet, expected = Sheet(ANGLES, {}), Sheet(ANGLES, {})
    sheet.run(before)
    expected.run(after)
    function = sheet.function(sheet["y"])
    assert transform(function, CommonSubexpression()).matches == 1
    assert outputs(function) == [expression(expected["y"])]
    assert calls(function) == calls(expected.function(expected["y"])) == 2


def test_calls_that_differ_in_a_constant_are_kept_apart() -> None:
    sheet = Sheet(ANGLES, {})
    function = sheet.function(sheet.run("return add(mul(angles, 1), mul(angles, 1.0))"))
    assert transform(function, CommonSubexpression()).matches == 0


def test_what_becomes_equal_on_the_way_is_found_too() -> None:
    sheet = Sheet(ANGLES, {})
    function = sheet.function(sheet.run("return add(silu(cos(angles)), silu(cos(angles)))"))
    assert transform(function, CommonSubexpression()).matches == 2
    assert calls(function) == 3
