"""What changed between two snapshots."""

from __future__ import annotations

import json

import pytest

from graft.compiler.errors import GraftError
from graft.passes.drop_block import DropBlock
from tests.programs import TIDY, program_of


def test_the_same_change_in_every_layer_is_shown_once() -> None:
    diff = program_of("llama").diff("kv-cache", "merge-linears")
    text = str(diff)
    assert "layers 0-2, x3 (shown: layer 0)" in text
    assert text.count("+ linear_rows") == 2
    (function,) = diff.functions
    assert (len(function.removed), len(function.added)) == (3 * 5, 3 * 7)
    assert {group.path for group in function.groups} == {f"model.layers.{layer}" for layer in range(3)}


def test_a_dropped_block_is_removed_from_its_own_layer_only() -> None:
    program = program_of("llama", (*TIDY, DropBlock(index=(1,))))
    diff = program.diff("common-subexpression", "drop-block")
    (function,) = diff.functions
    assert not function.added
    gone = set(function.removed)
    assert {g.path for g in function.groups for change in g.changes if change.line.node in gone} == {"model.layers.1"}
    assert "silu_1" in function.removed and "silu" not in function.removed
    assert function.bytes_before - function.bytes_after == 3 * 64 * 96 * 4 + 64 * 4


def test_nodes_of_which_only_the_sizes_changed_are_counted_and_not_listed() -> None:
    diff = program_of("llama").diff("common-subexpression", "kv-cache")
    (function,) = diff.functions
    assert "silu" in function.resized and "silu" not in function.changed
    assert "f32[B, L, 64] -> f32[1, N, 64]" in str(diff) and "silu" not in str(diff)
    assert ("-", "def forward(tokens: i64[B, L], positions: i64[B, L]) -> (f32[B, L, 131], f32[B, L, 64]):") in (
        function.signature
    )


def test_without_a_second_name_the_diff_goes_up_to_the_program_as_it_is() -> None:
    program = program_of("llama")
    assert program.diff("kv-cache").functions[0].added == program.diff("kv-cache", "merge-linears").functions[0].added


def test_a_snapshot_does_not_differ_from_itself() -> None:
    diff = program_of("llama").diff("kv-cache", "kv-cache")
    assert diff.functions[0].groups == [] and "no change" in str(diff)


def test_an_unknown_snapshot_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(GraftError, match='did you mean "merge-linears"'):
        program_of("llama").diff("capture", "merge-linear")


def test_functions_that_come_and_go_are_listed_whole() -> None:
    from graft.compiler.diff import diff_programs
    from graft.compiler.program import Program

    program = program_of("llama")
    diff = diff_programs(Program({}), program)
    (function,) = diff.functions
    assert not function.removed and len(function.added) > 100
    assert "+ def forward(" in str(diff)
    assert diff_programs(program, Program({})).functions[0].removed == function.added


def test_a_diff_survives_json() -> None:
    found = json.loads(json.dumps(program_of("llama").diff("capture", "canonicalise").to_json()))
    assert (found["before"], found["after"]) == ("capture", "canonicalise")
    assert {"removed", "added", "changed", "resized", "groups"} <= found["functions"][0].keys()
