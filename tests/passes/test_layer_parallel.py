"""layer-parallel: the listing in its docstring, the equations of both kinds, one wide product over what there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graft.compiler.checker import check
from graft.compiler.errors import PassError, PlanError
from graft.compiler.evaluate import logits_of
from graft.compiler.passing import View
from graft.compiler.program import Function, Program
from graft.passes import layer_parallel, side_by_side
from graft.passes.layer_parallel import LayerParallel
from tests.families import build
from tests.passes.listings import OPERATORS, Sheet, expression, listings, outputs, transform
from tests.passes.test_drop_block import model, sheet_with_blocks
from tests.passes.test_merge_linears import X
from tests.programs import TIDY, program_of

TEXT = ((5, 6, 7, 8, 9, 10, 11, 12),)


def test_the_docstring_shows_what_it_does() -> None:
    before, after = listings(layer_parallel)
    function = model(sheet_with_blocks(), before, "h4")
    expected = model(sheet_with_blocks(), after, "h4")
    assert transform(function, LayerParallel(groups=((0, 1),))).matches == 1
    assert outputs(function) == outputs(expected)


def test_products_side_by_side_are_one_over_the_same_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "cat", torch.ops.aten.cat.default)
    before, after = listings(side_by_side)
    weights = {"w_0": (8, 16), "w_1": (8, 16)}
    sheet, expected = Sheet(X, weights), Sheet(X, weights)
    for one in (sheet, expected):
        one.run("x0 = silu(x)\nx1 = add(x, x)")
    sheet.run(before)
    expected.run(after)
    function = sheet.function(sheet["y0"], sheet["y1"])
    linears = [node for node in function.graph.nodes if "linear" in str(node.target)]
    assert side_by_side.widen(linears, View(Program({}), "test")) == 2
    assert outputs(function) == [expression(expected["y0"]), expression(expected["y1"])]


def grouped(family: str, one: LayerParallel, **overrides: Any) -> Function:
    """The family's tiny model of 4 layers behind the pass, checked."""
    function = program_of(family, TIDY, num_hidden_layers=4, **overrides)["forward"].copy()
    transform(function, one)
    check(Program({"forward": function}))
    return function


def llama_reference(kind: str, groups: tuple[tuple[int, ...], ...]) -> Tensor:
    """Logits of the equations in the pass's docstring, by transformers' own modules."""
    held = build("llama", num_hidden_layers=4)
    base, tokens = held.model, torch.tensor(TEXT)
    h = base.embed_tokens(tokens)
    rope = base.rotary_emb(h, torch.arange(len(TEXT[0]))[None])
    mask = torch.full((len(TEXT[0]),) * 2, float("-inf")).triu(1)[None, None]

    def attention(number: int, x: Tensor) -> Tensor:
        layer = base.layers[number]
        return layer.self_attn(layer.input_layernorm(x), position_embeddings=rope, attention_mask=mask)[0]

    def feed_forward(number: int, x: Tensor) -> Tensor:
        layer = base.layers[number]
        return layer.mlp(layer.post_attention_layernorm(x))

    singles = [(number,) for number in range(4) if not any(number in group for group in groups)]
    for group in sorted([*groups, *singles]):
        x = h
        if kind == "attention":
            for number in group:
                h = h + attention(number, x)
                h = h + feed_forward(number, h)
        else:
            y = x + sum(attention(number, x) for number in group)
            h = y + sum(feed_forward(number, y) for number in group)
    return held.lm_head(base.norm(h))[0].detach()


@pytest.mark.parametrize("kind", ["attention", "layer"])
@pytest.mark.parametrize("groups", [((1, 2),), ((0, 1), (2, 3)), ((0, 1, 2, 3),)])
def test_it_computes_its_equations(kind: Any, groups: tuple[tuple[int, ...], ...]) -> None:
    function = grouped("llama", LayerParallel(groups=groups, kind=kind))
    torch.testing.assert_close(logits_of(function, TEXT)[0], llama_reference(kind, groups), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "wide"), [("attention", [6, 2]), ("layer", [6, 2, 4, 2])])
def test_a_groups_products_are_one_and_no_parameter_is_new(kind: Any, wide: list[int]) -> None:
    function = grouped("llama", LayerParallel(groups=((1, 2),), kind=kind))
    found = [len(node.args[1]) for node in function.graph.nodes if "linear_rows" in str(node.target)]
    assert found == wide
    plain = program_of("llama", TIDY, num_hidden_layers=4)["forward"]
    names = lambda one: {node.target for node in one.graph.nodes if node.op == "get_attr"}  # noqa: E731
    assert names(function) == names(plain)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("kind", ["attention", "layer"])
def test_other_families_are_grouped_or_refused_with_a_reason(family: str, kind: Any) -> None:
    layers = {"layer_types": ("sliding_attention", "full_attention") * 2} if family == "gemma2" else {}
    one = LayerParallel(groups=((1, 2),), kind=kind)
    if family == "gpt_neox" and kind == "attention":
        with pytest.raises(PassError, match='use kind="layer"'):
            grouped(family, one, **layers)
        return
    function = grouped(family, one, **layers)
    plain = program_of(family, TIDY, num_hidden_layers=4, **layers)["forward"]
    (new,), (old,) = logits_of(function, TEXT), logits_of(plain, TEXT)
    assert 1e-4 < (new - old).abs().max() < 20


@pytest.mark.parametrize("groups", [((0, 1), (1, 2)), ((0, 2),), ((3, 4),), ((-1, 0),)])
def test_groups_that_overlap_or_do_not_exist_are_refused(groups: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(PassError, match="consecutive layers from 0 to 3, none in two groups"):
        grouped("llama", LayerParallel(groups=groups))


def test_grouping_twice_is_refused() -> None:
    function = grouped("llama", LayerParallel(groups=((0, 1),)))
    with pytest.raises(PassError, match="handed on as it is"):
        transform(function, LayerParallel(groups=((0, 1),)))


def test_too_few_layers_between_those_that_stay_are_refused() -> None:
    with pytest.raises(PassError, match="no two layers between the first 2 and the last 2"):
        grouped("llama", LayerParallel())
    with pytest.raises(PlanError, match="2 layers or more"):
        LayerParallel(group=1)
