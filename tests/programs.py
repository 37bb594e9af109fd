"""Programs of tiny models after the usual passes, with their snapshots, for tests that only look at them."""

from __future__ import annotations

import functools
from typing import Any

from graft.compiler.capture import capture
from graft.compiler.passing import Pass
from graft.compiler.pipeline import run_passes
from graft.compiler.program import DENSE, Function, Program
from graft.passes.canonicalise import Canonicalise
from graft.passes.common_subexpression import CommonSubexpression
from graft.passes.dead_code import DeadCode
from graft.passes.kv_cache import KVCache
from graft.passes.merge_linears import MergeLinears
from tests.families import build

TIDY: tuple[Pass, ...] = (Canonicalise(), DeadCode(), CommonSubexpression())
USUAL: tuple[Pass, ...] = (*TIDY, KVCache(), MergeLinears())


ALTERNATING = {"num_hidden_layers": 4, "layer_types": ("sliding_attention", "full_attention") * 2}
"""Overrides for gemma2 with two periods of its pattern."""


@functools.cache
def program_of(family: str, passes: tuple[Pass, ...] = USUAL, **overrides: Any) -> Program:
    """The family's tiny model after the passes. Shared between tests: look, do not change. Tuples among the overrides
    are lists to the configuration."""
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in overrides.items()}
    captured = capture(build(family, **lists))
    program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
    run_passes(program, passes, sample=[range(3, 12)])
    return program
