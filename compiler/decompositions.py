"""Which operators are taken apart at capture: norms, so that their statistics become ordinary row-wise nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def decompositions() -> dict[torch._ops.OperatorBase, Callable]:
    """The table given to run_decompositions; everything it does not name stays whole."""
    return {torch.ops.aten.layer_norm.default: layer_norm, torch.ops.aten.rms_norm.default: rms_norm}


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """aten.layer_norm over the last len(shape) dims; statistics in float32 for 16-bit inputs, as ATen computes them."""
    dims = list(range(-len(shape), 0))
    wide = widened(x)
    centred = wide - wide.mean(dims, keepdim=True)
    result = centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    return affine(result, weight, bias).to(x.dtype)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """aten.rms_norm over the last len(shape) dims."""
    dims = list(range(-len(shape), 0))
    wide = widened(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return affine(wide * torch.rsqrt((wide * wide).mean(dims, keepdim=True) + eps), weight, None).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """x in float32 if it is a 16-bit tensor, else x."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x * weight + bias, each where given."""
    x = x * weight if weight is not None else x
    return x + bias if bias is not None else x
