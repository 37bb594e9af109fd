"""Capture: the whole model or a refusal, the model left as it was, nothing held twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from graft.compiler.capture import capture
from graft.compiler.decompositions import rms_norm
from graft.compiler.errors import CaptureError
from graft.compiler.interface import mask_function
from graft.compiler.nodes import call_nodes, origin_of
from tests.compiler.programs import Decoder, dense_logits, dense_program, flat_program
from tests.families import VOCABULARY, build

TOKENS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))


def one_layer(name: str = "llama", **overrides: Any) -> PreTrainedModel:
    """The quickest model to capture."""
    return build(name, num_hidden_layers=1, **overrides)


def eager(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    """The model's own logits."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def state_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """Everything that capture could have changed."""
    containers = (dict, list, tuple)
    configs = [str(vars(module.config)) for module in model.modules() if hasattr(module, "config")]
    attributes = [
        {key: str(value) if isinstance(value, containers) else id(value) for key, value in vars(module).items()}
        for module in model.modules()
    ]
    tensors = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    return configs, attributes, {name: identity for name, (identity, _) in tensors.items()}


def test_the_model_is_as_before_after_capture() -> None:
    model = one_layer("qwen3_moe")
    before, logits = state_of(model), eager(model)
    capture(model)
    assert state_of(model) == before
    assert torch.equal(eager(model), logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_that_was_set_is_kept(implementation: str) -> None:
    model = one_layer()
    model.set_attn_implementation(implementation)
    expected = eager(model)
    found = dense_logits(dense_program(model), TOKENS)
    assert model.config._attn_implementation == implementation
    assert (found - expected).abs().max() <= 1e-5


def test_the_model_is_as_before_after_a_refusal() -> None:
    model = one_layer("gptj", n_layer=1)
    before, logits = state_of(model), eager(model)
    with pytest.raises(CaptureError):
        capture(model)
    assert state_of(model) == before
    assert torch.equal(eager(model), logits)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "nanochat"])
def test_every_floating_dtype_is_captured(name: str, dtype: torch.dtype, limit: float) -> None:
    layers = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}
    layers |= {"layer_types": ["sliding_attention"]} if name == "gemma3_text" else {}
    model = build(name, dtype=dtype, **layers)
    model.set_attn_implementation("sdpa" if dtype == torch.float64 else "eager")  # eager's softmax is always float32
    program = dense_program(model)
    assert (dense_logits(program, TOKENS) - eager(model)).abs().max() <= limit
    decoder = Decoder(flat_program(program))
    decoder.step([(1, TOKENS[0, :16].tolist())])
    (found,) = decoder.step([(1, TOKENS[0, 16:].tolist())])
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found - eager(model)[0, 16:]).abs().max() <= limit


def test_eps_of_a_norm_without_one_is_that_of_the_dtype_it_computes_in() -> None:
    x = (torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 1e-3).to(torch.bfloat16)
    assert (rms_norm(x, [8]) - torch.rms_norm(x, [8])).abs().max() <= 0.01


def test_tied_embeddings_are_one_tensor() -> None:
    model = one_layer(tie_word_embeddings=True)
    program = dense_program(model)
    assert (dense_logits(program, TOKENS) - eager(model)).abs().max() <= 1e-5
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in model.parameters()}
    assert program.parameter_bytes <= sum(storage.nbytes() for storage in storages.values()) + 256


def test_parameters_are_shared_with_the_model() -> None:
    model = one_layer("gpt2", n_layer=1)
    captured = capture(model)
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in captured.weights.parameters()} == theirs


def test_a_change_of_the_models_weights_is_seen() -> None:
    model = one_layer()
    program = dense_program(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert (dense_logits(program, TOKENS) - eager(model)).abs().max() <= 1e-5


def test_every_call_has_a_module_or_is_the_models_own() -> None:
    graph = capture(one_layer()).graph
    (attention,) = call_nodes(graph, [torch.ops.graft.attention.default])
    assert origin_of(attention).module == "model.layers.0.self_attn"
    assert origin_of(attention).source.startswith("modeling_llama.py:")


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 1)])
def test_batch_and_length_are_dynamic_down_to_one(shape: tuple[int, int]) -> None:
    model = one_layer("mistral")
    tokens = TOKENS.flatten()[: shape[0] * shape[1]].reshape(shape)
    assert (dense_logits(dense_program(model), tokens) - eager(model, tokens)).abs().max() <= 1e-5


def test_a_hook_that_a_user_put_on_a_module_is_captured() -> None:
    model = one_layer()
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: output * 3)
    assert (dense_logits(dense_program(model), TOKENS) - eager(model)).abs().max() <= 1e-5


def test_upcast_attention_of_gpt2_is_captured_or_refused() -> None:
    model = one_layer("gpt2", n_layer=1, reorder_and_upcast_attn=True)
    try:
        program = dense_program(model)
    except CaptureError:
        return
    assert (dense_logits(program, TOKENS) - eager(model)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        (lambda ids: ids.shape[1] > 16, "<= 16"),
        (lambda ids: ids.shape[1] % 2 == 0, "Mod"),
        (lambda ids: ids.shape[0] > ids.shape[1], "a condition on a size"),
    ],
)
def test_python_that_looks_at_the_length_is_refused(condition: Callable[[Tensor], bool], found: str) -> None:
    model = one_layer()
    embed = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: embed(ids) * 2 if condition(ids) else embed(ids)
    with pytest.raises(CaptureError, match=found):
        capture(model)


def test_python_that_looks_at_the_values_is_refused_with_the_module() -> None:
    model = one_layer()
    norm = model.model.layers[0].input_layernorm
    forward = norm.forward
    norm.forward = lambda x: forward(x) if x.sum() > 0 else x
    with pytest.raises(CaptureError, match=r"model\.layers\.0"):
        capture(model)


def test_positions_of_the_models_own_are_refused() -> None:
    model = one_layer("opt")
    forward = model.forward

    def shifted(*args: Any, position_ids: Tensor | None = None, input_ids: Tensor, **kwargs: Any) -> Any:
        if position_ids is None:
            position_ids = torch.arange(2, 2 + input_ids.shape[1])[None]
        return forward(*args, input_ids=input_ids, position_ids=position_ids, **kwargs)

    model.forward = shifted
    with pytest.raises(CaptureError, match="does not compute the model's logits"):
        capture(model)


@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_an_encoder_made_a_decoder_is_captured_right_or_refused(name: str) -> None:
    options = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    for decoder in (False, True):
        config = AutoConfig.for_model(name, **options, vocab_size=VOCABULARY, pad_token_id=1, is_decoder=decoder)
        model = AutoModelForCausalLM.from_config(config).eval()
        try:
            program = dense_program(model)
        except CaptureError:
            continue
        assert (dense_logits(program, TOKENS) - eager(model)).abs().max() <= 1e-5


def test_what_is_not_a_transformers_model_is_refused() -> None:
    with pytest.raises(CaptureError, match="found: Linear"):
        capture(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_an_encoder_decoder_is_refused() -> None:
    config = AutoConfig.for_model("t5", d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    with pytest.raises(CaptureError, match="not a causal language model"):
        capture(AutoModelForSeq2SeqLM.from_config(config).eval())


def test_training_mode_is_refused_even_in_one_module() -> None:
    model = one_layer()
    model.model.layers[0].mlp.train()
    with pytest.raises(CaptureError, match=r"model\.layers\.0\.mlp"):
        capture(model)


def test_weights_on_the_meta_device_are_refused() -> None:
    model = one_layer()
    model.model.norm.to("meta")
    with pytest.raises(CaptureError, match=r"model\.norm\.weight"):
        capture(model)


def test_quantised_weights_are_refused() -> None:
    model = one_layer()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(CaptureError, match=r"quantised(.|\n)*int8(.|\n)*up_proj"):
        capture(model)


def test_attention_with_an_unknown_argument_is_refused() -> None:
    model = one_layer()
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs, bias_of_tomorrow=torch.ones(1))
    with pytest.raises(CaptureError, match=r"bias_of_tomorrow(.|\n)*model\.layers\.0\.self_attn"):
        capture(model)


def test_attention_that_is_not_causal_is_refused() -> None:
    model = one_layer()
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs, is_causal=False)
    with pytest.raises(CaptureError, match="is_causal=False"):
        capture(model)


def test_a_mask_that_is_not_causal_is_refused() -> None:
    def everything(batch: int, head: int, query: int, key: int) -> bool:
        return True

    with pytest.raises(CaptureError, match="test_a_mask_that_is_not_causal_is_refused"):
        mask_function(mask_function=everything)


def test_two_captures_of_one_model_are_equal() -> None:
    model = one_layer()
    first, second = capture(model), capture(copy.deepcopy(model))
    assert str(first.graph) == str(second.graph)
