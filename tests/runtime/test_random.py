"""Counter-based random numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.compiler.errors import GenerationError
from graft.runtime.random import STREAMS, Streams, row_seeds

SEEDS = st.integers(0, 2**64 - 1)
PLACES = st.tuples(st.sampled_from(sorted(STREAMS)), st.integers(0, 2**40))


@given(SEEDS, st.lists(PLACES, min_size=1, max_size=8))
def test_a_number_is_the_same_in_whatever_order_numbers_are_asked_for(seed: int, places: list[tuple[str, int]]) -> None:
    alone = [Streams(seed).uniform(*place) for place in places]
    together = Streams(seed)
    assert [together.uniform(*place) for place in reversed(places)] == alone[::-1]
    assert all(0.0 <= number < 1.0 for number in alone)


def test_streams_seeds_and_counters_share_no_number() -> None:
    numbers = [Streams(seed).uniform(name, count) for seed in (0, 1, 2**63) for name in STREAMS for count in range(500)]
    assert len(set(numbers)) == len(numbers)


def test_a_number_is_a_word_of_philox_keyed_by_seed_and_stream() -> None:
    generator = np.random.Generator(np.random.Philox(key=np.array([7, STREAMS["accept"]], dtype=np.uint64)))
    expected = generator.random(200)
    assert [Streams(7).uniform("accept", count) for count in range(200)] == expected.tolist()


def test_numbers_are_uniform() -> None:
    streams = Streams(3)
    for name in STREAMS:
        numbers = np.sort([streams.uniform(name, count) for count in range(20_000)])
        # Kolmogorov-Smirnov: with this seed a fixed figure; a distance above 0.0138 would have probability 1e-3.
        assert np.abs(numbers - (np.arange(20_000) + 0.5) / 20_000).max() < 0.0138


@pytest.mark.parametrize(("stream", "counter"), [("bonus", 0), ("draft", -1)])
def test_an_unknown_stream_or_a_negative_counter_is_refused(stream: str, counter: int) -> None:
    with pytest.raises(GenerationError, match="No such random number"):
        Streams(0).uniform(stream, counter)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_of_more_than_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(GenerationError, match="seed"):
        Streams(seed)


@given(SEEDS, st.integers(1, 20))
def test_rows_get_seeds_of_their_own_that_do_not_depend_on_the_number_of_rows(seed: int, rows: int) -> None:
    seeds = row_seeds(seed, rows)
    assert seeds[0] == seed
    assert len(set(seeds)) == rows
    assert row_seeds(seed, rows + 3)[:rows] == seeds
