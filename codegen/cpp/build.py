"""Compiles generated C++ to shared libraries, and keeps them in a folder where later builds find them.

An entry of the cache (codegen/cache.py) is determined by source, headers, options and compiler. The library's own
digest lies beside it, and one that does not match is built again. An entry holds what a reader needs, too: the source,
its headers, and the command that was run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from graft.codegen.cache import FAILED, LOCK_WAIT, cache_folder, lock, private_folder, publish, sync, tidy, write
from graft.codegen.cpp.isa import Isa
from graft.compiler.errors import LoweringError

# No -ffast-math and no contraction: a function computes what its graph says, with every compiler at every level.
FLAGS = (
    *("-std=c++20", "-fPIC", "-shared", "-pthread"),
    *("-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall"),
)
LEVELS = ("0", "1", "2", "3")
NAMES = ("c++", "g++", "clang++")

SOURCE, LIBRARY, DIGEST = "function.cpp", "function.so", "function.so.sha256"
COMMAND, OUTPUT = "command.txt", "output.txt"
RESERVED = frozenset({SOURCE, LIBRARY, DIGEST, COMMAND, OUTPUT})

# What the compiler or linker prints, in the C locale, where the fault is the disk's and not the source's.
DISK_IS_FULL = ("No space left on device", "Disk quota exceeded")
SHOWN_LINES = 12


class NoCompiler(LoweringError):
    """There is no C++ compiler on this machine, or $CXX names none that runs."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that starts it, the file that is, links followed, and what `--version` prints."""

    command: tuple[str, ...]
    path: Path
    version: str


@dataclass(frozen=True)
class Unit:
    """One translation unit and all else that determines its library."""

    source: str
    headers: tuple[tuple[str, str], ...]
    flags: tuple[str, ...]
    compiler: Compiler

    @property
    def key(self) -> str:
        """SHA-256, 64 hex digits."""
        compiler = [self.compiler.command, str(self.compiler.path), self.compiler.version]
        return hashlib.sha256(json.dumps([self.source, self.headers, self.flags, compiler]).encode()).hexdigest()

    @property
    def command(self) -> list[str]:
        """To be run in the folder where the source lies, so that no folder's name gets into library or messages."""
        return [*self.compiler.command, *self.flags, "-I.", SOURCE, "-o", LIBRARY]


def build(source: str, headers: Mapping[str, str], isa: Isa, cache: Path | None = None) -> Path:
    """Compile one translation unit to a shared library, or find it compiled; returns the library's absolute path.

    `headers` maps the names that `source` includes, relative paths, to their contents. `cache` is the folder to keep
    libraries in: by default $GRAFT_CACHE, else $XDG_CACHE_HOME/graft, else ~/.cache/graft. Any number of threads and
    processes may build in it at once. It is held to about MAX_ENTRIES entries and MAX_BYTES bytes by removing those
    not used for longest. Load the library within JUST_USED seconds; once loaded, it may be removed.

    Where the folder cannot be used, a RuntimeWarning says so and the library lies in a temporary folder until the
    process exits, to be built again the next time.

    It is optimised at the level that $GRAFT_OPT names, by default 3: a lower one compiles faster and runs slower.

    NoCompiler where there is none; LoweringError where the compiler fails (its message names the source, which is
    kept), where a header's name or the level is not usable, or where neither folder can be written.
    """
    check_headers(headers)
    level = optimisation()
    found = compiler()
    if found is None:
        raise no_compiler()
    unit = Unit(source, tuple(sorted(headers.items())), (level, *FLAGS, *isa.flags), found)
    folder = cache_folder(cache)
    try:
        return cached(unit, folder)
    except OSError as reason:
        return uncached(unit, folder, reason)


def optimisation() -> str:
    """The compiler's option for the level that $GRAFT_OPT names. LoweringError where it names none."""
    level = os.environ.get("GRAFT_OPT") or LEVELS[-1]
    if level not in LEVELS:
        raise LoweringError(
            "there is no such level of optimisation",
            expected="one of " + ", ".join(LEVELS),
            found=repr(level)[:80],
            where="the environment variable GRAFT_OPT",
            remedy="set it to one of these, or not at all",
        )
    return f"-O{level}"


def compiler() -> Compiler | None:
    """The C++ compiler: $CXX, which may have arguments, and nothing else where it is set; else the first on PATH of
    c++, g++ and clang++ that runs. None where there is none."""
    try:
        commands = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [[name] for name in NAMES]
    except ValueError:
        return None
    for command in commands:
        where = shutil.which(command[0]) if command else None
        if where is None:
            continue
        # Links are not followed for the command itself: clang++ and ccache go by the name they are started under.
        command = [os.path.abspath(where), *command[1:]]
        with suppress(OSError, subprocess.SubprocessError):
            version = run([*command, "--version"], timeout=60, check=True).stdout
            return Compiler(tuple(command), Path(where).resolve(), version)
    return None


def run(
    command: list[str], *, folder: Path | None = None, timeout: float | None = None, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a compiler in `folder`, which also takes its temporary files; stdout holds stderr, too."""
    environment = {**os.environ, "LC_ALL": "C"} | ({} if folder is None else {"TMPDIR": str(folder)})
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
        check=check,
    )


def cached(unit: Unit, folder: Path) -> Path:
    """The unit's library in the cache, built there where need be; OSError where the folder cannot be used."""
    if not folder.is_absolute():
        raise FileNotFoundError(errno.ENOENT, "there is no home folder", str(folder))
    entry = folder / unit.key
    grew = False
    try:
        with lock(folder, unit.key, LOCK_WAIT):
            if library := intact(entry):
                os.utime(entry)
                return library
            grew = True
            return install(unit, folder)
    except OSError:
        # A cache that others filled and that cannot be written still serves.
        if library := intact(entry):
            return library
        raise
    finally:
        if grew:
            tidy(folder)


def uncached(unit: Unit, folder: Path, reason: OSError) -> Path:
    """The unit's library, built in a temporary folder of its own that this process removes when it exits."""
    why = reason.strerror or str(reason)
    try:
        private = private_folder()
        failure = compile_in(private, unit)
    except OSError as second:
        raise LoweringError(
            "compiled code can be written nowhere",
            expected=f"a folder that can be written: {folder}, or the system's temporary folder",
            found=f"{why}; then {second.strerror or second}",
            where="building generated C++",
            remedy="free disk space, or set GRAFT_CACHE to a folder that can be written",
        ) from second
    # The same words each time, so that Python's default filter shows them once for a caller.
    warnings.warn(
        f"compiled code cannot be kept in {folder} ({why}): it is compiled for this process alone, and again in the "
        "next; make the folder writable, or set GRAFT_CACHE to one that is",
        RuntimeWarning,
        stacklevel=3,
    )
    if failure is not None:
        raise rejected(unit, failure, private)
    return private / LIBRARY


def install(unit: Unit, folder: Path) -> Path:
    """Build the unit's entry, in place of a damaged one if there is one; the caller holds its lock."""
    failure: str | None = None

    def fill(staging: Path) -> str:
        nonlocal failure
        failure = compile_in(staging, unit)
        return unit.key if failure is None else f"{FAILED}{unit.key}"

    entry = publish(folder, fill)
    if failure is not None:
        raise rejected(unit, failure, entry)
    return entry / LIBRARY


def compile_in(folder: Path, unit: Unit) -> str | None:
    """Write the unit to an empty folder and compile it there, all of it on disk when this returns.

    None, or the compiler's output where it fails; OSError where the disk is full or cannot be written.
    """
    for name, text in [(SOURCE, unit.source), *unit.headers, (COMMAND, shlex.join(unit.command) + "\n")]:
        write(folder / name, text)
    result = run(unit.command, folder=folder)
    library = folder / LIBRARY
    if result.returncode or not library.is_file():
        if any(words in result.stdout for words in DISK_IS_FULL):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        failure = result.stdout.strip() or f"nothing printed; exit status {result.returncode}"
        write(folder / OUTPUT, failure + "\n")
        return failure
    with library.open("rb") as file:
        os.fsync(file.fileno())
    write(folder / DIGEST, digest_line(library.read_bytes()))
    sync(folder)
    return None


def digest_line(content: bytes) -> str:
    """As sha256sum prints it, so that `sha256sum -c` checks it."""
    return f"{hashlib.sha256(content).hexdigest()}  {LIBRARY}\n"


def intact(entry: Path) -> Path | None:
    """The entry's library, if it is there and as it was when built."""
    library = entry / LIBRARY
    try:
        whole = (entry / DIGEST).read_bytes() == digest_line(library.read_bytes()).encode()
    except OSError:
        return None
    return library if whole else None


def check_headers(headers: Mapping[str, str]) -> None:
    for name in headers:
        parts = PurePosixPath(name).parts
        if (
            not parts
            or name.startswith("/")
            or ".." in parts
            or parts[-1] != name.split("/")[-1]
            or parts[0] in RESERVED
        ):
            raise LoweringError(
                "a header's name is not usable",
                expected=f"a file's relative path without .. that does not start with {', '.join(sorted(RESERVED))}",
                found=repr(name)[:80],
                where="the headers of generated C++",
                remedy="rename it, there and where it is included",
            )


def no_compiler() -> NoCompiler:
    named = os.environ.get("CXX")
    return NoCompiler(
        "there is no C++ compiler",
        expected="$CXX, or one of " + ", ".join(NAMES) + " on PATH, that answers --version",
        found=f"CXX={named!r}, which cannot be run" if named else "none of them",
        where="building generated C++",
        remedy="install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: conda install gxx), "
        "or set CXX to yours",
    )


def rejected(unit: Unit, output: str, kept: Path) -> LoweringError:
    lines = output.splitlines()
    if len(lines) > SHOWN_LINES:
        lines = [*lines[:SHOWN_LINES], f"({len(lines) - SHOWN_LINES} more lines in {kept / OUTPUT})"]
    return LoweringError(
        "the C++ compiler fails on generated code",
        expected=f"{unit.compiler.path} to compile it",
        found="\n    ".join(lines),
        where=kept / SOURCE,
        remedy="update the compiler or set CXX to another; if that does not help, report it with the files in that "
        f"folder ({COMMAND} is what was run)",
    )
