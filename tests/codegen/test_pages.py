"""Attention over pages in C++ against its reference meaning, and that a row is the same in any company."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graft.codegen.aten import AtenExecutable
from graft.codegen.cpp.executable import CppExecutable
from graft.codegen.cpp.isa import ISAS, Isa, runnable
from graft.codegen.prediction import zero_states
from graft.compiler.kv.codecs import Affine, DensePages, InPlace, KeyChannels
from graft.compiler.kv.selection import DoubleSparsity, PageBounds, PageMeans
from graft.compiler.program import Function
from graft.compiler.tolerance import difference
from tests.codegen.compiled import TREES
from tests.codegen.functions import call_of
from tests.codegen.pages import Case, Stored, Unread, random_rows, random_stored

HALF = torch.bfloat16
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12, HALF: 1e-2, torch.float16: 2e-3}
FAR, TAIL = (320, 0, 200, 64), (37, 20, 70, 5)
"""Far tokens of every slot: several pages, none, a partly full one, a whole one; and those behind the cut."""


# Every loader with and without a selection, every kind of unit, both axes and all widths of codes, groups of 1, 3, 4
# and 8 query heads and head sizes of 64, 80, 96 and 128 are among them, all of them in either dtype or both.
CASES = (
    Case(DensePages(), group=1, key_dim=96, value_dim=80),
    Case(DensePages(), PageBounds(0.3, least=32), group=8, queries=True, dtype=HALF),
    Case(Affine(), softcap=20.0),
    Case(Affine(), dtype=HALF),
    Case(Affine(2, 8, "token", 32, 64), group=4, key_dim=80, value_dim=80),
    Case(Affine(8, 2, "token", 16, 128), group=4, key_dim=80, value_dim=128, dtype=HALF),
    Case(Affine(8, 2, "channel", 64, 16), group=1, key_dim=96, value_dim=128),
    Case(Affine(2, 8, "channel", 16, 16), group=8, key_dim=128, value_dim=80, dtype=HALF),
    Case(Affine(), PageMeans(0.3, least=32), dtype=HALF),
    Case(KeyChannels(0.5), queries=True),
    Case(KeyChannels(0.4, Affine()), queries=True, dtype=HALF),
    Case(KeyChannels(0.5, Affine(8, 8)), DoubleSparsity(0.3, least=32, channels=0.1), group=1),
    Case(InPlace(), DoubleSparsity(0.25, least=32), dtype=HALF),
    Case(InPlace(), DoubleSparsity(0.25, least=32), group=4, queries=True),
    Case(InPlace(), PageMeans(0.25, least=32, unit=16), group=8),
    Case(InPlace(), PageBounds(0.25, least=32, unit=32), group=1, key_dim=80),
)
OTHER_DTYPES = (Case(Affine(), dtype=torch.float64), Case(Affine(), dtype=torch.float16))
INVARIANT = tuple(CASES[index] for index in (1, 3, 8, 12))


def named(case: Case) -> str:
    parts = [type(case.codec), *([type(case.selection)] if case.selection else [])]
    return " ".join([*(part.__name__ for part in parts), str(case.dtype).removeprefix("torch."), str(case.key_dim)])


@functools.cache
def compiled(case: Case, isa: Isa | None = None, threads: int = 2) -> CppExecutable:
    return CppExecutable(case.function(), isa, threads)


def assert_same(case: Case, executable: CppExecutable, function: Function) -> None:
    """Results and what is written agree with the reference, with trees of rows in three of four slots."""
    stored = random_stored(case, FAR, TAIL)
    inputs, _ = call_of(TREES, stored.lengths.tolist())
    rows = random_rows(case, len(inputs[0]))
    states = [[one.clone() for one in stored.tensors] for _ in range(2)]
    expected = AtenExecutable(function)(*inputs, *rows, *states[0])
    found = executable(*inputs, *rows, *states[1])
    assert difference(expected[1], found[1]) <= LIMITS[case.dtype]
    assert all(map(torch.equal, *states))


@pytest.mark.parametrize("case", (*CASES, *OTHER_DTYPES), ids=named)
def test_attention_over_pages_is_that_of_the_reference(case: Case) -> None:
    executable = compiled(case)
    assert not any(kernel.reason for kernel in executable.kernels)
    assert_same(case, executable, case.function())


@pytest.mark.parametrize(("isa", "index"), [("avx2", 3), ("avx2", 12), ("portable", 3), ("portable", 12)])
def test_other_instruction_sets_read_the_same_pages(isa: str, index: int) -> None:
    if ISAS[isa] not in runnable():
        pytest.skip(f"this machine does not run {isa}")
    assert_same(CASES[index], compiled(CASES[index], ISAS[isa]), CASES[index].function())


def test_the_first_layers_read_everything() -> None:
    case = replace(CASES[12], selection=DoubleSparsity(0.25, least=32, dense_layers=3))
    stored = random_stored(case, FAR, TAIL)
    inputs, _ = call_of(TREES, stored.lengths.tolist())
    rows = random_rows(case, len(inputs[0]))
    found = [compiled(one)(*inputs, *rows, *stored.tensors)[1] for one in (case, CASES[12])]
    assert_same(case, compiled(case), case.function())
    assert difference(*found) > 10 * LIMITS[HALF]


def test_a_codec_without_a_loader_runs_through_aten() -> None:
    for case in (Case(Unread(), dtype=HALF), Case(Unread(), PageMeans(0.3, least=32))):
        executable = CppExecutable(case.function())
        assert [kernel.reason for kernel in executable.kernels if kernel.reason] == ["Unread has no loader"]
        assert executable.prediction is None
        assert_same(case, executable, case.function())


def test_a_step_over_pages_is_predicted() -> None:
    """What is measured is what a call takes: states of zeros that the reference reads, too."""
    for case in (CASES[3], CASES[12]):
        executable = compiled(case)
        seconds = [executable.prediction.seconds(1, context) for context in (64, 4096)]  # type: ignore[union-attr]
        assert 0 < seconds[0] < seconds[1]
        (kv, *_), far = zero_states(case.function().states, 1, 300)
        inputs, _ = call_of([(0, [-1])], [300])
        _, hidden = AtenExecutable(case.function())(*inputs, *random_rows(case, 1), kv, *far)
        assert hidden.isfinite().all()


SLOT, COUNT = 1, 6
"""Where the text lies, and how many tokens of it are decoded."""
COMPANY = (130, 0, 64, 3)


def text(case: Case, far: int) -> tuple[Stored, list[Tensor]]:
    """Slots of which SLOT has so many far tokens, and q, k and v of the tokens that are decoded."""
    lengths = [*COMPANY]
    lengths[SLOT] = far
    return random_stored(case, lengths, (5, 40, 1, 33), seed=far), random_rows(case, COUNT, seed=far + 1)


@functools.cache
def plain(case: Case, far: int) -> Tensor:
    """One token at a time, alone, on one thread."""
    stored, own = text(case, far)
    executable, (kv, lengths, *others) = compiled(case, threads=1), stored.tensors
    found = []
    for done in range(COUNT):
        total, tail = stored.lengths.clone(), lengths.clone()
        total[SLOT] += done
        tail[SLOT] += done
        inputs, _ = call_of([(SLOT, [-1])], total.tolist())
        found.append(executable(*inputs, *(one[done : done + 1] for one in own), kv, tail, *others)[1])
    return torch.cat(found)


@pytest.mark.parametrize("case", INVARIANT, ids=named)
@settings(max_examples=10, deadline=None)
@given(far=st.sampled_from([0, 60, 64, 150, 320]), seed=st.integers(0, 10**6), threads=st.sampled_from([1, 2, 3]))
def test_a_text_is_decoded_to_the_same_bits_in_any_company(case: Case, far: int, seed: int, threads: int) -> None:
    generator, (stored, own) = random.Random(seed), text(case, far)
    executable, (kv, lengths, *others) = compiled(case, threads=threads), stored.tensors
    total, found, done = stored.lengths.clone(), [], 0
    while done < COUNT:
        count = generator.randint(1, COUNT - done)
        parents: list[int] = []  # a tree with the chain of the next tokens in it
        chain: list[int] = []
        while len(chain) < count:
            aside = generator.random() < 0.3
            parents.append(generator.randint(-1, len(parents) - 1) if aside else chain[-1] if chain else -1)
            chain += [] if aside else [len(parents) - 1]
        trees = [(SLOT, parents)]
        for slot in generator.sample([0, 2, 3], generator.randint(0, 3)):
            rows = range(generator.choice([1, 2, 5, 17]))
            trees.append((slot, [generator.randint(-1, row - 1) for row in rows]))
        generator.shuffle(trees)
        inputs, sequences = call_of(trees, total.tolist(), seed)
        at = sequences.index(SLOT) + torch.tensor(chain)
        rows = random_rows(case, len(sequences), seed)
        for all_rows, mine in zip(rows, own, strict=True):
            all_rows[at] = mine[done : done + count]
        found.append(executable(*inputs, *rows, kv, lengths, *others)[1][at])
        place = int(lengths[SLOT])
        kv[:, SLOT, :, place : place + count] = kv[:, SLOT, :, place + torch.tensor(chain)]  # they are committed
        total[SLOT] += count
        lengths[SLOT] += count
        done += count
    assert torch.equal(torch.cat(found), plain(case, far))

