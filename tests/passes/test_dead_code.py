"""dead-code: the listing in its docstring."""

from __future__ import annotations

import torch

from graft.compiler.program import Input
from graft.passes import dead_code
from graft.passes.dead_code import DeadCode
from tests.passes.listings import Sheet, calls, expression, listings, outputs, transform

H = (Input("h", ("B", 8), torch.float32),)


def test_the_docstring_shows_what_it_does() -> None:
    before, after = listings(dead_code)
    sheet, expected = Sheet(H, {"w": (4, 8)}), Sheet(H, {"w": (4, 8)})
    function = sheet.function(sheet.run(before))
    assert calls(function) == 2
    assert transform(function, DeadCode()).matches == 2
    assert outputs(function) == [expression(expected.run(after))]
    assert calls(function) == 0


def test_parameters_that_nothing_reads_are_dropped_and_inputs_are_kept() -> None:
    sheet = Sheet(H, {"w": (4, 8)})
    function = sheet.function(sheet.run("return silu(silu(h))"))
    view = transform(function, DeadCode())
    assert [node.op for node in function.graph.nodes] == ["placeholder", "call_function", "call_function", "output"]
    assert view.misses == ["every function: each call has a user"]
