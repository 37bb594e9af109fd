"""drop-block: the listing in its docstring, and which blocks it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graft.compiler.errors import PassError
from graft.compiler.program import DENSE, Function
from graft.passes import drop_block
from graft.passes.drop_block import DropBlock
from graft.passes.kv_cache import KVCache
from tests.passes.listings import Sheet, listings, outputs, run, transform
from tests.programs import TIDY, program_of

WEIGHTS = {"table": (11, 8), "w_up": (12, 8), "w_down": (8, 12), "scale": (8,)}


def sheet_with_blocks() -> Sheet:
    """A sheet on which norm, attention and feed_forward are blocks of width 8, and h0 is the embedded tokens."""
    sheet = Sheet(DENSE, WEIGHTS)

    def attention(x: Any) -> Any:
        heads = sheet.graph.call_function(torch.ops.aten.unsqueeze.default, (x, 1))
        mixed = sheet.graph.call_function(torch.ops.graft.attention.default, (heads, heads, heads, 0.5))
        return sheet.graph.call_function(torch.ops.aten.squeeze.dim, (mixed, 2))

    sheet["norm"] = lambda x: sheet["mul"](x, sheet["scale"])
    sheet["attention"] = attention
    sheet["feed_forward"] = lambda x: sheet["linear"](sheet["silu"](sheet["linear"](x, sheet["w_up"])), sheet["w_down"])
    sheet["h0"] = sheet["embedding"](sheet["table"], sheet["tokens"])
    return sheet


def model(sheet: Sheet, listing: str, last: str) -> Function:
    """The listing between an embedding and an unembedding."""
    sheet.run(listing)
    return sheet.function(sheet["linear"](sheet[last], sheet["table"]), sheet[last])


def test_the_docstring_shows_what_it_does() -> None:
    before, after = listings(drop_block)
    function = model(sheet_with_blocks(), before, "h2")
    expected = model(sheet_with_blocks(), after, "h1")
    assert transform(function, DropBlock(kind="feed-forward", index=(0,))).matches == 1
    assert outputs(function) == outputs(expected)
    for found, wanted in zip(run(function), run(expected), strict=True):
        torch.testing.assert_close(found, wanted)


def dropped(*indices: int) -> Function:
    """A tiny model without these attention blocks."""
    function = program_of("llama", TIDY)["forward"].copy()
    transform(function, DropBlock(index=indices, kind="attention"))
    return function


def test_indices_count_blocks_of_the_kind_from_either_end() -> None:
    assert outputs(dropped(2)) == outputs(dropped(-1, 2)) != outputs(dropped(1))
    assert sum("graft.attention" in str(node.target) for node in dropped(2).graph.nodes) == 2


def test_a_dropped_attention_keeps_no_keys_and_values() -> None:
    function = dropped(1)
    transform(function, KVCache())
    assert [state.layers for state in function.states] == [2]


@pytest.mark.parametrize("index", [3, -4])
def test_a_block_that_does_not_exist_is_refused(index: int) -> None:
    function = program_of("llama", TIDY)["forward"].copy()
    with pytest.raises(PassError, match=rf"expected: an index from -3 to 2(.|\n)*found: \[{index}\]"):
        transform(function, DropBlock(index=(index,)))


def test_without_an_index_it_says_that_none_is_named() -> None:
    view = transform(program_of("llama", TIDY)["forward"].copy(), DropBlock())
    assert (view.matches, view.misses) == (0, ["index: no block is named"])
