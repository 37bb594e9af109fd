"""Parameters as the panels that kernels multiply with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from graft.codegen.huge_pages import HugePages
from graft.compiler.errors import LoweringError

PANEL = 32
"""Outputs of a parameter that are stored side by side (include/matmul.h)."""


def pack(weight: Tensor) -> Tensor:
    """A parameter [out, in] as panels [ceil(out / 32), in, 32]; in bfloat16 pairs of inputs, [.., ceil(in / 2), 32, 2].
    Experts [E, out, in] are packed each by itself, one behind the other.

    What a panel has beyond the parameter is zero.
    """
    if weight.dim() == 3:
        return torch.stack([pack(one) for one in weight])
    out, depth = weight.shape
    paired = weight.dtype == torch.bfloat16
    panels, steps = -(-out // PANEL), -(-depth // 2) * 2 if paired else depth
    if (out, depth) != (panels * PANEL, steps):
        padded = weight.new_zeros(panels * PANEL, steps)
        padded[:out, :depth] = weight
        weight = padded
    if paired:
        return weight.view(panels, PANEL, steps // 2, 2).permute(0, 2, 1, 3).contiguous()
    return weight.view(panels, PANEL, steps).permute(0, 2, 1).contiguous()


def pack_all(weights: Sequence[Tensor]) -> list[Tensor]:
    """The panels of parameters, side by side in large pages."""
    shapes = [panel_shape(weight.shape, weight.dtype) for weight in weights]
    sizes = (math.prod(shape) * weight.dtype.itemsize for shape, weight in zip(shapes, weights, strict=True))
    room = HugePages(sum(sizes), len(weights))
    return [room.copy(pack(weight)) for weight in weights]


def panel_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of `pack`'s result for a parameter [out, in], or experts [E, out, in]."""
    *experts, out, depth = shape
    panels = -(-out // PANEL)
    return (*experts, panels, *((-(-depth // 2), PANEL, 2) if dtype == torch.bfloat16 else (depth, PANEL)))


def unpack(panels: Tensor, shape: Sequence[int]) -> Tensor:
    """The parameter of that shape that `pack` made the panels of."""
    if len(shape) == 3:
        return torch.stack([unpack(one, shape[1:]) for one in panels])
    out, depth = shape
    rows = panels.permute(0, 2, 1, 3) if panels.dim() == 4 else panels.permute(0, 2, 1)
    return rows.reshape(panels.shape[0] * PANEL, -1)[:out, :depth].contiguous()


def check_panels(panels: Tensor, parameter: Tensor, name: str) -> None:
    """Raise LoweringError unless these can be the panels of a parameter of that shape and dtype."""
    expected = panel_shape(parameter.shape, parameter.dtype)
    if tuple(panels.shape) != expected or panels.dtype != parameter.dtype or not panels.is_contiguous():
        raise LoweringError(
            "a packed parameter has the wrong form",
            expected=f"{parameter.dtype} {list(expected)}",
            found=f"{panels.dtype} {list(panels.shape)}",
            where=name,
        )


def restore(weights: nn.Module, panels: Mapping[str, Tensor]) -> None:
    """Unpack the panels of parameters, by name, into the places where these stand without storage."""
    found: dict[int, nn.Parameter] = {}
    for name, packed in panels.items():
        parent, _, last = name.rpartition(".")
        module = weights.get_submodule(parent)
        # A transposed view of a parameter is a buffer.
        held = module._parameters if last in module._parameters else module._buffers
        parameter = held[last]
        if parameter is not None and parameter.is_meta:
            check_panels(packed, parameter, name)
            if id(packed) not in found:
                found[id(packed)] = nn.Parameter(unpack(packed, parameter.shape), requires_grad=False)
            held[last] = found[id(packed)]
