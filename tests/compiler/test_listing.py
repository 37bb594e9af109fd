"""The text of functions and programs. The golden file is what `print` shows of a tiny llama: when the listing changes
on purpose, GRAFT_UPDATE_GOLDEN=1 writes it anew, and the diff is to be read before it is committed."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
from torch import Tensor

from graft.compiler.listing import WIDTH, list_function
from tests.programs import ALTERNATING, program_of

GOLDEN = Path(__file__).with_name("llama_listing.txt")


def test_the_listing_of_a_tiny_llama_is_the_golden_text() -> None:
    text = str(program_of("llama")["forward"]) + "\n"
    if os.environ.get("GRAFT_UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_identical_layers_are_printed_once_unless_all_are_asked_for() -> None:
    function = program_of("llama")["forward"]
    folded, full = str(function), list_function(function, full=True)
    assert "layers 0-2, x3 (shown: layer 0)" in folded
    assert folded.count("silu(") == 1 and full.count("silu(") == 3
    assert [f"── layer {number} ─" in full for number in range(3)] == [True] * 3


def test_alternating_layers_are_printed_once_each() -> None:
    text = str(program_of("gemma2", **ALTERNATING)["forward"])
    assert "layers 0-3, 2 x 2 (shown: layers 0-1)" in text
    assert text.count("kv_attend(") == 2 and text.count("window=6") == 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe", "gpt_neox"])
def test_no_line_is_wider_than_the_page(family: str) -> None:
    program = program_of(family)
    for text in (str(program), str(program.snapshots["capture"])):
        assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_the_listing_reads_as_python_with_every_name_made_before_it_is_used(family: str) -> None:
    function = program_of(family)["forward"]
    # A path relative to its layer starts with a dot, which Python does not know.
    text = re.sub(r"(?<=[ \[(-])\.(?=[a-z])", "layer.", list_function(function, full=True))
    body = ast.parse(text).body[0]
    assert isinstance(body, ast.FunctionDef)
    nodes = {node.name for node in function.graph.nodes}
    known = {argument.arg for argument in body.args.args}
    for statement in body.body:
        assert isinstance(statement, (ast.AnnAssign, ast.Return)) and statement.value is not None
        inside = list(ast.walk(statement.value))
        called = {id(call.func) for call in inside if isinstance(call, ast.Call)}
        used = {name.id for name in inside if isinstance(name, ast.Name) and id(name) not in called}
        assert used & nodes <= known
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            known.add(statement.target.id)
    tensors = {node.name for node in function.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    assert known & tensors == {node.name for node in function.graph.nodes if node.op != "get_attr"} & tensors


def test_sizes_carry_the_names_of_the_signature() -> None:
    program = program_of("llama")
    assert "tokens: i64[N]" in str(program["forward"]) and "kv: f32[3, S, 2, C, 32]" in str(program["forward"])
    captured = str(program.snapshots["capture"]["forward"])
    assert "def forward(tokens: i64[B, L], positions: i64[B, L]) -> (f32[B, L, 131], f32[B, L, 64]):" in captured


def test_a_program_is_listed_with_its_passes_and_contracts() -> None:
    text = str(program_of("llama"))
    assert text.startswith("# passes: canonicalise (exact), dead-code (exact), common-subexpression (exact)")
