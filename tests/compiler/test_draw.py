"""Functions as graphs for graphviz."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from graft.compiler.draw import dot_text, draw_function
from graft.compiler.errors import GraftError
from tests.programs import ALTERNATING, program_of


def test_a_drawing_has_a_frame_for_each_layer_that_is_shown_and_no_edge_to_what_is_not() -> None:
    function = program_of("llama")["forward"]
    text = dot_text(function)
    assert re.findall(r"subgraph cluster_\d+ {", text) == ["subgraph cluster_0 {"]
    assert 'label="layers 0-2, x3 (shown: layer 0)"' in text
    drawn = set(re.findall(r'^ *"?(\w+)"? \[', text, re.MULTILINE))
    ends = set(re.findall(r'"(\w+)" ->', text)) | set(re.findall(r'-> "(\w+)"', text))
    assert ends <= drawn and "output" in ends
    assert len(re.findall(r"subgraph cluster_\d+ {", dot_text(function, full=True))) == 3


def test_what_follows_the_folded_layers_hangs_on_the_layer_that_is_shown() -> None:
    text = dot_text(program_of("gemma2", **ALTERNATING)["forward"])
    assert re.findall(r"subgraph cluster_(\d+) {", text) == ["0", "1"]
    last = re.findall(r"^ *subgraph cluster_1_1.*?^    }", text, re.MULTILINE | re.DOTALL)[0]
    residual = re.findall(r'^ *"(\w+)" \[', last, re.MULTILINE)[-1]
    users = re.findall(rf'"{residual}" -> "(\w+)"', text)
    assert users


def test_without_dot_the_drawing_is_text_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    drawing = draw_function(program_of("llama")["forward"])
    assert drawing.svg is None and "install graphviz" in drawing.note
    written = drawing.save(tmp_path / "out.svg")
    assert written.name == "out.dot" and written.read_text(encoding="utf-8") == drawing.dot


def fake_dot(folder: Path, script: str) -> None:
    program = folder / "dot"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_with_dot_the_drawing_is_what_it_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_dot(tmp_path, 'while read -r line; do :; done; echo "<svg $1/>"')
    monkeypatch.setenv("PATH", str(tmp_path))
    drawing = draw_function(program_of("llama")["forward"])
    assert drawing.svg == "<svg -Tsvg/>\n" and not drawing.note
    assert drawing.save(tmp_path / "out.svg").read_text(encoding="utf-8") == drawing.svg


def test_a_dot_that_fails_is_an_error_with_its_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_dot(tmp_path, "while read -r line; do :; done; echo 'syntax error in line 3' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GraftError, match="syntax error in line 3"):
        draw_function(program_of("llama")["forward"])
