"""One request's view of a step: processed rows, distributions, best tokens, and errors that name the place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

from graft.compiler.drafting import Context, DraftTree
from graft.compiler.errors import GenerationError
from graft.runtime.request import Request, Sampling, TargetRows
from graft.runtime.top_tokens import argmax_rows, top_rows

TREE = DraftTree([4, 5, 6], [-1, 0, -1], [0.5] * 3)


def request(*processors: object, sample: bool = False) -> Request:
    sampling = Sampling(3, 2, LogitsProcessorList(processors), sample, 0)
    return Request(3, Context([7, 8], 2), sampling, 99, 0)


def view(logits: Tensor, *processors: object, sample: bool = False, first: int = 0) -> TargetRows:
    plain = not processors and not sample
    return TargetRows(request(*processors, sample=sample), TREE, logits, first, argmax_rows(logits) if plain else None)


def test_the_root_and_the_nodes_are_rows_behind_each_other() -> None:
    logits = torch.eye(10)[[9, 1, 2, 3, 4]]
    rows = view(logits, first=1)
    assert [rows.argmax(row) for row in range(4)] == [1, 2, 3, 4]
    assert [rows.position(row) for row in range(4)] == [2, 3, 4, 3]


def test_processors_see_the_path_to_the_row_and_only_rows_asked_for() -> None:
    seen: list[list[int]] = []

    def record(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids[0].tolist())
        scores[:, 0] = 9.0
        return scores

    logits = torch.zeros(4, 10)
    rows = view(logits, record)
    assert rows.argmax(2) == 0
    assert rows.argmax(2) == 0
    assert rows.argmax(3) == 0
    assert seen == [[7, 8, 4, 5], [7, 8, 6]]
    assert not logits.any()


def test_the_prefix_follows_a_growing_text_and_is_a_fresh_tensor() -> None:
    sampling = request().sampling
    tokens = [1, 2]
    first = sampling.prefix(tokens, [9], torch.device("cpu"))
    tokens += range(40)
    second = sampling.prefix(tokens, [], torch.device("cpu"))
    first.zero_()
    assert second[0].tolist() == tokens
    assert sampling.prefix(tokens, [5, 6], torch.device("cpu"))[0].tolist() == [*tokens, 5, 6]


def test_a_repetition_penalty_on_a_node_counts_drafted_tokens() -> None:
    logits = torch.ones(4, 10)
    rows = view(logits, RepetitionPenaltyLogitsProcessor(2.0))
    assert rows.scores(2)[0].tolist() == [1, 1, 1, 1, 0.5, 0.5, 1, 0.5, 0.5, 1]


@given(st.integers(1, 12), st.integers(0, 1000))
def test_a_distribution_is_the_float64_softmax_of_processed_logits(k: int, seed: int) -> None:
    logits = 4 * torch.randn(4, 12, generator=torch.Generator().manual_seed(seed))
    rows = view(logits, TopKLogitsWarper(k), sample=True)
    processed = TopKLogitsWarper(k)(torch.zeros(1, 1, dtype=torch.int64), logits[2:3])
    found = rows.distribution(2)
    assert found.dtype == np.float64
    assert found.sum() == pytest.approx(1.0, abs=1e-12)
    assert np.allclose(found, processed[0].double().softmax(-1).numpy(), atol=1e-12)
    assert (found > 0).sum() >= k


def test_greedy_decoding_puts_the_whole_distribution_on_the_best_token() -> None:
    rows = view(torch.tensor([[0.0, 2.0, 2.0]] * 4))
    assert rows.distribution(0).tolist() == [0, 1, 0]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize(("value", "found"), [(math.nan, "NaN"), (-math.inf, "only -inf")])
def test_a_row_without_usable_logits_is_named(value: float, found: str, sample: bool) -> None:
    logits = torch.zeros(4, 10)
    logits[2] = value
    rows = view(logits, sample=sample)
    rows.distribution(0)
    with pytest.raises(GenerationError) as error:
        rows.distribution(2) if sample else rows.argmax(2)
    assert f"found: {found}" in str(error.value)
    assert "sequence 3, new token 3, position 4" in str(error.value)


def test_a_single_nan_is_enough_and_rows_not_asked_for_do_not_matter() -> None:
    logits = torch.randn(4, 300)
    logits[1, 200] = math.nan
    for sample in (False, True):
        rows = view(logits, sample=sample)
        rows.distribution(3)
        with pytest.raises(GenerationError, match="new token 2"):
            rows.distribution(1)


def test_an_infinite_logit_cannot_be_sampled_from() -> None:
    logits = torch.zeros(4, 10)
    logits[0, 3] = math.inf
    assert view(logits).argmax(0) == 3
    with pytest.raises(GenerationError, match="found: \\+inf"):
        view(logits, sample=True).distribution(0)


@given(st.integers(1, 5), st.sampled_from([5, 127, 128, 129, 400, 1024]), st.integers(0, 1000))
def test_the_best_token_is_the_first_of_the_best(rows: int, vocabulary: int, seed: int) -> None:
    logits = torch.randint(0, 4, (rows, vocabulary), generator=torch.Generator().manual_seed(seed)).float()
    tokens, values = argmax_rows(logits)
    assert tokens == [row.index(max(row)) for row in logits.tolist()]
    assert values == logits.amax(-1).tolist()


@given(st.integers(1, 3), st.sampled_from([5, 128, 700, 2048, 2050, 3000]), st.integers(1, 8), st.integers(0, 1000))
def test_the_top_tokens_are_those_of_topk(rows: int, vocabulary: int, count: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    logits = torch.stack([torch.randperm(vocabulary, generator=source) for _ in range(rows)]).float()
    assert top_rows(logits, count).tolist() == logits.topk(min(count, vocabulary)).indices.tolist()
