"""Products with chosen experts and choices of the largest, as kernels, and what they compute, for tests of printers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from graft.codegen.kernel_ir import Array, ExpertKernel, TopKernel

EXPERTS, OUTPUTS, DEPTH, SLOTS = 5, 44, 33, 3
"""Panels and pairs of inputs that are not full."""
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-13}
SHARED, OWN, BIASED = "slots share the input", "slots have inputs of their own", "with biases"
KINDS = (SHARED, OWN, BIASED)
WIDTH, COUNT = 37, 6


def product(
    dtype: torch.dtype, kind: str, *, transposed: bool = False, depth: int = DEPTH, outputs: int = OUTPUTS
) -> ExpertKernel:
    """A product with experts, whose weights may be stored transposed."""
    own = kind != SHARED
    x = Array("x", dtype, depth * (SLOTS if own else 1), "N")
    arrays = (x, Array("index", torch.int64, SLOTS, "N"), Array("out", dtype, SLOTS * outputs, "N"))
    bias, sizes = "bias" if kind == BIASED else "", (EXPERTS, SLOTS, depth, outputs, (0, 0), depth if own else 0)
    return ExpertKernel(arrays, (), "experts", bias, *sizes, weight_dtype=dtype, transposed=transposed)


def choice(dtype: torch.dtype) -> TopKernel:
    """The largest of two groups."""
    results = Array("values", dtype, 2 * COUNT, "N"), Array("ids", torch.int64, 2 * COUNT, "N")
    return TopKernel((Array("x", dtype, 2 * WIDTH, "N"), *results), (), 0, 2, WIDTH, COUNT)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@functools.cache
def parameters(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return numbers(EXPERTS, OUTPUTS, DEPTH, seed=1, dtype=dtype), numbers(EXPERTS, OUTPUTS, seed=2, dtype=dtype)


def reference(dtype: torch.dtype, kind: str, x: Tensor, index: Tensor) -> Tensor:
    """Slot by slot in float64."""
    weights, bias = (one.double() for one in parameters(dtype))
    out = torch.zeros(len(x), SLOTS, OUTPUTS, dtype=torch.float64)
    for row in range(len(x)):
        for slot in range(SLOTS):
            expert = int(index[row, slot])
            if 0 <= expert < EXPERTS:
                out[row, slot] = weights[expert] @ x[row, slot if kind != SHARED else 0].double()
                out[row, slot] += bias[expert] if kind == BIASED else 0
    return out


def inputs(dtype: torch.dtype, kind: str, rows: int, seed: int, least: int = 0, most: int = EXPERTS) -> tuple:
    """x [rows, slots or 1, in], and experts from `least` to `most` - 1."""
    index = torch.randint(least, most, (rows, SLOTS), generator=torch.Generator().manual_seed(seed))
    return numbers(rows, SLOTS if kind != SHARED else 1, DEPTH, seed=seed + 3, dtype=dtype), index


def largest(x: Tensor) -> Tensor:
    """Where the COUNT largest stand, of equals the first; NaN is as large as infinity."""
    order = x.double().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return order.sort(dim=-1, descending=True, stable=True).indices[..., :COUNT]
