"""Every snippet of README and docs runs, and prints what the page says it prints.

Blocks of a page share one namespace, in order. A `text` block right behind a `python` block is its output. In `sh`
blocks `python -m graft` runs in this process, and a `make` target must exist.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from sybil.document import Document
from sybil.example import Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS_MODEL = [page for page in PAGES if HUB_NAME in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", [p for p in PAGES if p not in NEEDS_MODEL], ids=lambda p: p.name)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.real
@pytest.mark.parametrize("page", NEEDS_MODEL, ids=lambda p: p.name)
def test_snippets_run_on_the_real_model(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: object
) -> None:
    monkeypatch.chdir(tmp_path)
    for loader, found in ((AutoModelForCausalLM, smollm2.model), (AutoTokenizer, smollm2.tokenizer)):
        monkeypatch.setattr(loader, "from_pretrained", local(found))
    run_page(page)


def local(found: object) -> object:
    """A from_pretrained that knows one name."""

    def from_pretrained(name: str, **_: object) -> object:
        assert name == HUB_NAME
        return found

    return from_pretrained


def run_page(page: Path) -> None:
    parsers = [PythonCodeBlockParser(), *(CodeBlockParser(language, ignore) for language in ("text", "sh"))]
    document = Document.parse(str(page), *parsers, encoding="utf-8")
    printed, last_line = io.StringIO(), 0
    for example in document.examples():
        where = f"{page.name}:{example.line}"
        language = example.region.lexemes.get("arguments", "python")
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                example.evaluate()
        elif language == "sh":
            run_commands(example, where)
        elif follows(document.text, example):
            assert normal(printed.getvalue()) == normal(str(example.parsed)), where
        last_line = example.line
    assert last_line or "```" not in document.text


def ignore(example: Example) -> None:
    """Evaluated by the test itself."""


def follows(text: str, example: Example) -> bool:
    """Whether nothing but blank lines stands between the block before and this one."""
    return re.search(r"```\s*\Z", text[: example.start]) is not None


def run_commands(example: Example, where: str) -> None:
    from graft.cli import main

    for line in str(example.parsed).splitlines():
        words = shlex.split(line, comments=True)
        if words[:3] == ["python", "-m", "graft"]:
            assert main(words[3:]) in (0, None), where
        elif words[:1] == ["make"]:
            targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1].partition("=")[0] in targets, where


def normal(text: str) -> str:
    """Without trailing blanks; a line that is only "..." in the page stands for any lines."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
