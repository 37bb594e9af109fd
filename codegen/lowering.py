"""Which code runs a function."""

from __future__ import annotations

from graft.codegen.aten import AtenExecutable
from graft.codegen.executable import Executable
from graft.compiler.program import Function


def lower(function: Function) -> Executable:
    """The best executable there is for a function on flat rows; at present ATen for every function.

    Raises LoweringError for a function that is not on flat rows.
    """
    return AtenExecutable(function)
