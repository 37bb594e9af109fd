"""early-exit: the listing in its docstring, and what it leaves."""

from __future__ import annotations

import pytest
import torch

from graft.compiler.errors import PassError
from graft.compiler.evaluate import logits_of
from graft.passes import early_exit
from graft.passes.early_exit import EarlyExit
from graft.passes.kv_cache import KVCache
from tests.families import build
from tests.passes.listings import listings, outputs, run, transform
from tests.passes.test_drop_block import model, sheet_with_blocks
from tests.programs import TIDY, program_of


def test_the_docstring_shows_what_it_does() -> None:
    before, after = listings(early_exit)
    function = model(sheet_with_blocks(), before, "h4")
    expected = model(sheet_with_blocks(), after, "h2")
    assert transform(function, EarlyExit(1)).matches == 2
    assert outputs(function) == outputs(expected)
    for found, wanted in zip(run(function), run(expected), strict=True):
        torch.testing.assert_close(found, wanted)


def test_it_is_the_model_without_its_last_layers() -> None:
    function = program_of("llama", TIDY)["forward"].copy()
    transform(function, EarlyExit(2))
    held = build("llama")
    held.model.layers = held.model.layers[:2]
    text = (5, 6, 7, 8, 9)
    with torch.no_grad():
        expected = held(torch.tensor([text]), use_cache=False).logits[0]
    torch.testing.assert_close(logits_of(function, (text,))[0], expected, atol=1e-5, rtol=1e-4)
    transform(function, KVCache())
    assert [state.layers for state in function.states] == [2]


@pytest.mark.parametrize("layer", [0, 3, -1])
def test_an_exit_beyond_the_layers_is_refused(layer: int) -> None:
    with pytest.raises(PassError, match=rf"1 to 2 layers in front(.|\n)*found: {layer}"):
        transform(program_of("llama", TIDY)["forward"].copy(), EarlyExit(layer))
