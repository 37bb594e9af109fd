"""merge-linears: the listing in its docstring, and what it leaves alone."""

from __future__ import annotations

import torch

from graft.compiler.program import Input
from graft.passes import merge_linears
from graft.passes.merge_linears import MergeLinears
from tests.passes.listings import Sheet, calls, expression, listings, outputs, transform
from tests.programs import TIDY, program_of

X = (Input("x", ("B", 16), torch.float32),)
WEIGHTS = {"w_q": (64, 16), "w_k": (32, 16), "b_q": (64,), "b_k": (32,)}


def test_the_docstring_shows_what_it_does() -> None:
    before, after = listings(merge_linears)
    sheet, expected = Sheet(X, WEIGHTS), Sheet(X, WEIGHTS)
    sheet.run(before)
    expected.run(after)
    function = sheet.function(sheet["q"], sheet["k"])
    assert transform(function, MergeLinears()).matches == 1
    assert outputs(function) == [expression(expected["q"]), expression(expected["k"])]
    assert calls(function) == 3


def test_biases_are_merged_alongside() -> None:
    sheet = Sheet(X, WEIGHTS)
    sheet.run("q = linear(x, w_q, b_q)\nk = linear(x, w_k, b_k)")
    function = sheet.function(sheet["q"], sheet["k"])
    x = torch.randn(3, 16)
    expected = function.copy().module()(x)
    transform(function, MergeLinears())
    (merged,) = [node for node in function.graph.nodes if "linear_rows" in str(node.target)]
    assert [bias.target for bias in merged.args[2]] == ["b_q", "b_k"]
    for old, new in zip(expected, function.module()(x), strict=True):
        torch.testing.assert_close(new, old)


def test_linears_with_and_without_bias_are_not_merged() -> None:
    sheet = Sheet(X, WEIGHTS)
    sheet.run("q = linear(x, w_q, b_q)\nk = linear(x, w_k)")
    view = transform(sheet.function(sheet["q"], sheet["k"]), MergeLinears())
    assert (view.matches, view.misses[0]) == (0, "linear_default: no other linear reads its input")


def test_a_model_reads_its_stream_once_for_qkv_and_once_for_gate_and_up() -> None:
    program = program_of("llama", (*TIDY, MergeLinears()))
    merged = [len(node.args[1]) for node in program["forward"].graph.nodes if "linear_rows" in str(node.target)]
    assert merged == [3, 2] * 3
