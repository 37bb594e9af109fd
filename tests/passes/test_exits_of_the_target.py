"""skip-decode and confidence-exit: their listings, and the model's own layers as an oracle."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import graft
from graft.codegen.kernel_ir import AttendKernel, MatmulKernel
from graft.codegen.regions import cut
from graft.compiler.errors import PassError, PlanError
from graft.compiler.passing import Pass
from graft.compiler.program import DENSE, Function
from graft.passes import confidence_exit, skip_decode
from graft.passes.confidence_exit import ConfidenceExit
from graft.passes.skip_decode import SkipDecode
from tests.families import build
from tests.passes.listings import Sheet, listings, outputs, run, transform
from tests.passes.test_skip_ffn import program_of
from tests.programs import USUAL

WEIGHTS = {"table": (11, 8), "w_up": (12, 8), "w_down": (8, 12), "scale": (8,)}
TOKENS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(3))


def function_of(listing: str) -> Function:
    """The listing, layers being feed-forwards alone, between an embedding and an unembedding."""
    made = Sheet(DENSE, WEIGHTS)
    made["norm"] = made["final_norm"] = lambda x: made["mul"](x, made["scale"])
    made["feed_forward"] = lambda x: made["linear"](made["silu"](made["linear"](x, made["w_up"])), made["w_down"])
    made["h0"] = made["embedding"](made["table"], made["tokens"])
    returned = made.run(listing)
    last = max((name for name in made if name[0] == "h" and name[1:].isdigit()), key=lambda name: int(name[1:]))
    logits = made["linear"](made["norm"](made[last]), made["table"]) if returned is None else returned
    return made.function(logits, logits.args[0])


@pytest.mark.parametrize(
    ("module", "one"),
    [
        (skip_decode, SkipDecode(fewest=2, most=3, length=10, first=1)),
        (confidence_exit, ConfidenceExit(layer=1, threshold=0.9)),
    ],
)
def test_the_docstring_shows_what_it_does(module: Any, one: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    # A layer begins with attention; here every block stands for one.
    layers = property(lambda trunk: [[block] for block in trunk.blocks])
    monkeypatch.setattr("graft.compiler.trunk.Trunk.layers", layers)
    before, after = listings(module)
    function, expected = function_of(before), function_of(after)
    transform(function, one)
    assert outputs(function) == outputs(expected)
    for found, wanted in zip(run(function), run(expected), strict=True):
        torch.testing.assert_close(found, wanted)


def going_past(model: PreTrainedModel, masks: Callable[[int, Tensor], Tensor | None]) -> Tensor:
    """The model's logits where rows [batch, length] whose mask of a layer holds leave the layer as they entered it."""

    def hook(number: int) -> Callable[..., Any]:
        def keep(_: Any, inputs: tuple[Tensor, ...], output: Any) -> Any:
            mask = masks(number, inputs[0])
            if mask is None:
                return output
            hidden = output[0] if isinstance(output, tuple) else output
            kept = torch.where(mask[..., None], inputs[0], hidden)
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        return keep

    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(model.model.layers)]
    try:
        with torch.no_grad():
            return model(TOKENS, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def logits_of(model: PreTrainedModel, one: Pass) -> Tensor:
    program = program_of(model, [*USUAL[:1], one])
    positions = torch.arange(TOKENS.shape[1]).expand(TOKENS.shape).contiguous()
    with torch.no_grad():
        found: Tensor = program["forward"].module()(TOKENS, positions)[0]
    return found


def test_layers_are_left_out_by_position_and_for_good() -> None:
    model = build("llama", num_hidden_layers=6)
    positions = torch.arange(TOKENS.shape[1]).expand(TOKENS.shape)
    depths = [round(6 - 4 * min(at, 8) / 8) for at in range(TOKENS.shape[1])]
    running = [{0, *range(6 - (depth - 1), 6)} for depth in depths]
    assert depths[0] == 6 and depths[-1] == 2 and all(a >= b for a, b in pairwise(running))
    skipped = torch.tensor([[layer not in layers for layers in running] for layer in range(6)])
    expected = going_past(model, lambda layer, _: skipped[layer][positions])
    assert (logits_of(model, SkipDecode(fewest=2, length=8, first=1)) - expected).abs().max() < 1e-5
    assert (going_past(model, lambda *_: None) - expected).abs().max() > 1e-3


def test_a_token_leaves_where_the_exit_is_sure_of_the_next_one() -> None:
    model, sure = build("llama", num_hidden_layers=4), []

    def masks(layer: int, hidden: Tensor) -> Tensor | None:
        if layer == 2:
            sure.append(model.lm_head(model.model.norm(hidden)).softmax(-1).amax(-1) >= threshold)
        return sure[-1] if layer >= 2 else None

    with torch.no_grad():
        early = model(TOKENS, use_cache=False, output_hidden_states=True).hidden_states[2]
        threshold = model.lm_head(model.model.norm(early)).softmax(-1).amax(-1).median().item() + 1e-6
    expected = going_past(model, masks)
    assert 0 < sure[-1].sum() < sure[-1].numel()
    assert (logits_of(model, ConfidenceExit(layer=2, threshold=threshold)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("one", [SkipDecode(fewest=2, length=1), ConfidenceExit(layer=2, threshold=0.5)])
def test_what_is_gone_past_is_branched_around_but_for_keys_and_values(one: Pass) -> None:
    program = program_of(build("llama", num_hidden_layers=4), [*USUAL[:1], one, *USUAL[1:]])
    with torch.no_grad():
        kernels = cut(program["forward"]).kernels
    assert sum(bool(kernel.guard) for kernel in kernels if isinstance(kernel, AttendKernel)) == 2
    # Of each skipped layer: output projection, gate with up, down. Queries, keys and values are one product.
    assert sum(bool(kernel.guard) for kernel in kernels if isinstance(kernel, MatmulKernel)) == 6


@pytest.mark.parametrize("one", [SkipDecode(fewest=3, length=24), ConfidenceExit(layer=2, threshold=0.02)])
def test_drafts_do_not_change_what_such_a_model_says(one: Pass) -> None:
    model = build("llama", num_hidden_layers=4)
    plain = graft.compile(model, graft.Plan(target=[one])).generate(TOKENS[:1], max_new_tokens=24)
    drafted = graft.compile(model, graft.Plan(target=[one], draft=[graft.Lookup(), graft.Recycle()]))
    assert torch.equal(drafted.generate(TOKENS[:1], max_new_tokens=24), plain)


def test_bad_options_are_refused() -> None:
    model = build("llama")
    for options in ({"fewest": 0}, {"fewest": 2, "first": 3}, {"fewest": 2, "length": 0}):
        with pytest.raises(PlanError, match="out of range"):
            SkipDecode(**options)
    with pytest.raises(PlanError, match="out of range"):
        ConfidenceExit(layer=1, threshold=0.0)
    for one in (SkipDecode(fewest=9), ConfidenceExit(layer=99, threshold=0.5)):
        with pytest.raises(PassError, match="layers"):
            program_of(model, [*USUAL[:1], one])
