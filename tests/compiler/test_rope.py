"""Every rope type of every family, on positions beyond the length up to which it is unscaled: rewritten per token where
it grows, and captured for every code of a rotary embedding."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from graft.compiler.capture import capture
from graft.compiler.errors import CaptureError
from graft.compiler.rope import GROWING, per_token_rope, rope_kinds
from tests.compiler.programs import Decoder, dense_logits, dense_program, flat_program
from tests.families import (
    CAPTURED,
    FAMILIES,
    ORIGINAL_LENGTH,
    REFUSED_ROPES,
    ROPE_VARIANTS,
    VOCABULARY,
    build,
    rope_overrides,
)

LENGTH = ORIGINAL_LENGTH + 8
CASES = [
    (name, kind)
    for name in CAPTURED
    for kind in ROPE_VARIANTS.get(name, ())
    if (name, kind) not in REFUSED_ROPES and kind != "default"
]
"""The default rope is in every test of the family."""
CODES = ("llama", "cohere", "deepseek_v2", "ernie4_5", "gemma3_text", "gpt_oss", "olmo", "olmo3")
"""A family for every code of a rotary embedding that there is; most families have llama's, letter for letter."""
CAPTURES = [(name, kind) for name, kind in CASES if name in CODES and (name == CODES[0] or kind in GROWING)]
"""A capture depends on the code of the rope and, with the types that grow, on their form per token; the types that do
not grow are other numbers in the same code."""


def shallow(name: str, kind: str) -> PreTrainedModel:
    """As few layers as show every kind of layer, which is what a capture's time goes by."""
    options = FAMILIES[name]
    layers: dict[str, Any] = {"num_hidden_layers": 1}
    if "layer_types" in options:
        layers = {"num_hidden_layers": 2, "layer_types": options["layer_types"][:2]}
    if "no_rope_layers" in options:
        layers = {"num_hidden_layers": 2, "no_rope_layers": options["no_rope_layers"][:2]}
    return build(name, **rope_overrides(name, kind), **layers)


def prompt(seed: int = 0) -> Tensor:
    """Random tokens, int64 [1, LENGTH]."""
    return torch.randint(3, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(seed))


def one_by_one(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Eager logits of decoding token by token with transformers' cache."""
    cache, logits = None, []
    with torch.no_grad():
        for index in range(tokens.shape[1]):
            output = model(input_ids=tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


def rotations(model: PreTrainedModel) -> set[str]:
    """The code of the model's rotary embeddings, without what transformers wraps around it."""
    return {inspect.getsource(inspect.unwrap(type(one).forward)) for one in model.modules() if rope_kinds(one)}


@cache
def captured_rotations() -> set[str]:
    return set().union(*(rotations(build(name)) for name in CODES))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_rope_rotates_as_transformers_does_when_it_decodes(name: str, kind: str) -> None:
    model, tokens = shallow(name, kind), prompt()
    with torch.no_grad(), per_token_rope(model):
        found = model(input_ids=tokens, use_cache=False).logits
    assert (found - one_by_one(model, tokens)).abs().max() <= 1e-5
    assert rotations(model) <= captured_rotations()


@pytest.mark.parametrize(("name", "kind"), CAPTURES)
def test_a_captured_rope_rotates_as_transformers_does_when_it_decodes(name: str, kind: str) -> None:
    model, tokens = shallow(name, kind), prompt()
    captured = capture(model)
    with torch.no_grad():
        found = fx.GraphModule(captured.weights, captured.graph)(tokens, torch.arange(LENGTH)[None])[0]
    assert (found - one_by_one(model, tokens)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", sorted(GROWING))
def test_a_prefill_beyond_the_original_length_differs_in_transformers_but_not_here(kind: str) -> None:
    model, tokens = shallow("llama", kind), prompt()
    program = dense_program(model)
    expected = one_by_one(model, tokens)
    with torch.no_grad():
        prefill = model(input_ids=tokens, use_cache=False).logits
    assert (prefill - expected).abs().max() > 1e-2
    assert (dense_logits(program, tokens) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", sorted(GROWING))
def test_a_short_sequence_is_not_changed_by_a_long_neighbour(kind: str) -> None:
    model = shallow("llama", kind)
    program = dense_program(model)
    alone = dense_logits(program, prompt(1)[:, :5])
    decoder = Decoder(flat_program(program))
    _, found = decoder.step([(0, prompt()[0].tolist()), (2, prompt(1)[0, :5].tolist())])
    assert (found - alone[0]).abs().max() <= 1e-5
    assert (found - one_by_one(model, prompt(1)[:, :5])[0]).abs().max() <= 1e-5


def test_a_rope_whose_scale_depends_on_the_longest_position_is_refused() -> None:
    with pytest.raises(CaptureError, match="rotary_emb"):
        capture(shallow("phimoe", "longrope"))


def test_a_growing_rope_of_unknown_type_is_refused() -> None:
    model = shallow("llama", "dynamic")
    model.model.rotary_emb.rope_type = "dynamic-of-tomorrow"
    with pytest.raises(CaptureError, match=r"dynamic-of-tomorrow(.|\n)*model\.rotary_emb"):
        capture(model)


def test_the_rotary_module_is_as_before_after_capture() -> None:
    model = shallow("llama", "dynamic")
    rotary = model.model.rotary_emb
    before = {name: str(value) for name, value in vars(rotary).items()}
    capture(model)
    assert {name: str(value) for name, value in vars(rotary).items()} == before


def test_a_forward_that_another_library_put_on_the_rotary_module_is_kept() -> None:
    model = shallow("llama", "dynamic")
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = forward
    capture(model)
    assert vars(rotary)["forward"] is forward
