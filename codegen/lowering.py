"""Which code runs a function."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from graft.codegen.aten import AtenExecutable
from graft.codegen.cpp.build import NoCompiler
from graft.codegen.cpp.executable import CppExecutable
from graft.codegen.cpp.memory import restore
from graft.codegen.executable import Executable
from graft.compiler.errors import LoweringError
from graft.compiler.program import Function

BACKENDS = ("auto", "cpp", "triton", "aten")


class LoweringWarning(UserWarning):
    """A function runs slower than it could, for a reason that can be mended."""


def check_backend(backend: str) -> None:
    """Raise LoweringError for a name that is not one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise LoweringError("there is no such backend", expected=", ".join(BACKENDS), found=backend)


def lower(
    function: Function,
    backend: str = "auto",
    panels: Mapping[str, Tensor] | None = None,
    beside: Executable | None = None,
) -> Executable:
    """The code that runs a function on flat rows.

    "auto" is fused C++ for a function whose parameters are on the CPU, and ATen elsewhere, or where there is no C++
    compiler, which is said in a LoweringWarning. "triton" has to be asked for by name: see docs/limits.md.

    Raises LoweringError for a function that is not on flat rows, and for a backend that is unknown or cannot run the
    function here.

    `panels` are what an executable's `replaced` gave: parameters in packed form, by name, that stand in the function's
    weights without storage. Where ATen runs the function they are unpacked into the weights. `beside` is what runs
    another function of the program, never at the same time as this one: they may share threads.
    """
    check_backend(backend)
    device = function.device
    if backend == "cpp" and device.type != "cpu":
        raise LoweringError("C++ runs on the CPU", found=f"parameters on {device}", remedy='model.to("cpu")')
    if backend == "triton":
        from graft.codegen.triton.executable import TritonExecutable  # triton exists for Linux only

        restore(function.weights, panels or {})
        return TritonExecutable(function)
    if backend == "aten" or device.type != "cpu":
        return aten(function, panels)
    try:
        # The graph of fake values that regions read was made without gradients.
        with torch.no_grad():
            team = beside.team if isinstance(beside, CppExecutable) else None
            return CppExecutable(function, panels=panels, team=team)
    except NoCompiler as error:
        if backend == "cpp":
            raise
        warnings.warn(f"running through ATen, which is several times slower: {error}", LoweringWarning, stacklevel=3)
        return aten(function, panels)


def aten(function: Function, panels: Mapping[str, Tensor] | None) -> AtenExecutable:
    """The function through ATen, which reads parameters in their own form."""
    restore(function.weights, panels or {})
    return AtenExecutable(function)
