"""From the arguments of generate() to settings: transformers' rules, and what is refused by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from graft.compiler.errors import GenerationError
from graft.runtime import options
from graft.runtime.settings import ModelFace, Settings, resolve
from tests.families import VOCABULARY, build

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def face(**defaults: Any) -> ModelFace:
    model = build("llama")
    config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, **defaults)
    return ModelFace(model.config, config, model.device)


def settle(own: ModelFace | None = None, **arguments: Any) -> Settings:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resolve(own or face(), VOCABULARY, 128, {"input_ids": IDS} | arguments)


def refused(own: ModelFace | None = None, **arguments: Any) -> str:
    with pytest.raises(GenerationError) as error:
        settle(own, **arguments)
    return str(error.value)


def test_every_option_of_transformers_is_in_one_table() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - set(options.METADATA)
    tables = [set(options.SUPPORTED), set(options.INERT), set(options.REFUSED)]
    assert fields <= set().union(*tables)
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("num_beam_groups", 2),
        ("constraints", [1]),
        ("force_words_ids", [[1]]),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("guidance_scale", 1.5),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("prompt_lookup_num_tokens", 3),
        ("assistant_early_exit", 2),
        ("assistant_model", object()),
        ("inputs_embeds", torch.zeros(1, 2, 64)),
        ("past_key_values", ()),
        ("position_ids", IDS),
        ("token_type_ids", IDS),
        ("synced_gpus", True),
        ("negative_prompt_ids", IDS),
        ("custom_generate", "somewhere"),
        ("token_healing", True),
        ("use_cache", False),
        ("cache_implementation", "static"),
        ("length_penalty", 2.0),
        ("num_assistant_tokens", 3),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name: str, value: object) -> None:
    assert f"graft does not support {name}" in refused(**{name: value})
    assert "what to do" in refused(**{name: value})


def test_a_refused_option_in_a_generation_config_is_refused_too() -> None:
    assert "num_beams" in refused(generation_config=GenerationConfig(num_beams=3))
    assert "num_beams" in refused(face(num_beams=3))


def test_prompt_lookup_is_refused_with_the_plan_that_does_it() -> None:
    assert "graft.Plan(draft=[graft.Lookup()])" in refused(prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(("name", "nearest"), [("max_new_token", "max_new_tokens"), ("temprature", "temperature")])
def test_a_misspelt_argument_is_an_error_with_the_nearest_name(name: str, nearest: str) -> None:
    assert f"did you mean {nearest}?" in refused(**{name: 3})
    assert f"did you mean {nearest}?" in refused(generation_config=GenerationConfig(**{name: 3}))


def test_options_at_their_neutral_values_are_no_reason_to_refuse() -> None:
    settled = settle(num_beams=1, guidance_scale=1.0, output_attentions=False, use_cache=True, synced_gpus=False)
    assert settled.new_tokens > 0


def test_what_the_models_own_configuration_has_beyond_the_output_is_dropped() -> None:
    settled = settle(face(use_cache=False, cache_implementation="static", length_penalty=2.0, chat_format="own"))
    assert not settled.processors[0]


def test_the_call_overrides_a_generation_config_which_overrides_the_models() -> None:
    own = face(max_new_tokens=3, do_sample=True, temperature=0.5)
    assert settle(own).new_tokens == 3
    assert settle(own, generation_config=GenerationConfig(max_new_tokens=4)).new_tokens == 4
    assert settle(own, generation_config=GenerationConfig(max_new_tokens=4), max_new_tokens=5).new_tokens == 5
    assert settle(own).sample
    assert not settle(own, do_sample=False).sample


def test_max_new_tokens_goes_before_max_length_which_counts_the_prompt() -> None:
    assert settle(max_length=10).new_tokens == 7
    assert settle(max_length=10, max_new_tokens=2).new_tokens == 2
    assert settle().new_tokens == 20


def test_a_users_length_criterion_takes_the_place_of_the_built_in_one() -> None:
    criteria = StoppingCriteriaList([MaxLengthCriteria(5)])
    settled = settle(max_new_tokens=9, stopping_criteria=criteria)
    assert settled.new_tokens == 2
    assert not settled.criteria


@pytest.mark.parametrize("eos", [4, [4, 9], torch.tensor([4, 9])])
def test_eos_may_be_an_id_a_list_or_a_tensor(eos: Any) -> None:
    expected = {4} if isinstance(eos, int) else {4, 9}
    assert settle(eos_token_id=eos).eos == expected


def test_without_a_pad_token_the_first_eos_token_pads() -> None:
    own = face()
    own.generation_config.pad_token_id = None
    assert settle(own, eos_token_id=[7, 4]).pad == 7


def test_processors_see_each_row_as_if_it_were_alone() -> None:
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    settled = settle(attention_mask=mask, min_new_tokens=4, max_new_tokens=6, forced_eos_token_id=2)
    scores = torch.zeros(1, VOCABULARY)
    for prompt, processors in zip(settled.prompts, settled.processors, strict=True):
        held = [float(processors(torch.tensor([prompt + [5] * new]), scores.clone())[0, 2]) for new in range(6)]
        assert [value == -torch.inf for value in held] == [True] * 4 + [False] * 2
    assert settled.prompts == [[5, 6, 7], [9, 10]]


def test_prefix_allowed_tokens_fn_is_told_the_row() -> None:
    asked: list[int] = []

    def allowed(row: int, prefix: torch.Tensor) -> list[int]:
        asked.append(row)
        return [row]

    settled = settle(prefix_allowed_tokens_fn=allowed)
    for row, processors in enumerate(settled.processors):
        scores = processors(torch.tensor([settled.prompts[row]]), torch.zeros(1, VOCABULARY))
        assert int(scores.argmax()) == row
    assert asked == [0, 1]


def test_several_return_sequences_repeat_each_prompt_with_a_seed_of_its_own() -> None:
    settled = settle(do_sample=True, num_return_sequences=2, seed=[3, 4])
    assert settled.prompts == [[5, 6, 7], [5, 6, 7], [8, 9, 10], [8, 9, 10]]
    assert settled.seeds[0] == 3 and settled.seeds[2] == 4 and len(set(settled.seeds)) == 4


def test_greedy_decoding_of_several_return_sequences_is_refused_as_in_transformers() -> None:
    assert "num_return_sequences" in refused(num_return_sequences=2)


def test_without_a_seed_torchs_global_generator_decides() -> None:
    torch.manual_seed(5)
    first, second = settle(do_sample=True).seeds, settle(do_sample=True).seeds
    torch.manual_seed(5)
    assert settle(do_sample=True).seeds == first != second


def test_greedy_decoding_leaves_torchs_global_generator_alone() -> None:
    before = torch.get_rng_state()
    settle()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seed", ["a", 1.5, [1], [1, 2, 3], True])
def test_a_seed_that_is_none_is_refused(seed: object) -> None:
    assert "seed is not valid" in refused(do_sample=True, seed=seed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "the prompt is empty"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "where: sequence 1"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}, "padding on the right"),
        ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "padding between tokens"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask does not fit"),
        ({"input_ids": torch.tensor([[5, 0, 6]])}, "pass attention_mask"),
        ({"input_ids": torch.full((1, 129), 5)}, "longer than the model's positions"),
        ({"input_ids": torch.tensor([[5, 131]])}, "found: 131"),
        ({"input_ids": torch.tensor([[5, -1]])}, "found: -1"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.int64)}, "no prompt"),
        ({"input_ids": [[1, 2]]}, "not token ids"),
        ({"input_ids": torch.ones(2, 3)}, "not token ids"),
        ({"input_ids": torch.tensor([1, 2])}, "not token ids"),
        ({"inputs": IDS}, "the same argument"),
        ({"generation_config": {"max_new_tokens": 3}}, "generation_config is of another type"),
        ({"streamer": object()}, "a streamer takes one sequence"),
        ({"max_length": 2}, "max_length"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"stop_strings": "x"}, "tokenizer"),
    ],
)
def test_bad_input_gets_a_clear_error(arguments: dict[str, Any], message: str) -> None:
    assert message in refused(**arguments)


def test_padding_is_inferred_from_pad_tokens_as_in_transformers() -> None:
    ids = torch.tensor([[0, 0, 5], [6, 7, 8]])
    assert settle(input_ids=ids).prompts == [[5], [6, 7, 8]]
    assert settle(input_ids=ids, attention_mask=torch.ones_like(ids)).prompts == [[0, 0, 5], [6, 7, 8]]
    assert settle(input_ids=ids, eos_token_id=[2, 0]).prompts == [[0, 0, 5], [6, 7, 8]]


def test_no_prompt_at_all_means_the_bos_token() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert resolve(face(), VOCABULARY, 128, {}).prompts == [[1]]


def test_a_length_beyond_the_models_positions_warns() -> None:
    with pytest.warns(UserWarning, match="128 positions"):
        resolve(face(), VOCABULARY, 128, {"input_ids": IDS, "max_new_tokens": 127})


def test_a_model_class_with_a_generate_of_its_own_is_refused() -> None:
    class Special(type(build("llama"))):  # type: ignore[misc]
        def _sample(self) -> None:
            pass

    model = build("llama")
    model.__class__ = Special
    with pytest.raises(GenerationError, match="_sample"):
        ModelFace.of(model)


def test_a_users_processor_list_comes_after_the_built_in_ones() -> None:
    def mine(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores

    settled = settle(logits_processor=LogitsProcessorList([mine]), repetition_penalty=1.3)
    assert settled.processors[0][-1] is mine
    assert len(settled.processors[0]) == 2


def test_none_unsets_what_the_models_own_settings_have() -> None:
    own = face(max_new_tokens=4)
    assert resolve(own, VOCABULARY, 128, {"input_ids": IDS}).eos == {2}
    assert resolve(own, VOCABULARY, 128, {"input_ids": IDS, "eos_token_id": None}).eos == frozenset()
