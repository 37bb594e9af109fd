"""Letting go of parameters that are held in another form."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable

import torch
from torch import nn


def release(modules: Iterable[nn.Module], places: set[int]) -> int:
    """Put a parameter without storage (device "meta") in the place of each whose storage begins at one of `places`.

    The modules keep names, shapes and ties, but can no longer run. Returns the bytes given back.
    """
    empty: dict[int, nn.Parameter] = {}
    freed = 0
    for module in (part for whole in modules for part in whole.modules()):
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.data_ptr() not in places or parameter.is_meta:
                continue
            place = parameter.data_ptr()
            if place not in empty:
                empty[place] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                freed += parameter.nbytes
            module._parameters[name] = empty[place]
    trim()
    return freed


def trim() -> None:
    """Hand freed memory back to the system where the C library keeps it (glibc)."""
    gc.collect()  # tensors in cycles count as used until then
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
