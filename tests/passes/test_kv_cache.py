"""kv-cache: the listing in its docstring, and what it makes of models."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import torch
from torch import fx

from graft.compiler.errors import PassError
from graft.compiler.evaluate import logits_of
from graft.compiler.program import DENSE, Function
from graft.passes import kv_cache
from graft.passes.kv_cache import KVCache
from tests.passes.listings import Sheet, first_call, listings, transform
from tests.programs import TIDY, program_of

SEQUENCES = ((5, 6, 7, 8, 9, 10, 11, 12), (20, 21, 22))


def flat(family: str, **overrides: Any) -> Function:
    """A tiny model on rows."""
    function = program_of(family, TIDY, **overrides)["forward"].copy()
    transform(function, KVCache())
    return function


def test_the_docstring_shows_what_it_does() -> None:
    """The calls of the second listing are those of a model's first layer, operand by operand."""
    listing = listings(kv_cache)[1]
    function = flat("llama")
    nodes = {name: first_call(function, name) for name in ("kv_append", "kv_attend")}
    append, attend = nodes.values()
    names = {append.args[1]: "k", append.args[2]: "v", attend.args[1]: "q", append: "kv_1"}
    constants = {"scale": attend.args[7], "window": attend.args[8]}
    for name, node in nodes.items():
        call = ast.parse(re.search(rf"{name}\(.*\)", listing)[0], mode="eval").body  # type: ignore[index]
        assert isinstance(call, ast.Call)
        shown = [
            argument.id if isinstance(argument, ast.Name) else ast.literal_eval(argument) for argument in call.args
        ]
        found = [names.get(value, value.name) if isinstance(value, fx.Node) else value for value in node.args]
        assert [constants.get(value, value) for value in shown] == found[: len(shown)]
    assert function.output.args[0][-1].target is append.target


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "qwen3_moe"])
def test_the_rows_of_any_number_of_sequences_give_the_logits_of_each_by_itself(family: str) -> None:
    dense = logits_of(program_of(family, TIDY)["forward"], SEQUENCES)
    rows = logits_of(flat(family), SEQUENCES)
    for found, expected in zip(rows, dense, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_of_one_layout_share_a_state() -> None:
    (state,) = flat("llama").states
    assert (state.name, state.layers, state.heads, state.key_dim, state.value_dim) == ("kv", 3, 2, 16, 16)
    assert state.bytes_per_token == 3 * 2 * 32 * 4


def test_logits_of_a_16_bit_model_are_float32() -> None:
    function = flat("llama", dtype=torch.bfloat16)
    logits, hidden, _ = (node.meta["val"].dtype for node in function.output.args[0])
    assert (logits, hidden) == (torch.float32, torch.bfloat16)


def test_a_function_without_attention_is_refused() -> None:
    sheet = Sheet(DENSE, {"table": (11, 8), "w": (8, 8)})
    h0 = sheet.run("return embedding(table, tokens)")
    sheet.update(h0=h0)
    h1 = sheet.run("return add(h0, linear(silu(h0), w))")
    with pytest.raises(PassError, match="kv-cache found no attention"):
        transform(sheet.function(sheet["linear"](h1, sheet["table"]), h1), KVCache())
