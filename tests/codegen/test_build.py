"""The cache of compiled libraries: what it keeps, what it survives, and what it says when it cannot help."""

from __future__ import annotations

import ctypes
import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import graft
from graft.codegen import cache as folders
from graft.codegen.cpp import build as module
from graft.codegen.cpp.build import NoCompiler, build, compiler
from graft.codegen.cpp.isa import ISAS
from graft.compiler.errors import LoweringError

SOURCE = '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'
HEADERS = {"answer.h": "#define ANSWER 42\n"}
PORTABLE = ISAS["portable"]

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if folders.ENTRY.fullmatch(path.name))


@dataclass(frozen=True)
class Counted:
    """A compiler in $CXX that writes a line for every time it compiles."""

    log: Path

    @property
    def runs(self) -> int:
        return self.log.read_text().count("\n") if self.log.exists() else 0


def script(path: Path, body: str) -> None:
    """An executable that answers --version as the real compiler does, and else runs `body`, where $real compiles."""
    real = compiler()
    if real is None:
        pytest.skip("needs a C++ compiler")
    command = shlex.join(real.command)
    path.write_text(f'#!/bin/sh\nreal() {{ exec {command} "$@"; }}\n[ "$1" = --version ] && real "$1"\n{body}\n')
    path.chmod(0o755)


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    log = tmp_path / "runs"
    script(tmp_path / "cxx", f'echo >> {shlex.quote(str(log))}\nreal "$@"')
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    return Counted(log)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that copies the source into the library, for tests that load none."""
    script(tmp_path / "copy", "cp function.cpp function.so")
    monkeypatch.setenv("CXX", str(tmp_path / "copy"))


def test_a_library_found_in_the_cache_is_not_compiled_again(cache: Path, counted: Counted) -> None:
    library = build(SOURCE, HEADERS, PORTABLE, cache)
    assert answer(library) == 42
    assert build(SOURCE, dict(HEADERS), PORTABLE, cache) == library
    assert counted.runs == 1


def test_an_entry_keeps_source_headers_and_the_command_that_rebuilds_it(cache: Path) -> None:
    library = build(SOURCE, {**HEADERS, "deep/other.h": "\n"}, PORTABLE, cache)
    folder = library.parent
    assert (folder / "function.cpp").read_text() == SOURCE
    assert (folder / "answer.h").read_text() == HEADERS["answer.h"]
    assert (folder / "deep" / "other.h").read_text() == "\n"
    subprocess.run("sha256sum --quiet -c function.so.sha256", shell=True, check=True, cwd=folder)
    built = library.read_bytes()
    library.unlink()
    subprocess.run((folder / "command.txt").read_text(), shell=True, check=True, cwd=folder)
    assert library.read_bytes() == built
    assert "-ffast-math" not in (folder / "command.txt").read_text()


@pytest.mark.usefixtures("fast")
def test_whatever_changes_the_library_makes_another_entry(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(SOURCE, HEADERS, PORTABLE, cache)
    others = {
        build(SOURCE + "\n", HEADERS, PORTABLE, cache),
        build(SOURCE, {"answer.h": "#define ANSWER 43\n"}, PORTABLE, cache),
        build(SOURCE, {"reply.h": HEADERS["answer.h"]}, PORTABLE, cache),
        build(SOURCE, HEADERS, ISAS["avx2"], cache),
    }
    script(tmp_path / "newer", "cp function.cpp function.so")
    monkeypatch.setenv("CXX", str(tmp_path / "newer"))
    others.add(build(SOURCE, HEADERS, PORTABLE, cache))
    assert len({first, *others}) == 6 == len(entries(cache))


@pytest.mark.usefixtures("fast")
def test_the_folder_is_the_argument_else_graft_cache_else_xdg_else_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("GRAFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert build(SOURCE, HEADERS, PORTABLE).parents[1] == tmp_path / "home" / ".cache" / "graft"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert build(SOURCE, HEADERS, PORTABLE).parents[1] == tmp_path / "home" / ".cache" / "graft"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build(SOURCE, HEADERS, PORTABLE).parents[1] == tmp_path / "xdg" / "graft"
    monkeypatch.setenv("GRAFT_CACHE", "~/mine")
    assert build(SOURCE, HEADERS, PORTABLE).parents[1] == tmp_path / "home" / "mine"
    monkeypatch.chdir(tmp_path)
    assert build(SOURCE, HEADERS, PORTABLE, Path("given")).parents[1] == tmp_path / "given"


# An empty package stands in for graft itself, whose import takes seconds.
BUILD_IT = """
import sys, types
from pathlib import Path
sys.modules["graft"] = types.ModuleType("graft")
sys.modules["graft"].__path__ = sys.argv[4:]
from graft.codegen.cpp.build import build
from graft.codegen.cpp.isa import ISAS
print(build(sys.argv[1], {"answer.h": sys.argv[2]}, ISAS["portable"], Path(sys.argv[3])))
"""


def start(cache: Path) -> subprocess.Popen[str]:
    """A process of its own, and of a group of its own, that builds the source."""
    command = [sys.executable, "-c", BUILD_IT, SOURCE, HEADERS["answer.h"], str(cache), *graft.__path__]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_builds_at_once_in_several_processes_give_one_library(cache: Path, counted: Counted) -> None:
    started = [start(cache) for _ in range(4)]
    found = {process.communicate(timeout=60)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0] * 4
    (library,) = found
    assert answer(Path(library)) == 42
    assert counted.runs == 1
    assert len(entries(cache)) == 1


def test_builds_at_once_in_several_threads_give_one_library(cache: Path, counted: Counted) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build(SOURCE, HEADERS, PORTABLE, cache))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6
    assert len(set(found)) == 1
    assert counted.runs == 1


def test_a_killed_build_leaves_nothing_to_load_and_does_not_hinder_the_next(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = tmp_path / "hangs"
    once = shlex.quote(str(tmp_path / "once"))
    script(hangs, f'[ -e {once} ] && real "$@"\nprintf half > function.so\ntouch {once}\nexec sleep 60')
    monkeypatch.setenv("CXX", str(hangs))
    process = start(cache)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "once").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not entries(cache)
    (left,) = cache.glob("tmp-*")
    library = build(SOURCE, HEADERS, PORTABLE, cache)
    assert answer(library) == 42
    assert left.exists(), "a younger one may belong to a running build"

    a_day_ago = time.time() - 86400 - 60
    os.utime(left, (a_day_ago, a_day_ago))
    build(SOURCE + "\n", HEADERS, PORTABLE, cache)
    assert not left.exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "library gone", "digest gone", "a file in its place"])
def test_a_damaged_entry_is_built_again(damage: str, cache: Path, counted: Counted) -> None:
    library = build(SOURCE, HEADERS, PORTABLE, cache)
    content = library.read_bytes()
    match damage:
        case "cut":
            library.write_bytes(content[: len(content) // 2])
        case "changed":
            library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "library gone":
            library.unlink()
        case "digest gone":
            (library.parent / "function.so.sha256").unlink()
        case _:
            shutil.rmtree(library.parent)
            library.parent.write_text("")
    assert build(SOURCE, HEADERS, PORTABLE, cache) == library
    assert answer(library) == 42
    assert counted.runs == 2
    assert not list(cache.glob("tmp-*"))


def test_a_file_in_place_of_the_folder_costs_the_cache_and_one_warning(cache: Path, counted: Counted) -> None:
    cache.write_text("")
    with pytest.warns(RuntimeWarning, match="GRAFT_CACHE") as said:
        library = build(SOURCE, HEADERS, PORTABLE, cache)
    assert len(said) == 1
    assert str(cache) in str(said[0].message)
    assert said[0].filename == __file__
    assert answer(library) == 42
    assert counted.runs == 1


def test_a_disk_that_fills_up_costs_the_cache_and_one_warning(
    cache: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left") as said:
        library = build(SOURCE, HEADERS, PORTABLE, cache)
    assert len(said) == 1
    assert answer(library) == 42
    assert not list(cache.glob("tmp-*"))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(LoweringError, match="written nowhere") as raised:
        build(SOURCE, HEADERS, PORTABLE, cache)
    assert "No space left" in str(raised.value)


def test_a_disk_that_fills_up_under_the_compiler_is_not_taken_for_a_mistake_in_the_source(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = 'case "$PWD" in */cache/*) echo "ld: final link failed: No space left on device"; exit 1;; esac'
    script(tmp_path / "cxx", f'{full}\nreal "$@"')
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    with pytest.warns(RuntimeWarning, match="No space left"):
        library = build(SOURCE, HEADERS, PORTABLE, cache)
    assert answer(library) == 42
    assert not entries(cache)


def test_a_library_outside_the_cache_goes_with_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "file").write_text("")
    process = start(tmp_path / "file")
    library = Path(process.communicate(timeout=60)[0].strip())
    assert process.returncode == 0
    assert tmp_path / "temporary" in library.parents
    assert not list((tmp_path / "temporary").iterdir())


def test_a_cache_that_can_only_be_read_still_serves(
    cache: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build(SOURCE, HEADERS, PORTABLE, cache)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(module, "lock", read_only)
    assert build(SOURCE, HEADERS, PORTABLE, cache) == library
    assert counted.runs == 1


@pytest.mark.parametrize("named", [None, "", "no-such-compiler", "'unbalanced", "false"])
def test_a_missing_compiler_is_answered_with_what_to_install(
    named: str | None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named:
        monkeypatch.setenv("CXX", named)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    assert compiler() is None
    with pytest.raises(NoCompiler, match="apt install g") as raised:
        build(SOURCE, HEADERS, PORTABLE, cache)
    assert not named or named in str(raised.value.found)


def test_the_compiler_named_may_have_arguments(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiler()
    assert real is not None
    monkeypatch.setenv("CXX", shlex.join([*real.command, "-DANSWER=7"]))
    found = compiler()
    assert found is not None and found.command == (*real.command, "-DANSWER=7")
    assert answer(build(SOURCE, {"answer.h": ""}, PORTABLE, cache)) == 7


def test_a_failing_compiler_is_quoted_and_the_source_kept(cache: Path) -> None:
    wrong = SOURCE + "".join(f"int wrong{i} = unknown{i};\n" for i in range(20))
    for _ in range(2):
        with pytest.raises(LoweringError, match="error:") as raised:
            build(wrong, HEADERS, PORTABLE, cache)
    assert not isinstance(raised.value, NoCompiler)
    kept = Path(str(raised.value.where))
    assert kept.read_text() == wrong
    assert (kept.parent / "answer.h").exists()
    assert str(raised.value).count("\n") < 20
    assert "more lines" in str(raised.value)
    assert "error:" in (kept.parent / "output.txt").read_text()
    assert len(entries(cache)) == 1
    assert not list(cache.glob("tmp-*"))


def test_a_compiler_that_makes_nothing_is_one_that_fails(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "lazy", "exit 0")
    monkeypatch.setenv("CXX", str(tmp_path / "lazy"))
    with pytest.raises(LoweringError, match="exit status 0"):
        build(SOURCE, HEADERS, PORTABLE, cache)


@pytest.mark.usefixtures("fast")
def test_what_was_not_used_for_longest_is_removed_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MAX_ENTRIES", 3)
    built = [build(f"// {i}", {}, PORTABLE, cache) for i in range(5)]
    assert len(entries(cache)) == 5, "those just returned are about to be loaded"
    for age, library in enumerate(built):
        moment = time.time() - 1000 + age
        os.utime(library.parent, (moment, moment))
    assert build("// 0", {}, PORTABLE, cache) == built[0]
    newest = build("// 5", {}, PORTABLE, cache)
    assert entries(cache) == sorted(library.parent.name for library in (newest, built[0], built[4]))


@pytest.mark.usefixtures("fast")
def test_the_cache_is_bounded_in_bytes_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = build("//" + "x" * 100_000, {}, PORTABLE, cache)
    os.utime(old.parent, (0, 0))
    small = build("// small", {}, PORTABLE, cache)
    assert old.exists()
    monkeypatch.setattr(folders, "MAX_BYTES", 100_000)
    last = build("// last", {}, PORTABLE, cache)
    assert entries(cache) == sorted(library.parent.name for library in (small, last))


@pytest.mark.usefixtures("fast")
def test_an_entry_that_a_build_has_locked_is_not_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = build("// held", {}, PORTABLE, cache)
    os.utime(held.parent, (0, 0))
    monkeypatch.setattr(folders, "MAX_ENTRIES", 1)
    with folders.lock(cache, held.parent.name, timeout=0):
        # A source whose lock is another one: builds that share a lock wait for each other.
        other = next(
            source for source in (f"// {i}" for i in range(300)) if unit_key(source)[:2] != held.parent.name[:2]
        )
        build(other, {}, PORTABLE, cache)
    assert held.exists()
    build(other + "\n", {}, PORTABLE, cache)
    assert not held.exists()


def unit_key(source: str) -> str:
    found = compiler()
    assert found is not None
    return module.Unit(source, (), (module.optimisation(), *module.FLAGS), found).key


def test_a_level_of_optimisation_that_there_is_not_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_OPT", "fast")
    with pytest.raises(LoweringError, match=r"one of 0, 1, 2, 3\n(.|\n)*'fast'"):
        build(SOURCE, HEADERS, PORTABLE, cache)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["/etc/x.h", "../x.h", "a/../x.h", "function.cpp", "./function.so", "", "x/", "a/."])
def test_a_header_that_would_lie_elsewhere_is_refused(name: str, cache: Path) -> None:
    with pytest.raises(LoweringError, match="header"):
        build(SOURCE, {name: ""}, PORTABLE, cache)
    assert not cache.exists()
