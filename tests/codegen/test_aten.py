"""The ATen executable against the operators' reference meaning, which keeps states as values."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from graft.codegen.aten import AtenExecutable
from graft.compiler.capture import capture
from graft.compiler.errors import LoweringError
from graft.compiler.program import DENSE, Function
from tests.codegen.compiled import function_of
from tests.codegen.functions import SLOTS, Call, calls, random_states
from tests.families import build

# One for each way attention can differ: grouped heads, a window, softcap, sinks, key dim unlike value dim.
FAMILIES = ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"]


@dataclass(frozen=True)
class Pair:
    function: Function
    reference: fx.GraphModule
    executable: AtenExecutable


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    function = function_of(request.param, torch.float64)
    return Pair(function, function.module(), AtenExecutable(function))


@settings(max_examples=15, deadline=None)
@given(call=calls(), seed=st.integers(0, 99))
def test_it_computes_what_the_operators_mean(pair: Pair, call: Call, seed: int) -> None:
    inputs, sequences = call
    states = random_states(pair.function, seed)
    with torch.no_grad():
        logits, hidden, *expected_states = pair.reference(*inputs, *states)
        before = copy.deepcopy(states)
        found_logits, found_hidden = pair.executable(*inputs, *states)
    torch.testing.assert_close(found_logits, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_hidden, hidden, rtol=1e-9, atol=1e-9)
    for found, expected, old in zip(states, expected_states, before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        untouched = [slot for slot in range(SLOTS) if slot not in sequences]
        assert torch.equal(found[:, untouched], old[:, untouched])


def test_a_dense_function_is_refused() -> None:
    captured = capture(build("llama"))
    with pytest.raises(LoweringError, match="run the kv-cache pass first"):
        AtenExecutable(Function("forward", captured.graph, captured.weights, DENSE))


def test_its_source_writes_states_in_place_and_returns_none() -> None:
    source = AtenExecutable(function_of("llama")).source
    assert "graft.kv_append" not in source and "append(" in source
    assert source.rstrip().endswith("return (squeeze_dim, squeeze_dim_1)")
