"""generate() against transformers' generate(), token for token in float64, with and without drafts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerFast, StoppingCriteriaList

from graft.compiler.errors import CheckError, PlanError
from graft.compiler.host import plain_host, speculative_host
from graft.runtime import run as run_module
from graft.runtime.drafters.lookup import Lookup
from graft.runtime.drafters.recycle import Recycle
from graft.runtime.generate import Generator
from graft.runtime.run import PRIMITIVES, Run, commit
from graft.runtime.tree_policies import Chain
from graft.runtime.verifiers import Leviathan
from tests.runtime.decoding import (
    DRAFTERS,
    LONG,
    Always,
    Recorder,
    all_slots_free,
    bigram_generator,
    generator,
    oracle,
    prompts,
    same_cache_as_fresh_prefill,
    theirs,
)

drafted = pytest.mark.parametrize("name", DRAFTERS)


@drafted
def test_greedy_text_is_transformers_for_a_ragged_padded_batch(name: str) -> None:
    arguments = prompts(7, 1, 4) | LONG
    made = generator(DRAFTERS[name]())
    assert torch.equal(made.generate(**arguments), theirs(arguments))
    assert all_slots_free(made)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2"])
def test_greedy_text_is_transformers_in_other_families(family: str) -> None:
    arguments = prompts(9) | LONG
    assert torch.equal(generator(Lookup(), name=family).generate(**arguments), theirs(arguments, family))


def test_prompts_longer_than_one_chunk_are_run_beside_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "PROMPT_ROWS", 4)
    arguments = prompts(3, 11, 1, 6) | LONG
    for drafter in (None, Recycle(seed_prompt=True)):
        assert torch.equal(generator(drafter).generate(**arguments), theirs(arguments))


@pytest.mark.parametrize("at", [0, 1, 4, 5, 9])
@pytest.mark.parametrize("several", [False, True])
def test_eos_inside_an_accepted_path_ends_the_text(at: int, several: bool) -> None:
    arguments = prompts(6, 3)
    text = theirs(arguments | LONG)[0, 6:].tolist()
    eos = [text[at], 130] if several else text[at]
    arguments |= LONG | {"eos_token_id": eos}
    made = generator(oracle(arguments))
    assert torch.equal(made.generate(**arguments), theirs(arguments))
    assert all_slots_free(made)


@pytest.mark.parametrize("length", [1, 2, 3, 6, 8, 9])
def test_the_length_limit_inside_an_accepted_path_ends_the_text(length: int) -> None:
    arguments = prompts(6, 3)
    drafter = oracle(arguments)
    assert torch.equal(
        generator(drafter).generate(**arguments, max_new_tokens=length), theirs(arguments | {"max_new_tokens": length})
    )
    assert torch.equal(
        generator(drafter).generate(**arguments, max_length=6 + length), theirs(arguments | {"max_length": 6 + length})
    )


def test_a_right_draft_is_accepted_whole() -> None:
    arguments = prompts(6)
    made = generator(oracle(arguments), controller=Always(5))
    made.generate(**arguments, max_new_tokens=27)
    # One token from the prompt, five times four drafted ones and one more, and a last one that is not worth a draft.
    assert made.stats["steps"] == 6
    assert made.stats["tokens_per_step"] == pytest.approx(26 / 6)
    assert (made.stats["new_tokens"], made.stats["accepted"], made.stats["drafted"]) == (27, 20, 25)


@pytest.mark.parametrize("name", ["plain", "lookup", "the same model"])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12, "eos_token_id": list(range(2, 100))},
        {"suppress_tokens": list(range(40, 80)), "begin_suppress_tokens": [1, 2, 3]},
        {"forced_eos_token_id": 5, "encoder_repetition_penalty": 1.3},
        {"bad_words_ids": [[30, 31], [32]], "exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 7},
    ],
    ids=lambda options: next(iter(options)),
)
def test_logits_processors_see_the_path_as_prefix(name: str, options: dict[str, Any]) -> None:
    arguments = prompts(6) | {"max_new_tokens": 20} | options
    assert torch.equal(generator(DRAFTERS[name]()).generate(**arguments), theirs(arguments))


def test_a_users_processor_is_called_once_for_each_new_token_in_order() -> None:
    seen: list[list[int]] = []

    def even(ids: Tensor, scores: Tensor) -> Tensor:
        assert ids.shape[0] == scores.shape[0] == 1 and scores.dtype == torch.float32
        seen.append(ids[0].tolist())
        scores[:, 1::2] = -math.inf
        return scores

    arguments = prompts(6) | {"max_new_tokens": 12}
    made = generator(Lookup())
    ours = made.generate(**arguments, logits_processor=LogitsProcessorList([even]))
    assert [len(ids) for ids in seen] == list(range(6, 18))
    assert all(ids == ours[0, : len(ids)].tolist() for ids in seen)
    assert torch.equal(ours, theirs(arguments | {"logits_processor": LogitsProcessorList([even])}))


def test_stopping_criteria_see_every_length_and_cannot_be_overrun() -> None:
    lengths: list[int] = []

    def criterion(ids: Tensor, scores: object) -> Tensor:
        lengths.append(ids.shape[1])
        return torch.tensor([ids.shape[1] >= 11])

    arguments = prompts(6)
    criteria = StoppingCriteriaList([criterion])
    ours = generator(oracle(arguments)).generate(**arguments, max_new_tokens=20, stopping_criteria=criteria)
    assert lengths == list(range(7, 12))
    assert torch.equal(ours, theirs(arguments | LONG)[:, :11])


def test_a_stop_string_ends_the_text_inside_an_accepted_path() -> None:
    # transformers takes tokens apart with the help of the text "abcdef", which has to be a token here.
    letters = ["abcdef", *(chr(0x4E00 + index) for index in range(1, 131))]
    words = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="abcdef"))
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    arguments = prompts(6)
    text = theirs(arguments | LONG)[0, 6:].tolist()
    options = {"stop_strings": letters[text[3]], "tokenizer": tokenizer, "max_new_tokens": 20}
    ours = generator(oracle(arguments)).generate(**arguments, **options)
    assert torch.equal(ours, theirs(arguments | options))
    assert ours.shape[1] < 26


@pytest.mark.parametrize("name", ["plain", "lookup", "the same model"])
def test_scores_and_logits_are_transformers(name: str) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    arguments = prompts(6, 6) | options | {"max_new_tokens": 12, "repetition_penalty": 1.2}
    ours, reference = generator(DRAFTERS[name]()).generate(**arguments), theirs(arguments)
    assert torch.equal(ours.sequences, reference.sequences)
    for kind in ("scores", "logits"):
        held, expected = getattr(ours, kind), getattr(reference, kind)
        assert len(held) == len(expected) == 12
        assert held[0].dtype == torch.float32
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(held, expected, strict=True))


def test_scores_end_with_the_text_and_are_zero_for_ended_sequences() -> None:
    arguments = prompts(6, 3)
    text = theirs(arguments | LONG)[0, 6:].tolist()
    arguments |= LONG | {"eos_token_id": text[3], "return_dict_in_generate": True, "output_scores": True}
    ours, reference = generator(oracle(prompts(6, 3))).generate(**arguments), theirs(arguments)
    assert len(ours.scores) == ours.sequences.shape[1] - 6 == len(reference.scores)
    ended = text.index(text[3]) + 1
    assert not ours.scores[ended][0].any()
    assert torch.allclose(ours.scores[ended][1], reference.scores[ended][1], atol=1e-6)


def test_a_streamer_gets_the_prompt_and_then_every_token_in_order() -> None:
    arguments, streamer = prompts(6), Recorder()
    ours = generator(oracle(arguments)).generate(**arguments, max_new_tokens=9, streamer=streamer)
    assert torch.equal(streamer.puts[0], arguments["input_ids"])
    assert torch.cat(streamer.puts[1:]).tolist() == ours[0, 6:].tolist()
    assert streamer.ended == 1


@pytest.mark.parametrize("name", ["plain", "lookup", "recycle", "another model"])
def test_the_cache_equals_a_fresh_prefill_after_every_commit(name: str) -> None:
    made, checked = generator(DRAFTERS[name]()), []

    def checking_commit(run: Run, decisions: list[Any]) -> None:
        commit(run, decisions)
        for request in run.live:
            tokens = request.context.tokens
            assert run.decoder.length(request.slot) == len(tokens) - 1
            assert same_cache_as_fresh_prefill(run.decoder, request.slot, tokens)
            checked.append(len(tokens))

    made.loop = made.host.load({**PRIMITIVES, "forward": made.decoder.forward, "commit": checking_commit})
    made.generate(**prompts(6, 2), max_new_tokens=16)
    assert len(checked) > 10


def test_ties_go_to_the_lowest_id() -> None:
    table = torch.zeros(300, 300)
    table[:, [7, 150, 290]] = 1.0
    assert bigram_generator(table).generate(torch.tensor([[3]]), max_new_tokens=2).tolist() == [[3, 7, 7]]


def test_a_text_ends_with_the_models_positions() -> None:
    arguments = prompts(120) | {"max_new_tokens": 30}
    for drafter in (None, Lookup(), DRAFTERS["another model"]()):
        with pytest.warns(UserWarning, match="128 positions"):
            ours = generator(drafter, name="gpt2" if drafter is None else "llama").generate(**arguments)
        assert ours.shape[1] == 129


def test_a_verifier_that_would_change_the_output_is_refused() -> None:
    with pytest.raises(PlanError, match="not lossless for drafter lookup"):
        generator(Lookup(), policy=Chain(), verifier=Leviathan())


def test_a_drafter_needs_a_policy_and_a_controller() -> None:
    with pytest.raises(PlanError, match="tree policy and a controller"):
        generator(Lookup(), policy=None)


def test_a_host_program_that_calls_a_missing_function_is_refused() -> None:
    made = generator()
    made.decoder.function.name, name = "other", made.decoder.function.name
    try:
        with pytest.raises(CheckError, match="found: forward"):
            Generator(made.decoder, made.face, plain_host())
    finally:
        made.decoder.function.name = name


def test_without_a_drafter_the_speculative_program_decodes_plainly() -> None:
    arguments = prompts(6) | LONG
    made = generator()
    assert torch.equal(Generator(made.decoder, made.face, speculative_host()).generate(**arguments), theirs(arguments))


def test_the_statistics_add_up() -> None:
    made = generator(Lookup())
    ours = made.generate(**prompts(6, 3), max_new_tokens=20)
    stats = made.stats
    assert stats["prompt_tokens"] == 9
    assert stats["new_tokens_per_request"] == [20, 20] and ours.shape == (2, 26)
    assert stats["steps"] == max(stats["steps_per_request"])
    assert stats["drafted"] == sum(stats["drafted_per_request"])
    for new, steps, accepted in zip(
        stats["new_tokens_per_request"], stats["steps_per_request"], stats["accepted_per_request"], strict=True
    ):
        assert new - 1 - steps <= accepted <= new
    parts = stats["draft_seconds"] + stats["model_seconds"] + stats["overhead_seconds"]
    assert stats["decode_seconds"] == pytest.approx(parts)


def test_other_integer_types_give_the_type_that_transformers_gives() -> None:
    ids = prompts(6)["input_ids"].int()
    assert generator().generate(ids, max_new_tokens=2).dtype == theirs({"inputs": ids, "max_new_tokens": 2}).dtype
