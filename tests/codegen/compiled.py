"""Functions on flat rows and their executables, shared between tests: making one takes seconds."""

from __future__ import annotations

import functools
from typing import Any

import torch

from graft.codegen.aten import AtenExecutable
from graft.codegen.cpp.executable import CppExecutable
from graft.codegen.cpp.isa import Isa
from graft.codegen.executable import Executable
from graft.compiler.capture import capture
from graft.compiler.passing import View
from graft.compiler.program import DENSE, Function, Program
from graft.compiler.tolerance import difference, tolerance_of
from tests.codegen.functions import CAPACITY, SLOTS, Call, random_states
from tests.families import build
from tests.programs import USUAL

LENGTHS = (37, 0, 70, 5)
"""Committed tokens: within a block of attention, none, and beyond the first block and every window."""

TREES = (
    (2, (-1, 0, 0, 1, 3, 2)),
    (0, (-1, 0, 1, 2, 3, 4)),
    (1, (-1, 0, 1, 1, -1, 4)),
)
"""Rows of three slots out of order: a tree, a chain, and a tree with two roots behind nothing."""


@functools.cache
def function_of(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Function:
    """The family's tiny model after the usual passes, which are not checked here: the tests of passes do that. Tuples
    among the overrides are lists to the configuration."""
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in overrides.items()}
    captured = capture(build(family, dtype=dtype, **lists))
    program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
    for one in USUAL:
        one.run(View(program, one.pass_name()))
    return program["forward"]


@functools.cache
def compiled(
    family: str, dtype: torch.dtype = torch.float32, isa: Isa | None = None, threads: int = 2
) -> CppExecutable:
    """The function as C++; None stands for this machine's best instruction set."""
    with torch.no_grad():
        return CppExecutable(function_of(family, dtype), isa, threads)


def assert_same_step(executable: Executable, function: Function, call: Call, seed: int = 0) -> None:
    """Logits, hidden states and what is written agree with ATen; what is not written stays."""
    inputs, sequences = call
    before = random_states(function, seed)
    expected_states, found_states = ([one.clone() for one in before] for _ in range(2))
    with torch.no_grad():
        expected = AtenExecutable(function)(*inputs, *expected_states)
        found = executable(*inputs, *found_states)
    # A rotary embedding is in float32 in a model of float64, too, and two good cosines differ by a rounding.
    inside = expected[1].dtype if "cos" not in str(function.graph) else torch.float32
    tolerance = max(tolerance_of(one) for one in (expected[1].dtype, inside))
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        assert difference(one, other) <= tolerance
    lengths, written = inputs[4].tolist(), torch.zeros(SLOTS, CAPACITY, dtype=torch.bool)
    for slot in set(sequences):
        written[slot, lengths[slot] : lengths[slot] + sequences.count(slot)] = True
    for old, one, other in zip(before, expected_states, found_states, strict=True):
        rows, others = ([state.transpose(2, 3)[:, mask] for state in (one, other)] for mask in (written, ~written))
        assert difference(*rows) <= tolerance
        assert torch.equal(others[1], old.transpose(2, 3)[:, ~written])
