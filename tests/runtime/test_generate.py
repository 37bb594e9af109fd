"""generate() against transformers' generate(), token for token in float64, with and without drafts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerFast, StoppingCriteriaList

from graft.compiler.drafting import Drafter, DraftTree, Rows, Uniforms, Verifier
from graft.compiler.errors import CheckError, GenerationError, PlanError
from graft.compiler.host import plain_host, speculative_host
from graft.runtime import run as run_module
from graft.runtime.drafters.draft_model import DraftModel
from graft.runtime.drafters.lookup import Lookup
from graft.runtime.drafters.recycle import Recycle
from graft.runtime.generate import Generator
from graft.runtime.run import PRIMITIVES, Run, commit
from graft.runtime.tree_policies import BestFirst, Chain
from graft.runtime.verifiers import Leviathan, SampleAndMatch, draw
from tests.runtime.decoding import (
    Always,
    Oracle,
    bigram,
    bigram_generator,
    decoder,
    generator,
    prompts,
    same_cache_as_fresh_prefill,
    tiny,
)

DRAFTERS: dict[str, Callable[[], Drafter | None]] = {
    "plain": lambda: None,
    "lookup": Lookup,
    "recycle": Recycle,
    "recycle, prompt seeded": lambda: Recycle(seed_prompt=True),
    "another model": lambda: DraftModel(SimpleNamespace(decoder=decoder(seed=1))),
    "the same model": lambda: DraftModel(SimpleNamespace(decoder=decoder())),
}
drafted = pytest.mark.parametrize("name", DRAFTERS)


def theirs(arguments: dict[str, Any], family: str = "llama") -> Any:
    model, _ = tiny(family)
    return model.generate(**{"do_sample": False, "pad_token_id": 0, **arguments})


def oracle(arguments: dict[str, Any]) -> Oracle:
    """A drafter that knows the greedy text of each (unpadded) prompt."""
    texts = theirs({"input_ids": arguments["input_ids"], "attention_mask": arguments["attention_mask"]} | LONG)
    masks = arguments["attention_mask"].tolist()
    return Oracle(tuple(tuple(row[mask.index(1) :]) for row, mask in zip(texts.tolist(), masks, strict=True)))


LONG = {"max_new_tokens": 30}


def all_slots_free(made: Generator) -> bool:
    return len(made.decoder.store.free) == len(made.decoder.store.lengths)


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
    made.generate(**arguments, max_new_tokens=26)
    assert made.stats["steps"] == 5  # one token from the prompt, then four drafted and one more in each step
    assert made.stats["tokens_per_step"] == 5.0
    assert (made.stats["new_tokens"], made.stats["accepted"], made.stats["drafted"]) == (26, 20, 25)


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
    letters = [chr(0x4E00 + index) for index in range(131)]
    words = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token=letters[0]))
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


class Recorder:
    def __init__(self, fail_after: int | None = None) -> None:
        self.puts: list[Tensor] = []
        self.ended = 0
        self.fail_after = fail_after

    def put(self, value: Tensor) -> None:
        self.puts.append(value)
        if len(self.puts) == self.fail_after:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended += 1


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


@pytest.mark.parametrize("name", ["plain", "lookup", "another model"])
def test_an_interrupted_call_leaves_the_model_usable(name: str) -> None:
    arguments = prompts(6) | {"max_new_tokens": 20}
    drafter = DRAFTERS[name]()
    made = generator(drafter)
    with pytest.raises(KeyboardInterrupt):
        made.generate(**arguments, streamer=Recorder(fail_after=8))
    assert all_slots_free(made)
    if isinstance(drafter, DraftModel):
        own = drafter.other.decoder.store
        assert len(own.free) == len(own.lengths)
    assert torch.equal(made.generate(**arguments), theirs(arguments))


def test_a_call_interrupted_inside_the_model_leaves_it_usable() -> None:
    made = generator()
    executable, calls = made.decoder.executable, []

    def failing(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return executable(*inputs)

    made.decoder.executable = failing  # type: ignore[assignment]
    arguments = prompts(6, 3) | {"max_new_tokens": 9}
    with pytest.raises(KeyboardInterrupt):
        made.generate(**arguments)
    assert all_slots_free(made)
    assert torch.equal(made.generate(**arguments), theirs(arguments))


def test_a_drafter_is_told_the_end_of_every_request_that_it_was_told_the_beginning_of() -> None:
    arguments = prompts(6, 3)
    drafting = oracle(arguments).open(None, None)  # type: ignore[arg-type]

    @dataclass(frozen=True)
    class Held(Drafter):
        def open(self, target: object, policy: object) -> Any:
            return drafting

    def fail(ids: Tensor, scores: object) -> bool:
        if ids.shape[1] == 12:
            raise RuntimeError("a broken criterion")
        return False

    made = generator(Held())
    with pytest.raises(RuntimeError, match="broken"):
        made.generate(**arguments, max_new_tokens=20, stopping_criteria=StoppingCriteriaList([fail]))
    assert (drafting.begun, drafting.ended) == (2, 2)
    made.generate(**arguments, max_new_tokens=4)
    assert (drafting.begun, drafting.ended) == (4, 4)


def test_a_drafter_that_proposes_what_cannot_be_run_is_named() -> None:
    for text in (tuple(range(30)), (*prompts(6)["input_ids"][0].tolist(), 999, 999)):
        @dataclass(frozen=True)
        class Broken(Drafter):
            def open(self, target: object, policy: object) -> Any:
                drafting = Oracle((text,)).open(None, None)  # type: ignore[arg-type]
                tree = DraftTree([999] if len(text) < 30 else [5] * 20, [-1] if len(text) < 30 else [-1] * 20)
                drafting.propose = lambda contexts, budgets: [tree]  # type: ignore[method-assign]
                return drafting

        made = generator(Broken())
        with pytest.raises(GenerationError, match="cannot be verified"):
            made.generate(**prompts(6), max_new_tokens=9)
        assert all_slots_free(made)


def test_nan_logits_are_named_by_sequence_and_token() -> None:
    table = torch.zeros(6, 6)
    table[torch.arange(6), (torch.arange(6) + 1) % 6] = 5.0
    table[4] = math.nan
    made = bigram_generator(table)
    ids = torch.tensor([[0, 0], [1, 2]])
    with pytest.raises(GenerationError) as error:
        made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    assert "found: NaN" in str(error.value)
    assert "sequence 1, new token 3, position 4" in str(error.value)
    assert all_slots_free(made)


@pytest.mark.parametrize("options", [{"do_sample": True}, {"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 3}])
def test_nan_logits_are_named_under_sampling_and_processors_too(options: dict[str, Any]) -> None:
    table = torch.full((6, 6), math.nan)
    with pytest.raises(GenerationError, match="sequence 0, new token 1"):
        bigram_generator(table).generate(torch.tensor([[3, 4]]), max_new_tokens=5, **options)


def test_remove_invalid_values_survives_nan_logits() -> None:
    table = torch.zeros(6, 6)
    table[:, 2] = math.nan
    out = bigram_generator(table).generate(torch.tensor([[3, 4]]), max_new_tokens=3, remove_invalid_values=True)
    assert out.tolist() == [[3, 4, 0, 0, 0]]


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


SEEDED = {"do_sample": True, "max_new_tokens": 12}


@drafted
def test_the_same_seed_gives_the_same_text_alone_in_company_and_with_any_drafter(name: str) -> None:
    batch = prompts(7, 1, 4)
    drafter = DRAFTERS[name]()
    reference = generator().generate(**batch, **SEEDED, seed=[11, 12, 13])
    together = generator(drafter).generate(**batch, **SEEDED, seed=[11, 12, 13])
    assert torch.equal(together, reference)
    for row, length in enumerate((7, 1, 4)):
        alone = generator(drafter).generate(batch["input_ids"][row : row + 1, 7 - length :], **SEEDED, seed=11 + row)
        assert torch.equal(alone[0, length:], reference[row, 7:])


def test_another_seed_gives_another_text_and_torchs_seed_counts() -> None:
    batch, made = prompts(7), generator()
    assert not torch.equal(made.generate(**batch, **SEEDED, seed=1), made.generate(**batch, **SEEDED, seed=2))
    torch.manual_seed(0)
    first = made.generate(**batch, **SEEDED)
    torch.manual_seed(0)
    assert torch.equal(made.generate(**batch, **SEEDED), first)


def test_top_k_top_p_and_min_p_bound_what_is_sampled() -> None:
    batch, made = prompts(7), generator(Lookup())
    greedy = made.generate(**batch, **LONG)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert torch.equal(made.generate(**batch, **LONG, do_sample=True, seed=5, **options), greedy)


VOCABULARY, NEW, SAMPLES = 4, 3, 3000


def tables() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    target, other = torch.randn(2, VOCABULARY, VOCABULARY, generator=source)
    return target, target + other


def chi_square(made: Generator, target: Tensor) -> float:
    """Of `SAMPLES` texts against the exact distribution over all texts."""
    ids = torch.ones(1, 1, dtype=torch.int64)
    out = made.generate(ids, do_sample=True, top_k=0, max_new_tokens=NEW, num_return_sequences=SAMPLES, seed=3)
    counts = Counter(map(tuple, out[:, 1:].tolist()))
    law = target.double().softmax(-1)
    total = 0.0
    for text in product(range(VOCABULARY), repeat=NEW):
        expected = SAMPLES * math.prod(float(law[a, b]) for a, b in zip((1, *text), text, strict=False))
        total += (counts[text] - expected) ** 2 / expected
    return total


BOUND = 126.0
"""The chi-square distribution of 63 degrees of freedom exceeds it once in 250 000 times."""


@dataclass(frozen=True)
class Redraws(SampleAndMatch):
    """Planted: a sample that is not in the tree is drawn again."""

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        path, _ = super().verify(tree, rows, uniforms, position)
        token = draw(rows.distribution(path[-1] + 1 if path else 0), uniforms.uniform("resample", position + len(path)))
        return path, token


@dataclass(frozen=True)
class WithoutResidual(Leviathan):
    """Planted: after a rejection it draws from p in the place of the residual."""

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        path, token = super().verify(tree, rows, uniforms, position)
        if len(path) < len(tree):
            token = draw(rows.distribution(len(path)), uniforms.uniform("resample", position + len(path)))
        return path, token


@pytest.mark.parametrize(
    ("verifier", "sample", "right"),
    [
        (None, False, True),
        (SampleAndMatch(), True, True),
        (Leviathan(), True, True),
        (Redraws(), False, False),
        (WithoutResidual(), True, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Verifier) else str(value),
)
def test_sampled_texts_follow_the_targets_distribution(verifier: Verifier | None, sample: bool, right: bool) -> None:
    target, other = tables()
    drafter = DraftModel(SimpleNamespace(decoder=bigram(other)), sample=sample)
    policy = Chain() if sample else BestFirst()
    made = bigram_generator(target, drafter, policy=policy, controller=Always(3), verifier=verifier)
    assert (chi_square(made, target) < BOUND) == right
    assert 0 < made.stats["accepted"] < made.stats["drafted"]


def test_plain_sampling_follows_the_targets_distribution() -> None:
    target, other = tables()
    assert chi_square(bigram_generator(target), target) < BOUND < chi_square(bigram_generator(other), target)


def test_a_verifier_for_sampling_leaves_greedy_decoding_to_the_greedy_walk() -> None:
    drafter = DraftModel(SimpleNamespace(decoder=decoder()), sample=True)
    made = generator(drafter, policy=Chain(), verifier=Leviathan())
    arguments = prompts(6) | LONG
    assert torch.equal(made.generate(**arguments), theirs(arguments))


def test_a_verifier_that_would_change_the_output_is_refused() -> None:
    with pytest.raises(PlanError, match="not lossless for drafter Lookup"):
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
