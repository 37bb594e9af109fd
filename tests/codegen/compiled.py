"""Executables of tiny models, shared between tests: building one takes seconds."""

from __future__ import annotations

import functools

import torch

from graft.codegen.cpp.executable import CppExecutable
from graft.codegen.cpp.isa import Isa
from graft.compiler.program import Function
from tests.programs import program_of


def function_of(family: str, dtype: torch.dtype = torch.float32) -> Function:
    """The family's tiny model on flat rows."""
    return program_of(family, dtype=dtype)["forward"]


@functools.cache
def compiled(
    family: str, dtype: torch.dtype = torch.float32, isa: Isa | None = None, threads: int = 2
) -> CppExecutable:
    """The function as C++; None stands for this machine's best instruction set."""
    with torch.no_grad():
        return CppExecutable(function_of(family, dtype), isa, threads)
