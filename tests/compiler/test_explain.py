"""Everything about one node, and everything as JSON."""

from __future__ import annotations

import json

import pytest

from graft.compiler.errors import GraftError
from tests.programs import program_of


def test_a_node_is_explained_from_its_source_line_to_its_cost() -> None:
    found = program_of("llama").explain("kv_attend_default_1")
    assert (found.role, found.layer, found.same_in) == ("attention", 1, (0, 2))
    assert found.module == "model.layers.1.self_attn" and found.source.startswith("modeling_llama.py:")
    assert found.operands["sequences"] == "i64[N]"
    assert found.cost["flops"] == "256*N*T"
    assert [(event.by, event.what) for event in found.history] == [("kv-cache", "made")]
    assert "history   made by kv-cache" in str(found)


def test_the_history_names_every_pass_that_touched_a_node() -> None:
    found = program_of("llama").explain("silu")
    assert [(event.by, event.what) for event in found.history] == [
        ("capture", "made"),
        ("kv-cache", "resized"),
        ("merge-linears", "changed"),
    ]


def test_a_node_that_a_pass_removed_is_explained_as_it_last_was() -> None:
    found = program_of("llama").explain("linear_1")
    assert found.type == "f32[1, N, 32]"
    assert (found.history[-1].by, found.history[-1].what) == ("merge-linears", "removed")


def test_a_parameter_is_explained_by_its_path() -> None:
    found = program_of("llama").explain("model.norm.weight")
    assert (found.kind, found.type) == ("parameter", "f32[64]")
    assert len(found.users) == 1


def test_an_unknown_name_is_an_error_with_the_nearest_ones() -> None:
    with pytest.raises(GraftError, match=r"did you mean .*kv_attend_default_1"):
        program_of("llama").explain("kv_attend_defalt_1")
    with pytest.raises(GraftError, match="no such function"):
        program_of("llama").explain("silu", "backward")


def test_programs_and_explanations_survive_json() -> None:
    program = program_of("llama")
    found = json.loads(json.dumps(program.to_json()))
    assert [record["name"] for record in found["passes"]][:2] == ["canonicalise", "dead-code"]
    nodes = {node["name"]: node for node in found["functions"]["forward"]["nodes"]}
    assert nodes["silu"]["layer"] == 0 and nodes["silu"]["role"] == "feed-forward"
    assert nodes["silu"]["shape"] == [1, "N", 96] and nodes["silu"]["dtype"] == "f32"
    assert found["functions"]["forward"]["layer_classes"] == [0, 0, 0]
    assert json.loads(json.dumps(program.explain("silu").to_json()))["history"][0]["by"] == "capture"
