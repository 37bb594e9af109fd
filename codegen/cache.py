"""The folder in which compiled code is kept: entries that appear whole or not at all, and are not kept for ever.

An entry is a folder named after the SHA-256 of all that determines it. It appears by one rename of a folder that is
complete and on disk, so that whoever is killed leaves a temporary folder and never half an entry.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

MAX_ENTRIES, MAX_BYTES = 256, 512 * 2**20
# Seconds. An entry just returned is about to be loaded; a lock held this long belongs to a process that is stopped.
JUST_USED, STALE, LOCK_WAIT = 60.0, 86400.0, 600.0
TEMPORARY, FAILED = "tmp-", "failed-"
ENTRY = re.compile(rf"(?:{FAILED})?([0-9a-f]{{64}})")


def cache_folder(cache: Path | None) -> Path:
    """The folder of the cache, absolute unless it is the default and there is no home folder to put it in."""
    chosen = cache or os.environ.get("GRAFT_CACHE")
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    # The XDG specification has relative paths ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "graft"


def lock(folder: Path, key: str, timeout: float) -> FileLock:
    """The lock of an entry, for `with`; OSError after `timeout` seconds. The kernel frees a dead process's.

    Entries share 256 locks, because a lock's file cannot be removed safely while others may wait for it.
    """
    locks = folder / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{key[:2]}.lock", timeout=timeout)


def publish(folder: Path, fill: Callable[[Path], str]) -> Path:
    """Let `fill` write a new folder, which then appears under the name that it returns, in place of what stood there.

    The caller holds the entry's lock. Returns the entry.
    """
    staging = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        entry = folder / fill(staging)
        sync(staging)
        if os.path.lexists(entry):
            discard(entry)
        os.replace(staging, entry)
        sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return entry


def private_folder() -> Path:
    """A temporary folder of this process, which removes it when it exits."""
    private = Path(tempfile.mkdtemp(prefix="graft-"))
    atexit.register(remove_own, private, os.getpid())
    return private


def remove_own(private: Path, owner: int) -> None:
    """Remove a process's temporary folder; in a fork of the process, leave it."""
    if os.getpid() == owner:
        shutil.rmtree(private, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a folder so that it is never seen with only a part of its files."""
    doomed = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    os.replace(path, doomed)
    remove(doomed)


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what killed builds left, and the entries beyond the bounds that were not used for longest.

    What cannot be removed, or is locked by a build, stays until the next time.
    """
    for path in names(folder):
        if path.name.startswith(TEMPORARY):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE:
                    remove(path)
    size = 0
    entries = sorted((used_and_size(path) for path in names(folder) if ENTRY.fullmatch(path.name)), reverse=True)
    for count, (_, own_size, entry) in enumerate(entries, start=1):
        size += own_size
        if count > MAX_ENTRIES or size > MAX_BYTES:
            with suppress(OSError), lock(folder, entry.name.removeprefix(FAILED), timeout=0):
                # Looked at again, with the lock held: another build may just have returned it.
                if time.time() - entry.stat().st_mtime > JUST_USED:
                    discard(entry)


def names(folder: Path) -> Iterator[Path]:
    """What is in a folder, in order; nothing where there is none."""
    with suppress(OSError):
        yield from sorted(folder.iterdir())


def used_and_size(entry: Path) -> tuple[float, int, Path]:
    """(last use in seconds since 1970, bytes, the entry itself); zeros for one that has just been removed."""
    try:
        size = sum(path.stat().st_size for path in entry.rglob("*"))
        return entry.stat().st_mtime, size, entry
    except OSError:
        return 0.0, 0, entry


def write(path: Path, text: str) -> None:
    """Write a text file, on disk when this returns, and the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Have a folder's names on disk, on file systems that know the request."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
