"""The command line, on a tiny model in a folder."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graft import cli
from graft.compiler.errors import PlanError
from graft.progress import Progress
from tests.families import VOCABULARY, build
from tests.programs import program_of

TEMPLATE = "{% for m in messages %}w5 {{ m.content }} {% endfor %}w6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama and a tokenizer whose words are w0, w1, ..."""
    path = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3", eos_token="w2")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What compile() returns, without compiling; the arguments that generate() was called with are kept."""
    fast = SimpleNamespace(program=program_of("llama"), calls=[], report=lambda: "the report")

    def generate(**arguments: Any) -> None:
        fast.calls.append(arguments)
        arguments["streamer"].put(arguments["input_ids"][0])
        for token in (7, 8, 9):
            arguments["streamer"].put(arguments["input_ids"].new_tensor([token]))
        arguments["streamer"].end()

    fast.generate = generate
    monkeypatch.setattr(cli, "compile_model", lambda arguments, progress: fast)
    return fast


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("compiled")
def test_inspect_prints_the_program_or_one_function_after_one_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "inspect", "m").startswith("# passes: canonicalise (exact)")
    before = output(capsys, "inspect", "m", "--after", "canonicalise", "--function", "forward")
    assert "attention(" in before and "kv_attend(" not in before
    assert output(capsys, "inspect", "m", "--full").count("kv_attend(") == 3


@pytest.mark.usefixtures("compiled")
def test_inspect_shows_differences_nodes_and_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert "+ linear_rows" in output(capsys, "inspect", "m", "--diff", "kv-cache", "merge-linears")
    assert "history   made by capture" in output(capsys, "inspect", "m", "--explain", "silu")
    assert output(capsys, "inspect", "m", "--report") == "the report\n"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("view", [(), ("--diff", "capture", "kv-cache"), ("--explain", "silu")])
def test_inspect_prints_every_view_as_json(capsys: pytest.CaptureFixture[str], view: tuple[str, ...]) -> None:
    assert json.loads(output(capsys, "inspect", "m", "--json", *view))


@pytest.mark.usefixtures("compiled")
def test_inspect_writes_a_drawing_and_says_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = output(capsys, "inspect", "m", "--svg", str(tmp_path / "graph.svg"))
    assert "graph.dot" in said and "install graphviz" in said
    assert (tmp_path / "graph.dot").read_text(encoding="utf-8").startswith("digraph")


@pytest.mark.usefixtures("compiled")
def test_an_error_of_grafts_is_a_message_on_stderr_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "m", "--after", "kvcache"]) == cli.FAILED
    said = capsys.readouterr()
    assert said.out == "" and 'did you mean "kv-cache"' in said.err and "Traceback" not in said.err


def test_a_model_that_cannot_be_loaded_is_an_error_with_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["inspect", str(tmp_path), "--quiet"]) == cli.FAILED
    assert f"transformers cannot load {tmp_path}" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: object, progress: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "compile_model", interrupted)
    assert cli.main(["inspect", "m"]) == cli.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_run_streams_the_answer_without_the_prompt(
    compiled: SimpleNamespace, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert output(capsys, "run", str(folder), "--prompt", "w10 w11", "--max-new-tokens", "3") == "w7 w8 w9\n"
    (call,) = compiled.calls
    assert call["input_ids"].tolist() == [[10, 11]]
    assert call["max_new_tokens"] == 3 and call["do_sample"] is False


def test_run_takes_the_chat_template_sampling_options_and_standard_input(
    compiled: SimpleNamespace, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("w10"))
    options = ("--chat", "--temperature", "0.7", "--seed", "5", "--stats")
    assert cli.main(["run", str(folder), "--prompt", "-", *options]) == 0
    (call,) = compiled.calls
    assert call["input_ids"].tolist() == [[5, 10, 6]]
    assert (call["do_sample"], call["temperature"], call["seed"]) == (True, 0.7, 5)
    assert "the report" in capsys.readouterr().err


def test_plans_come_from_a_file_or_from_one_line_and_may_name_ones_own_passes(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from dataclasses import dataclass\nfrom graft.compiler.passing import Pass\n\n\n"
        "@dataclass(frozen=True)\nclass CommandLinePass(Pass):\n    times: int = 1\n\n"
        "    def run(self, view):\n        pass\n",
        encoding="utf-8",
    )
    file = tmp_path / "plan.toml"
    file.write_text('[[target]]\nname = "command-line-pass"\ntimes = 3\n', encoding="utf-8")
    parse = lambda *options: cli.read_plan(cli.parser().parse_args(["inspect", "m", *options]))  # noqa: E731
    assert parse() is None
    by_file = parse("--use", str(own), "--plan", str(file))
    assert by_file is not None and by_file.target[0].times == 3  # type: ignore[attr-defined]
    assert parse("--use", str(own), "--spec", "target=command-line-pass{times=3}") == by_file
    with pytest.raises(PlanError, match="command-line-pass"):
        parse("--spec", "target=command-line-pas")


def test_passes_lists_components_with_options_and_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "passes")
    assert "drop-block (approximate)" in text and "kind=feed-forward" in text and "Take blocks out" in text
    found = json.loads(output(capsys, "passes", "--json"))
    kinds = {"pass", "drafter", "tree policy", "verifier", "controller", "codec", "eviction policy", "selection"}
    assert kinds == found.keys()
    (drop,) = [component for component in found["pass"] if component["name"] == "drop-block"]
    assert drop["contract"] == "approximate"
    assert {option["name"] for option in drop["options"]} == {"index", "kind"}


def test_progress_is_plain_lines_where_the_stream_is_no_terminal() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress("capturing")
        progress("running pass kv-cache")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("s  capturing") and second.endswith("s  running pass kv-cache")


def test_progress_is_one_live_line_on_a_terminal_and_gone_in_the_end() -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    with Progress(stream) as progress:
        progress("capturing")
        assert progress.status is not None
    assert progress.status is None and "graft:" not in stream.getvalue()


def test_progress_is_a_bar_where_it_is_known_how_much_is_done() -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    with Progress(stream) as progress:
        progress("hidden states")
        progress("epoch 1: loss 2.5, 1.9 tokens a step", 0.25)
        assert progress.status is None and progress.bar is not None
        task = progress.bar.tasks[0]
        assert (task.completed, task.description) == (0.25, "epoch 1: loss 2.5, 1.9 tokens a step")
        progress("writing")
        assert progress.bar is None and progress.status is not None
    assert progress.status is None and "graft:" not in stream.getvalue()


def test_quiet_progress_says_nothing() -> None:
    stream = io.StringIO()
    with Progress(stream, quiet=True) as progress:
        progress("capturing")
    assert stream.getvalue() == ""


def test_a_reader_that_goes_away_ends_the_command_without_a_traceback() -> None:
    # In a process of its own: what is tested is what Python does with the pipe at exit.
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        command = [sys.executable, "-m", "graft", "passes"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == cli.BROKEN_PIPE and done.stderr == ""


def test_a_tiny_model_is_compiled_inspected_and_run_from_its_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(folder), "--dtype", "float32", "--function", "forward"]) == 0
    said = capsys.readouterr()
    assert "layers 0-2, x3 (shown: layer 0)" in said.out
    assert "capturing LlamaForCausalLM" in said.err
    options = ("--max-new-tokens", "4", "--dtype", "float32", "--quiet", "--stats")
    assert cli.main(["run", str(folder), "--prompt", "w10 w11 w12", *options]) == 0
    said = capsys.readouterr()
    assert 1 <= len(said.out.split()) <= 4 and all(word.startswith("w") for word in said.out.split())
    assert "tokens per step" in said.err
