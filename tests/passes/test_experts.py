"""Captured mixtures with slots as a dim: the listing, both layouts of experts, and what stays as it was."""

from __future__ import annotations

import pytest
import torch

from graft.compiler.canonical import aten, graft
from graft.compiler.nodes import call_nodes
from graft.compiler.program import Function, Input
from graft.passes import experts
from graft.passes.canonicalise import Canonicalise
from tests.passes.listings import Sheet, expression, listings, outputs, transform
from tests.programs import TIDY, program_of

INPUTS = (
    Input("x", ("B", 6), torch.float32),
    Input("chosen", ("B", 2), torch.int64),
    Input("gates", ("B", 2), torch.float32),
)
WEIGHTS = {"w": (4, 8, 6), "w_in_out": (4, 6, 8), "b": (4, 8)}
TRANSPOSED = """
slots = repeat_interleave(x, 2, 0)
i = reshape(chosen, [-1])
y = add(squeeze(bmm(unsqueeze(slots, 1), index(w_in_out, [i])), 1), index(b, [i]))
z = mul(silu(slice(y, 1, 0, 8, 2)), unsqueeze(reshape(gates, [-1]), 1))
out = reshape(z, [-1, 2, 4])
"""


def function_of(listing: str) -> Function:
    sheet = Sheet(INPUTS, WEIGHTS)
    sheet.run(listing)
    return sheet.function(sheet["out"])


def test_the_docstring_shows_what_it_does() -> None:
    before, after = listings(experts)
    function, expected = function_of(before), Sheet(INPUTS, WEIGHTS)
    expected.run(after)
    transform(function, Canonicalise())
    assert outputs(function) == [expression(expected["out"])]


@pytest.mark.parametrize("listing", [listings(experts)[0], TRANSPOSED], ids=["out in", "in out, biases"])
def test_the_result_is_that_of_the_batched_product(listing: str) -> None:
    function = function_of(listing)
    chosen = torch.tensor([[0, 3], [2, 1], [3, 3], [1, 0], [2, 0]])
    given = torch.randn(5, 6), chosen, torch.rand(5, 2)
    with torch.no_grad():
        (expected,) = function.copy().module()(*given)
        transform(function, Canonicalise())
        (found,) = function.copy().module()(*given)
    assert call_nodes(function.graph, [graft.expert_linear.default])
    assert not call_nodes(function.graph, [aten.bmm.default, aten.index.Tensor, aten.repeat_interleave.self_int])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("index(w, [i])", "index(mul(w, 2.0), [i])"),
        ("mul(y, ", "mul(softmax(y, 0), "),
        ("repeat_interleave(x, 2, 0)", "reshape(cat([x, x], 0), [-1, 6])"),
        ("out = ", "other = mul(y, 2.0)\nout = "),
    ],
    ids=["computed experts", "across slots", "another order of slots", "read elsewhere"],
)
def test_what_has_another_form_stays_as_it_was(old: str, new: str) -> None:
    before = listings(experts)[0]
    assert old in before
    sheet = Sheet(INPUTS, WEIGHTS)
    sheet.run(before.replace(old, new))
    function = sheet.function(*(sheet[name] for name in ("out", "other") if name in sheet))
    transform(function, Canonicalise())
    assert call_nodes(function.graph, [aten.bmm.default])
    assert not call_nodes(function.graph, [graft.expert_linear.default])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_every_product_of_a_captured_mixture_is_one_of_slots(family: str) -> None:
    graph = program_of(family, TIDY[:1])["forward"].graph
    found = call_nodes(graph, [graft.expert_linear.default])
    assert len(found) == 2 * (2 if family == "deepseek_v3" else 3)
    assert not call_nodes(graph, [aten.bmm.default, aten.repeat_interleave.self_int])
