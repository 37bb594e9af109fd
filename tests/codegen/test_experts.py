"""Products with chosen experts as generated C++: against float64, in any company, and what is not read."""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import mmap
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graft.codegen.cpp.isa import Isa, runnable
from graft.codegen.cpp.library import Code, load, print_code
from graft.codegen.cpp.memory import pack, restore, unpack
from graft.compiler.ops import expert_linear
from tests.codegen.experts import (
    BIASED,
    COUNT,
    DTYPES,
    EXPERTS,
    KINDS,
    OUTPUTS,
    SHARED,
    SLOTS,
    WIDTH,
    choice,
    inputs,
    largest,
    numbers,
    parameters,
    product,
    reference,
)
from tests.codegen.rows import run_kernel


@functools.cache
def code() -> Code:
    """For every dtype products of each kind, then choices of the largest."""
    kernels = [product(dtype, kind) for dtype in DTYPES for kind in KINDS]
    return print_code((*kernels, *(choice(dtype) for dtype in DTYPES)), frozenset(), {})


def run(isa: Isa, number: int, rows: int, threads: int = 2, **tensors: Tensor) -> None:
    run_kernel(code(), load(code().source, isa)[0], number, tensors, rows, threads)


def multiply(isa: Isa, dtype: torch.dtype, kind: str, x: Tensor, index: Tensor, threads: int = 2) -> Tensor:
    """[rows, slots, outputs] of the experts of that dtype."""
    weights, bias = parameters(dtype)
    out = torch.full((len(x), SLOTS, OUTPUTS), 77.0, dtype=dtype)
    given_tensors = {"x": x, "index": index, "out": out, "weight experts": pack(weights), "bias bias": bias}
    run(isa, list(DTYPES).index(dtype) * len(KINDS) + KINDS.index(kind), len(x), threads, **given_tensors)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", runnable(), ids=lambda isa: isa.name)
def test_slots_are_multiplied_with_the_experts_that_they_chose(isa: Isa, dtype: torch.dtype) -> None:
    for kind in KINDS:
        for rows in (1, 2, 40):
            x, index = inputs(dtype, kind, rows, seed=rows)
            expected = reference(dtype, kind, x, index)
            error = (multiply(isa, dtype, kind, x, index).double() - expected).abs().max() / expected.abs().max()
            assert error <= DTYPES[dtype]


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), kind=st.sampled_from(KINDS), seed=st.integers(0, 999),
    rows=st.integers(2, 70), threads=st.integers(1, 3), experts=st.integers(1, EXPERTS),
    isa=st.sampled_from(runnable()),
)  # fmt: skip
def test_a_slot_has_the_same_bits_in_any_company(
    dtype: torch.dtype, kind: str, seed: int, rows: int, threads: int, experts: int, isa: Isa
) -> None:
    x, index = inputs(dtype, kind, rows, seed, most=experts)
    together = multiply(isa, dtype, kind, x, index, threads)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(multiply(isa, dtype, kind, x[order], index[order]), together[order])
    alone = [multiply(isa, dtype, kind, x[[row]], index[[row]], threads=1) for row in order[:3].tolist()]
    assert torch.equal(torch.cat(alone), together[order[:3]])


def test_slots_without_an_expert_get_zeros_and_no_other_slot_changes() -> None:
    isa = runnable()[0]
    for kind in KINDS:
        x, index = inputs(torch.float32, kind, 20, seed=5, least=-2, most=EXPERTS + 3)
        chosen = (index >= 0) & (index < EXPERTS)
        assert chosen.any() and not chosen.all()
        found = multiply(isa, torch.float32, kind, x, index)
        assert torch.equal(found[~chosen], torch.zeros_like(found[~chosen]))
        full = multiply(isa, torch.float32, kind, x, index.clamp(0, EXPERTS - 1))
        assert torch.equal(found[chosen], full[chosen])


def test_experts_that_no_slot_chose_are_not_read() -> None:
    # Their panels lie in pages that cannot be read; a child process tries, so that a mistake ends that alone.
    isa, page = runnable()[0], mmap.PAGESIZE
    panels = pack(parameters(torch.float32)[0])
    size = -(-panels[0].nbytes // page) * page
    held = mmap.mmap(-1, 3 * size)
    start = ctypes.addressof(ctypes.c_char.from_buffer(held))
    # Expert 1 begins where its page does; 0 lies before it, 2 behind it in pages of their own.
    first = start + size - panels[0].nbytes
    ctypes.memmove(first, panels.data_ptr(), 3 * panels[0].nbytes)
    libc = ctypes.CDLL(None, use_errno=True)
    x, index = inputs(torch.float32, SHARED, 9, seed=0)
    out = torch.zeros(9, SLOTS, OUTPUTS)
    code(), load(code().source, isa)
    for expert, readable in ((0, True), (1, False)):
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(2 * size), 0)
            given_tensors = {"x": x, "index": index * 0 + expert, "out": out}
            number = KINDS.index(SHARED)
            library = load(code().source, isa)[0]
            run_kernel(code(), library, number, given_tensors, 9, 1, {"weight experts": first})
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert (status == 0) is readable


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_are_packed_each_by_itself_and_back(dtype: torch.dtype) -> None:
    weights = parameters(dtype)[0]
    panels = pack(weights)
    assert torch.equal(panels[2], pack(weights[2]))
    assert torch.equal(unpack(panels, weights.shape), weights)
    module = nn.Module()
    module.register_buffer("transposed", torch.empty(weights.shape, dtype=dtype, device="meta"))
    restore(module, {"transposed": panels})
    assert torch.equal(module.transposed, weights)


@pytest.mark.parametrize("isa", runnable(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_come_in_order_and_of_equals_the_first(dtype: torch.dtype, isa: Isa) -> None:
    x = numbers(11, 2, WIDTH, dtype=dtype)
    x[3:6] = (x[3:6] * 2).round() / 2
    x[6, 0, 9], x[7] = torch.nan, torch.nan
    ids = torch.full((11, 2, COUNT), -7)
    values = torch.zeros(11, 2, COUNT, dtype=dtype)
    run(isa, len(DTYPES) * len(KINDS) + list(DTYPES).index(dtype), 11, x=x, values=values, ids=ids)
    expected = largest(x)
    assert torch.equal(ids, expected)
    assert torch.equal(values.nan_to_num(nan=9e4), x.gather(-1, expected).nan_to_num(nan=9e4))


def test_the_operator_means_a_matrix_for_each_slot() -> None:
    for kind in KINDS:
        x, index = inputs(torch.float64, kind, 7, seed=1, least=-1, most=EXPERTS + 1)
        weights, bias = parameters(torch.float64)
        found = expert_linear(x, weights, index, bias if kind == BIASED else None)
        torch.testing.assert_close(found, reference(torch.float64, kind, x, index))
