"""From names to classes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from graft.compiler import registry, spec
from graft.compiler.drafting import Drafter, Verifier
from graft.compiler.errors import PlanError
from graft.compiler.passing import Pass, View
from graft.runtime.verifiers import GreedyWalk

PASS_FILE = """
from dataclasses import dataclass
from graft.compiler.passing import Pass

@dataclass(frozen=True)
class {name}(Pass):
    factor: float = {factor}

    def run(self, view):
        pass
"""


@dataclass(frozen=True)
class RegistryTop(Pass):
    """A subclass of a subclass counts too."""

    def run(self, view: View) -> None:
        """Nothing."""


@dataclass(frozen=True)
class RegistryBelow(RegistryTop):
    """Below another component."""


def write_pass(folder: Path, file: str, name: str, factor: float = 1.0) -> Path:
    """A file that defines one pass."""
    path = folder / file
    path.write_text(PASS_FILE.format(name=name, factor=factor), encoding="utf-8")
    return path


def offer(folder: Path, name: str, value: str) -> None:
    """A distribution in the folder with one entry point."""
    info = folder / "offering-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[graft.passes]\n{name} = {value}\n", encoding="utf-8")


def test_a_class_is_found_by_name_as_soon_as_it_exists() -> None:
    assert registry.find(Pass, "registry-below") is RegistryBelow
    assert registry.find(Verifier, "greedy-walk") is GreedyWalk


def test_kinds_have_names_of_their_own() -> None:
    with pytest.raises(PlanError, match="'registry-top' is a pass, not a drafter"):
        registry.find(Drafter, "registry-top")


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(PlanError, match="expected: registry-top"):
        registry.find(Pass, "regstry-top")


def test_a_class_defined_again_in_its_module_replaces_the_old_one() -> None:
    def define() -> type:
        @dataclass(frozen=True)
        class RegistryAgain(RegistryTop):
            pass

        return RegistryAgain

    old, new = define(), define()
    assert old is not new
    assert registry.find(Pass, "registry-again") is new


def test_two_owners_of_a_name_are_both_named(tmp_path: Path) -> None:
    path = write_pass(tmp_path, "mine.py", "RegistryBelow")
    registry.load_file(path)
    with pytest.raises(PlanError, match="two pass classes claim the name 'registry-below'") as caught:
        registry.find(Pass, "registry-below")
    assert f"{__name__}.RegistryBelow" in str(caught.value.found)
    assert str(path) in str(caught.value.found)
    forget(path)


def forget(path: Path) -> None:
    """Take the file's module out of sys.modules, with which its classes become garbage."""
    for name in [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == str(path)]:
        del sys.modules[name]


def test_what_nobody_can_use_any_more_makes_no_clash(tmp_path: Path) -> None:
    path = write_pass(tmp_path, "mine.py", "RegistryBelow")
    registry.load_file(path)
    forget(path)
    assert registry.find(Pass, "registry-below") is RegistryBelow


def test_a_file_is_loaded_once_until_it_changes(tmp_path: Path) -> None:
    path = write_pass(tmp_path, "mine.py", "RegistryFromFile", factor=1.0)
    (first,) = registry.load_file(path)
    assert registry.load_file(path) == [first]
    write_pass(tmp_path, "mine.py", "RegistryFromFile", factor=2.0)
    registry.load_file(path)
    assert spec.parse("registry-from-file", Pass).factor == 2.0


def test_two_files_of_one_name_do_not_replace_each_other(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    registry.load_file(write_pass(tmp_path / "a", "mine.py", "RegistryFirstFile"))
    registry.load_file(write_pass(tmp_path / "b", "mine.py", "RegistrySecondFile"))
    assert (
        registry.find(Pass, "registry-first-file").__module__ != registry.find(Pass, "registry-second-file").__module__
    )


@pytest.mark.parametrize(
    ("text", "problem", "found"),
    [
        ("x = 1", "defines no component", None),
        ("import graft\n\nx = 1 / 0", "raises when it is run", "ZeroDivisionError"),
        ("def broken(:", "raises when it is run", "SyntaxError"),
    ],
)
def test_a_file_that_gives_nothing_is_refused(tmp_path: Path, text: str, problem: str, found: str | None) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=problem) as caught:
        registry.load_file(path)
    assert str(path) in str(caught.value.where)
    assert found is None or found in str(caught.value.found)


def test_the_line_of_a_file_that_raises_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("x = 0\n\ny = 1 / x\n", encoding="utf-8")
    with pytest.raises(PlanError, match=r"mine\.py, line 3"):
        registry.load_file(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        registry.load_file(tmp_path / "nowhere.py")


def test_a_pass_without_its_decorator_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = PASS_FILE.format(name="RegistryBare", factor=1.0).replace("@dataclass(frozen=True)\n", "")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=r"is not a dataclass(.|\n)*@dataclass\(frozen=True\)(.|\n)*fields factor"):
        registry.load_file(path)


def test_an_installed_package_offers_a_pass_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pass(tmp_path, "offering_passes.py", "OfferedPass")
    offer(tmp_path, "offered-pass", "offering_passes:OfferedPass")
    monkeypatch.syspath_prepend(tmp_path)
    assert "offered-pass" in registry.names(Pass)
    assert "offering_passes" not in sys.modules
    assert registry.find(Pass, "offered-pass").__module__ == "offering_passes"


@pytest.mark.parametrize(
    ("value", "problem"),
    [("nowhere_at_all:Pass", "cannot be loaded"), ("offering_wrong:Unlike", "does not lead to the component")],
)
def test_an_entry_point_that_leads_nowhere_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, problem: str
) -> None:
    write_pass(tmp_path, "offering_wrong.py", "Unlike")
    offer(tmp_path, "offered-wrongly", value)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PlanError, match=rf"{problem}(.|\n)*of offering"):
        registry.find(Pass, "offered-wrongly")
