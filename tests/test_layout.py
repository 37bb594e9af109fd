"""The house rules that a program can check."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "compiler": {"compiler"},
    "passes": {"compiler", "passes"},
    "codegen": {"compiler", "codegen"},
    "runtime": {"compiler", "passes", "codegen", "runtime"},
}
SOURCES = [path for stage in (*MAY_IMPORT, "graft") for path in sorted((ROOT / stage).rglob("*.py"))]


def imported_stages(path: Path) -> Iterator[tuple[int, str]]:
    """(line, stage) of every import from graft; the face itself counts as "graft"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "graft" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = (name or "").split(".")
            if first == "graft":
                yield node.lineno, rest[0] if rest and rest[0] in MAY_IMPORT else "graft"


@pytest.mark.parametrize("stage", MAY_IMPORT)
def test_imports_run_one_way(stage: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports graft.{found}"
        for path in sorted((ROOT / stage).rglob("*.py"))
        for line, found in imported_stages(path)
        if found not in MAY_IMPORT[stage]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_pass_is_one_short_file_that_shows_before_and_after(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert text.count("\n") <= 150
    assert "before:" in docstring and "after" in docstring


def test_nodes_are_made_by_the_helper_alone() -> None:
    # codegen/ builds the graph that runs from a program's graph; what it makes is no longer looked at by passes.
    makers = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if re.search(r"\.call_function\(|\.create_node\(", path.read_text(encoding="utf-8"))
    ]
    # decompositions.py rewrites export's graph, before it is a program's.
    elsewhere = {maker for maker in makers if not maker.startswith("codegen/")}
    assert elsewhere == {"compiler/nodes.py", "compiler/decompositions.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_they_are_for_and_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= 420


def test_nothing_is_pickled() -> None:
    # A torch file that others publish may be read, if nothing in it can be executed.
    wrong = r"import pickle|torch\.load\((?!.*weights_only=True\))"
    users = [str(p.relative_to(ROOT)) for p in SOURCES if re.search(wrong, p.read_text())]
    assert not users
