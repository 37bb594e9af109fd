"""Rotary embeddings whose frequencies depend on the longest position, rewritten per token.

transformers' "dynamic" and "longrope" look at max(position_ids) over the whole batch: a reduction over positions and
sequences, so a token's keys would depend on its neighbours. Here every token uses the frequencies that transformers
uses when that token is the newest one, which is what decoding token by token computes; a transformers prefill beyond
the original length differs, because it gives early tokens the frequencies of the last one.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from graft.compiler.errors import CaptureError

Rotation = tuple[Tensor, Tensor] | Tensor
"""What a rotary module returns: cos and sin, or one complex tensor."""


@contextlib.contextmanager
def per_token_rope(model: nn.Module) -> Iterator[None]:
    """Swap the forward of every rotary module with length-dependent frequencies for the block's duration."""
    swapped = [(path, module) for path, module in model.named_modules() if set(rope_kinds(module)) & GROWING.keys()]
    for path, module in model.named_modules():
        unknown = [kind for kind in rope_kinds(module) if "dynamic" in kind and kind not in GROWING]
        if unknown:
            raise CaptureError("a rope that grows with the sequence has no per-token form", found=unknown, where=path)
    own = [(module, module.__dict__.get("forward")) for _, module in swapped]
    for path, module in swapped:
        module.forward = partial(rope_forward, module, path)
    try:
        yield
    finally:
        for module, forward in own:
            del module.forward
            if forward is not None:  # hooks of other libraries put it there
                module.forward = forward


def rope_kinds(module: nn.Module) -> list[str]:
    """The rope types of a rotary module, one for each of its layer types; empty for any other module."""
    kinds = getattr(module, "rope_type", None)
    return [str(kind) for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]) if kind is not None]


class WithFrequencies:
    """A rotary module seen with other inverse frequencies; everything else is the module's own."""

    def __init__(self, module: nn.Module, name: str, frequencies: Tensor) -> None:
        self.__dict__.update(module=module, name=name, frequencies=frequencies)

    def __getattr__(self, name: str) -> Any:
        return self.frequencies if name == self.name else getattr(self.module, name)


def rope_forward(module: Any, path: str, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Rotation:
    """cos and sin as the module's own forward computes them, with each token's own frequencies."""
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    rotate = inspect.unwrap(type(module).forward)
    extra = () if layer_type is None else (layer_type,)
    if kind not in GROWING:
        return rotate(module, x, position_ids, *extra)
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    options = module.config.rope_parameters if layer_type is None else module.config.rope_parameters[layer_type]
    apply = lambda frequencies: rotate(WithFrequencies(module, name, frequencies), x, position_ids, *extra)  # noqa: E731
    try:
        return GROWING[kind](module, options, position_ids, layer_type, apply)
    except RuntimeError as error:
        raise CaptureError(
            f"a rope of type {kind} cannot be rewritten per token", found=str(error).splitlines()[0], where=path
        ) from error


def longrope(module: Any, options: Any, positions: Tensor, layer_type: str | None, apply: Any) -> Rotation:
    """The short factors for positions below the original length, the long ones from there on."""
    original = options["original_max_position_embeddings"]
    extra = {} if layer_type is None else {"layer_type": layer_type}
    init = ROPE_INIT_FUNCTIONS["longrope"]
    short, long = (
        apply(init(module.config, positions.device, seq_len=length, **extra)[0]) for length in (original, original + 1)
    )
    beyond = (positions + 1 > original)[..., None]
    if isinstance(short, Tensor):  # cos and sin as one complex tensor
        return torch.where(beyond, long, short)
    return torch.where(beyond, long[0], short[0]), torch.where(beyond, long[1], short[1])


def dynamic(module: Any, options: Any, positions: Tensor, layer_type: str | None, apply: Any) -> Rotation:
    """NTK-aware scaling whose base grows with the position (transformers' "dynamic")."""
    config = module.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * options.get("partial_rotary_factor", 1.0))
    limit, factor = config.max_position_embeddings, options["factor"]
    length = (positions + 1).clamp(min=limit)
    base = options["rope_theta"] * ((factor * length / limit) - (factor - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, device=positions.device).float() / dim
    return apply(1.0 / base[..., None] ** exponents)


GROWING = {"longrope": longrope, "dynamic": dynamic}
"""Rope kinds whose frequencies depend on the token's position."""
