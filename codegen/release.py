"""Letting go of parameters that are held in another form."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from graft.codegen.executable import Executable
from graft.compiler.shapes import attribute


def packed_places(executables: Sequence[Executable]) -> set[int]:
    """Where the parameters lie that these functions read packed, and none of them in any other form."""
    held = {attribute(one.function.weights, name).data_ptr() for one in executables for name in one.panels}
    return held.difference(*(one.read_plain() for one in executables))


def replaced(executables: Sequence[Executable]) -> dict[str, Tensor]:
    """Parameters that these functions read packed and need in no other form, by name."""
    places, found = packed_places(executables), dict[str, Tensor]()
    for one in executables:
        for name, panels in one.panels.items():
            parameter = attribute(one.function.weights, name)
            if parameter.is_meta or parameter.data_ptr() in places:
                found[name] = panels
    return found


def release(modules: Iterable[nn.Module], executables: Sequence[Executable]) -> int:
    """Give up the parameters of the modules that these functions read packed, and none of them in any other form.

    A parameter without storage (device "meta") takes the place of each: the modules keep names, shapes and ties, but
    can no longer run. Returns the bytes given back.
    """
    freed = replace_parameters(modules, packed_places(executables))
    trim()
    return freed


def replace_parameters(modules: Iterable[nn.Module], places: set[int]) -> int:
    """Put an empty parameter in the place of each that lies in one of the places; a function of its own, so that no
    variable holds the last one when memory is handed back."""
    empty: dict[int, nn.Parameter] = {}
    freed = 0
    for module in (part for whole in modules for part in whole.modules()):
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.is_meta or parameter.data_ptr() not in places:
                continue
            place = parameter.data_ptr()
            if place not in empty:
                empty[place] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                freed += parameter.nbytes
            module._parameters[name] = empty[place]
    return freed


def trim() -> None:
    """Hand freed memory back to the system where the C library keeps it (glibc)."""
    gc.collect()  # tensors in cycles count as used until then
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
