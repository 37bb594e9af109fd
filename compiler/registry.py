"""From a name in a plan to the class that is meant.

There is no table to register in: a component is known as soon as its class exists, because classes know their
subclasses. `load_file` makes the classes of a user's file exist, and the entry points of installed packages are loaded
when a plan asks for their name.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from typing import Any

from graft.compiler.drafting import Controller, Drafter, TreePolicy, Verifier
from graft.compiler.errors import PlanError
from graft.compiler.kv.codecs import Codec
from graft.compiler.kv.eviction import Eviction
from graft.compiler.kv.selection import Selection
from graft.compiler.passing import Pass, spec_name

BASES: dict[type, str] = {
    Pass: "pass",
    Drafter: "drafter",
    TreePolicy: "tree policy",
    Verifier: "verifier",
    Controller: "controller",
    Codec: "codec",
    Eviction: "eviction policy",
    Selection: "selection",
}
"""Each kind of component -> what messages call it."""

ENTRY_POINTS = "graft.passes"
"""The entry point group in which an installed package names its components, each under its name in plans."""


def find(base: type, name: str) -> type:
    """The component of kind `base` with that name.

    Raises PlanError naming the nearest right name where there is none, and both owners where two classes claim it.
    """
    for entry in offered(tuple(sys.path)).select(name=name):
        load_entry(entry)
    if len(named(base, name)) > 1:
        gc.collect()  # a class is garbage only once its cycles are collected; what nobody can use makes no clash
    owners = named(base, name)
    if len(owners) > 1:
        raise PlanError(
            f"two {kind_name(base)} classes claim the name {name!r}",
            found=" and ".join(map(owner, owners)),
            remedy="rename one of the two classes",
        )
    if not owners:
        raise unknown_name(base, name)
    check_class(owners[0])
    return owners[0]


def components(base: type) -> Iterator[type]:
    """Every concrete component of that kind that exists now. Of a class defined again under its old module and
    qualified name, as in a notebook, the newest counts."""
    newest: dict[tuple[str, str], type] = {}
    for cls in subclasses(base):
        if not inspect.isabstract(cls):
            newest[cls.__module__, cls.__qualname__] = cls
    yield from newest.values()


def subclasses(base: type) -> Iterator[type]:
    """All subclasses, at any depth, older before newer among those of one class."""
    found: list[type] = type.__subclasses__(base)
    for cls in found:
        yield cls
        yield from subclasses(cls)


def named(base: type, name: str) -> list[type]:
    """The components of that name."""
    return [cls for cls in components(base) if spec_name(cls.__name__) == name]


def names(base: type) -> list[str]:
    """What can be asked for by name, sorted; entry points are listed but not loaded."""
    found = {spec_name(cls.__name__) for cls in components(base)}
    return sorted(found | offered(tuple(sys.path)).names)


@functools.lru_cache(maxsize=4)
def offered(path: tuple[str, ...]) -> EntryPoints:
    """The entry points of the packages on this path (sys.path, always); finding them takes a while."""
    return entry_points(group=ENTRY_POINTS)


def unknown_name(base: type, name: str) -> PlanError:
    """The error for a name that nothing of this kind has."""
    for other, kind in BASES.items():
        if other is not base and named(other, name):
            return PlanError(
                f"{name!r} is a {kind}, not a {kind_name(base)}",
                expected=f"a {kind_name(base)}: {', '.join(names(base))}",
                found=name,
            )
    return PlanError(
        f"there is no {kind_name(base)} called {name!r}",
        expected=nearest(name, names(base)),
        found=name,
        remedy="name the file that defines it in the plan's `use`, if it is your own",
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """The known words nearest to `word`, or all of them where none is near; for the "expected" part of an error."""
    known = sorted(known)
    close = get_close_matches(word, known, n=3, cutoff=0.6)
    return " or ".join(close) if close else ", ".join(known) or "none"


def kind_name(cls: type) -> str:
    """What messages call a class: "pass", "drafter", ..."""
    return next((kind for base, kind in BASES.items() if issubclass(cls, base)), spec_name(cls.__name__))


def owner(cls: type) -> str:
    """Where a class comes from: module, qualified name, and file."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    return f"{cls.__module__}.{cls.__qualname__}" + (f" ({file})" if file else "")


def same_owner(left: type, right: type) -> bool:
    """Whether two classes are one, or one defined again."""
    return (left.__module__, left.__qualname__) == (right.__module__, right.__qualname__)


def check_class(cls: type) -> None:
    """Refuse a component whose options would not be options: new fields, but no dataclass of its own."""
    own = [name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)]
    if own and "__dataclass_fields__" not in vars(cls):
        raise PlanError(
            f"{cls.__name__} has options but is not a dataclass",
            expected="@dataclass(frozen=True) above the class",
            found=f"fields {', '.join(own)}",
            where=owner(cls),
            remedy="add the decorator",
        )


def load_entry(entry: EntryPoint) -> None:
    """Load the component an installed package offers; its class is then known like any other."""
    package = entry.dist.name if entry.dist else "unknown package"
    where = f"entry point {entry.name} = {entry.value} of {package}"
    try:
        cls = entry.load()
    except Exception as error:
        raise PlanError(
            f"{entry.name!r} cannot be loaded from an installed package",
            found=f"{type(error).__name__}: {error}",
            where=where,
            remedy=f"repair or remove {package}",
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, tuple(BASES)) and spec_name(cls.__name__) == entry.name):
        raise PlanError(
            "an entry point does not lead to the component that it names",
            expected=f"a class whose name in plans is {entry.name!r}",
            found=cls,
            where=where,
        )


def load_file(path: str | Path) -> list[type]:
    """Import a Python file under a module name of its own and return the components it defines.

    The file's code runs. A file that has not changed since it was loaded is not run again. Raises PlanError where it
    is missing, raises, or defines no component.
    """
    file = Path(path).expanduser().resolve()
    try:
        source = file.read_bytes()
    except OSError as error:
        raise PlanError(
            "a file with components cannot be read",
            found=error.strerror or str(error),
            where=path,
            remedy="check the path in the plan's `use`",
        ) from error
    name = f"graft_user_{file.stem}_{hashlib.sha256(bytes(file)).hexdigest()[:8]}"
    digest = hashlib.sha256(source).hexdigest()
    if getattr(sys.modules.get(name), "__graft_digest__", None) != digest:
        run_file(file, name, digest)
    defined = [cls for base in BASES for cls in components(base) if cls.__module__ == name]
    if not defined:
        raise PlanError(
            "a file named in `use` defines no component",
            expected=f"a class derived from {', '.join(base.__name__ for base in BASES)}",
            where=file,
        )
    for cls in defined:
        check_class(cls)
    return defined


def run_file(file: Path, name: str, digest: str) -> None:
    """Run the file as module `name`, afresh; without success the module that was there before stays."""
    loader = importlib.machinery.SourceFileLoader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None, "a location always makes a spec when the loader is given"
    module: Any = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
        module.__graft_digest__ = digest
    except BaseException as error:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        if not isinstance(error, Exception):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        raise PlanError(
            "a file named in `use` raises when it is run",
            found=f"{type(error).__name__}: {error}",
            where=f"{file}, line {line}" if line else file,
        ) from error
