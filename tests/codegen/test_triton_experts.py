"""The experts of a mixture as Triton, interpreted on the CPU: against float64, in any company, and whole models.

As in test_triton.py what is interpreted runs in one process of its own, this file as a program, which prints what it
measured; that the kernels compile for GPUs is tested there.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.codegen.triton import device_experts
from graft.codegen.triton.library import Launch, load, print_code
from graft.codegen.triton.matmul import tiling
from tests.codegen.experts import (
    BIASED,
    COUNT,
    DEPTH,
    DTYPES,
    EXPERTS,
    KINDS,
    OUTPUTS,
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
from tests.codegen.interpreted import interpret
from tests.families import build

TAKEN = tuple(dtype for dtype in DTYPES if dtype != torch.float64)
Key = tuple[Any, ...]
"""Dtype, kind, and whether the weights are stored transposed, of a product; of a choice its dtype."""


@functools.cache
def launches() -> tuple[dict[Key, Launch], Any]:
    """The kernels, and the module that they are in."""
    kernels: dict[Key, Any] = {(dtype, kind, False): product(dtype, kind) for dtype in TAKEN for kind in KINDS}
    kernels |= {(dtype, BIASED, True): product(dtype, BIASED, transposed=True) for dtype in TAKEN}
    kernels |= {(dtype,): choice(dtype) for dtype in TAKEN}
    code = print_code(tuple(kernels.values()))
    return dict(zip(kernels, code.launches, strict=True)), load(code.source)


def run(key: tuple[Any, ...], rows: int, **tensors: Any) -> None:
    """Run one kernel over so many rows, on tensors by the names in its arguments."""
    found, module = launches()
    printed = found[key].printed
    tensors = {name.replace("_of_", " "): value for name, value in tensors.items()} | {"rows N": rows}
    getattr(module, found[key].function)[printed.grid.programs(rows)](*(tensors[name] for name in printed.arguments))


def multiply(
    key: tuple[Any, ...], x: Tensor, index: Tensor, absent: int = 0, weights: Tensor | None = None
) -> Tensor:
    """[rows, slots, outputs]; the last `absent` rows are those of no sequence."""
    dtype, rows = key[0], len(x)
    own, bias = parameters(dtype)
    weights = own if weights is None else weights
    out = torch.full((rows, SLOTS, OUTPUTS), 77.0, dtype=dtype)
    sequences = torch.arange(rows).where(torch.arange(rows) < rows - absent, -1)
    given = {"weight_of_experts": weights, "transposed_of_experts": weights.mT.contiguous()}
    run(key, rows, x=x, index=index, out=out, bias_of_bias=bias, sequences=sequences, **given)
    return out


@contextmanager
def changed(module: Any, name: str, value: Any) -> Iterator[None]:
    """Something of a module is another thing."""
    before = getattr(module, name)
    setattr(module, name, value)
    yield
    setattr(module, name, before)


def measure_products() -> dict[str, float]:
    """How far products are from float64, in parts of what their dtype is allowed."""
    found = {}
    for dtype, kind, transposed in (key for key in launches()[0] if len(key) > 1):
        x, index = inputs(dtype, kind, 6, seed=1)
        expected = reference(dtype, kind, x, index)
        apart = (multiply((dtype, kind, transposed), x, index).double() - expected).abs().max()
        found[f"{dtype} {kind} {transposed}"] = float(apart / expected.abs().max()) / DTYPES[dtype]
    return found


def measure_company() -> dict[str, bool]:
    """Whether a row's bits are the same in any order and number of rows, whichever experts they share; those of the
    most rows are so far apart that they are not found in one go."""
    found = {}
    for dtype, kind, experts, rows in zip(TAKEN, KINDS, (1, 2, EXPERTS), (22, 22, 40), strict=True):
        key = dtype, kind, False
        x, index = inputs(dtype, kind, rows, seed=experts, most=experts)
        everyone = multiply(key, x, index)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        found[f"{key} in another order"] = torch.equal(multiply(key, x[order], index[order]), everyone[order])
        some = [0, rows // 2, rows - 1]
        alone = torch.cat([multiply(key, x[[row]], index[[row]]) for row in some])
        found[f"{key} alone"] = torch.equal(alone, everyone[some])
        with changed(device_experts, "REACH", device_experts.LOOKED_AT):
            found[f"{key} looked for in short reach"] = torch.equal(multiply(key, x, index), everyone)
    return found


def measure_reading() -> dict[str, list[int]]:
    """How often a matrix is read, beside how often it has to be: once for as many slots as are multiplied together, of
    those that chose it within reach."""
    module, key, read = launches()[1], (torch.float32, KINDS[0], False), list[int]()
    original, most = module.multiply, device_experts.CHOSEN.value
    x, index = inputs(*key[:2], 25, seed=3, most=3)

    def counted(*given: Any) -> Any:
        read.append(int(given[2].handle.data.item()))
        return original(*given)

    def reading(reach: int) -> list[int]:
        read.clear()
        with changed(module, "multiply", counted):
            multiply(key, x, index)
        near = [part.tolist() for part in index.flatten().split(reach)]
        needed = sum(-(-part.count(expert) // most) for part in near for expert in range(EXPERTS))
        return [len(read), needed * -(-OUTPUTS // tiling(((0, OUTPUTS),), DEPTH, 4).outputs), len(set(read)), 3]

    found = {"far": reading(device_experts.REACH.value)}
    with changed(device_experts, "REACH", device_experts.LOOKED_AT):
        return found | {"short": reading(device_experts.LOOKED_AT.value)}


def measure_none() -> dict[str, bool]:
    """What slots without an expert get, and rows of no sequence; whether weights that nobody chose matter."""
    found = {}
    for kind in KINDS:
        key = torch.bfloat16, kind, False
        x, index = inputs(torch.bfloat16, kind, 8, seed=5, least=-2, most=EXPERTS + 3)
        chosen = (index >= 0) & (index < EXPERTS)
        assert chosen.any() and not chosen.all()
        ours, full = multiply(key, x, index), multiply(key, x, index.clamp(0, EXPERTS - 1))
        found[f"{kind}: none"] = not ours[~chosen].any() and torch.equal(ours[chosen], full[chosen])
        some = multiply(key, x, index, absent=3)
        found[f"{kind}: absent"] = not some[-3:].any() and torch.equal(some[:-3], ours[:-3])
        spoilt = parameters(torch.bfloat16)[0].clone()
        spoilt[2] = math.nan
        others = (index != 2).all(1)
        found[f"{kind}: not chosen"] = torch.equal(multiply(key, x, index, weights=spoilt)[others], ours[others])
    return found


def measure_top() -> dict[str, bool]:
    """Whether the largest come in order, of equals the first."""
    found = {}
    for dtype in TAKEN:
        x = numbers(11, 2, WIDTH, dtype=dtype)
        x[3:6] = (x[3:6] * 2).round() / 2
        x[6, 0, 9], x[7], x[8], x[9, 1, 5:] = math.nan, math.nan, -math.inf, -math.inf
        values, ids = torch.full((11, 2, COUNT), 77.0, dtype=dtype), torch.full((11, 2, COUNT), -7)
        run((dtype,), 11, x=x, values=values, ids=ids)
        expected = largest(x)
        same = torch.equal(values.nan_to_num(nan=9e4), x.gather(-1, expected).nan_to_num(nan=9e4))
        found[str(dtype)] = torch.equal(ids, expected) and same
    return found


def measure_model() -> dict[str, bool]:
    """Whether a mixture that drafts says what transformers says, and whether ATen runs any of it."""
    model, prompt = build("mixtral", num_hidden_layers=1), torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    plan = graft.Plan(draft=[graft.Lookup()], controller=graft.FixedBudget())
    compiled = graft.compile(model, plan, backend="triton")
    said = [one.generate(prompt, max_new_tokens=5, do_sample=False) for one in (model, compiled)]
    kinds = [kernel.name.partition("_")[0] for kernel in compiled.program["forward"].kernels]
    ours = kinds.count("experts") == 2 and kinds.count("top") == 1 and "aten" not in kinds
    return {"text": torch.equal(*said), "ours": ours}


def main() -> None:
    measures = {
        "products": measure_products,
        "company": measure_company,
        "reading": measure_reading,
        "none": measure_none,
        "top": measure_top,
        "model": measure_model,
    }
    print(json.dumps({name: measure() for name, measure in measures.items()}))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `main` measures."""
    return interpret("tests.codegen.test_triton_experts", tmp_path_factory.mktemp("cache"))


def test_slots_are_multiplied_with_the_experts_that_they_chose(interpreted: dict[str, Any]) -> None:
    found = interpreted["products"]
    assert len(found) == len(TAKEN) * (len(KINDS) + 1) and max(found.values()) <= 1, found


def test_a_slot_has_the_same_bits_in_any_company(interpreted: dict[str, Any]) -> None:
    assert interpreted["company"] == dict.fromkeys(interpreted["company"], True)


def test_a_matrix_is_read_once_for_all_slots_of_a_tile_that_chose_it(interpreted: dict[str, Any]) -> None:
    for read, needed, matrices, chosen in interpreted["reading"].values():
        assert read == needed and matrices == chosen
    assert interpreted["reading"]["short"] > interpreted["reading"]["far"]


def test_slots_without_an_expert_get_zeros_and_no_other_slot_changes(interpreted: dict[str, Any]) -> None:
    assert interpreted["none"] == dict.fromkeys(interpreted["none"], True)


def test_the_largest_come_in_order_and_of_equals_the_first(interpreted: dict[str, Any]) -> None:
    assert interpreted["top"] == dict.fromkeys(interpreted["top"], True)


def test_a_mixture_says_what_transformers_says(interpreted: dict[str, Any]) -> None:
    assert interpreted["model"] == dict.fromkeys(interpreted["model"], True)


if __name__ == "__main__":
    main()
