"""How far logits may move under a change that is exact on paper: the one table of tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}
"""Dtype of the weights -> largest difference between two logits of one token, as a fraction of the largest logit.

An exact pass may reorder additions, and the rounding of one layer is amplified by the next. Over tiny random models of
26 families the largest is 2e-15 in float64, 1e-6 in float32 and 1e-3 in float16; the rest is room for deep models.
"""


def difference(before: Tensor, after: Tensor) -> float:
    """The largest difference between logits [..., vocabulary], as a fraction of the largest logit in `before`.

    Infinite where shapes differ or where one side has a value that is not finite and the other has not.
    """
    if before.shape != after.shape:
        return float("inf")
    if not before.numel():
        return 0.0
    same = (before == after) | (before.isnan() & after.isnan())
    gap = torch.where(same, 0.0, (before - after).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf).max().item()
    return gap / max(finite_maximum(before), torch.finfo(before.dtype).tiny)


def finite_maximum(values: Tensor) -> float:
    """The largest finite absolute value."""
    return values.abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).max().item()


def tolerance_of(dtype: torch.dtype) -> float:
    """The table's entry; that of float32 for a dtype that is not in it."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.float32])
