"""Which code runs a function."""

from __future__ import annotations

import warnings

import torch

from graft.codegen.aten import AtenExecutable
from graft.codegen.cpp.build import NoCompiler
from graft.codegen.cpp.executable import CppExecutable
from graft.codegen.executable import Executable
from graft.compiler.errors import LoweringError
from graft.compiler.program import Function

BACKENDS = ("auto", "cpp", "aten")


class LoweringWarning(UserWarning):
    """A function runs slower than it could, for a reason that can be mended."""


def lower(function: Function, backend: str = "auto") -> Executable:
    """The code that runs a function on flat rows.

    "auto" is fused C++ for a function whose parameters are on the CPU, and ATen elsewhere, or where there is no C++
    compiler, which is said in a LoweringWarning. Raises LoweringError for a function that is not on flat rows, and for
    a backend that is unknown or cannot run the function here.
    """
    if backend not in BACKENDS:
        raise LoweringError("there is no such backend", expected=", ".join(BACKENDS), found=backend)
    device = next(function.weights.parameters()).device
    if backend == "cpp" and device.type != "cpu":
        raise LoweringError("C++ runs on the CPU", found=f"parameters on {device}", remedy='model.to("cpu")')
    if backend == "aten" or device.type != "cpu":
        return AtenExecutable(function)
    try:
        # The graph of fake values that regions read was made without gradients.
        with torch.no_grad():
            return CppExecutable(function)
    except NoCompiler as error:
        if backend == "cpp":
            raise
        warnings.warn(f"running through ATen, which is several times slower: {error}", LoweringWarning, stacklevel=3)
        return AtenExecutable(function)
