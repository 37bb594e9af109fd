"""What to do to a model: which passes and drafters, and how their parts go together.

A plan is checked before anything runs. It round-trips through TOML (`to_toml`, `from_toml`) and through one line of
text (`spec`, `from_spec`).
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import tomli_w

from graft.compiler import registry, spec
from graft.compiler.acceptance import check_lossless
from graft.compiler.drafting import Controller, Drafter, TreePolicy, Verifier
from graft.compiler.errors import PlanError
from graft.compiler.ordering import ordered
from graft.compiler.passing import Contract, Pass, spec_name

FACTS = frozenset({"canonical", "cache-free", "kv-cache"})
"""What the default passes see to; a plan's own passes may require any of it."""

MAX_NODES = 63
"""With the root at most 64 rows: tree attention keeps a row's ancestors in a 64-bit mask."""


@dataclass(frozen=True)
class Tree:
    """The part of a plan that shapes the draft."""

    nodes: int = 16
    """Drafted rows of a verification step at most, the root not counted: 0 to MAX_NODES."""
    policy: TreePolicy | None = None
    """None: graft's default."""

    def __post_init__(self) -> None:
        if isinstance(self.nodes, int) and not 0 <= self.nodes <= MAX_NODES:
            raise PlanError(
                "the size of the draft tree is out of range",
                expected=f"0 to {MAX_NODES} drafted nodes",
                found=self.nodes,
                where="tree.nodes",
            )


@dataclass(frozen=True)
class Plan:
    """A whole plan. Lists are taken for tuples everywhere, and options are brought to their declared types.

    Raises PlanError where an element or an option has the wrong type; what does not go together is `check`'s business.
    """

    target: tuple[Pass, ...] = ()
    """Passes aimed at the target: approximate ones change the output."""
    draft: tuple[Drafter, ...] = ()
    """Drafters: they never change the output."""
    tree: Tree = Tree()
    verifier: Verifier | None = None
    """None: the rule that is lossless for every draft."""
    controller: Controller | None = None
    """None: graft's default."""
    sample: tuple[tuple[int, ...], ...] | None = None
    """Token ids of sequences on which contracts are checked; None: text that the model itself samples."""
    use: tuple[str, ...] = ()
    """Python files of your own that define components; they are run when the plan is made."""

    def __post_init__(self) -> None:
        if isinstance(self.use, (list, tuple)):
            object.__setattr__(self, "use", tuple(map(str, self.use)))
        if isinstance(self.sample, (list, tuple)):
            object.__setattr__(self, "sample", tuple(integers(sequence) for sequence in self.sample))
        for field, kind in spec.options(Plan):
            value = spec.conform(getattr(self, field.name), kind, f"plan.{field.name}")
            object.__setattr__(self, field.name, value)
        if self.sample is not None and not all(self.sample):
            raise PlanError("a sample holds no tokens", expected="token ids", found=self.sample, where="plan.sample")
        for path in self.use:
            registry.load_file(path)

    def check(self) -> None:
        """Raise PlanError if the plan's parts do not go together; the message names both, and why."""
        for component in nested(self):
            check_component(component)
        ordered(self.target, FACTS)
        if self.verifier is not None:
            check_lossless(self.verifier, self.draft, self.tree.policy)

    def spec(self) -> str:
        """The plan in one line, e.g. `target=skip-ffn{similarity=0.98},draft=lookup,recycle`; "" is the default."""
        return spec.show_arguments(self)

    @classmethod
    def from_spec(cls, text: str) -> Plan:
        """The plan that the line describes. Raises PlanError; runs the files that `use` names."""
        given = spec.read_arguments(text)
        load_all(given.get("use", ()))
        return spec.build(cls, given, "plan")

    def to_toml(self) -> str:
        """The plan as a TOML document; an empty one is the default plan."""
        return tomli_w.dumps(none_to_table(spec.to_plain(self)))

    @classmethod
    def from_toml(cls, source: str | Path) -> Plan:
        """The plan in a TOML document, given as text, or as the path of a file whose name ends in ".toml".

        Files that `use` names are run; in a file their paths are relative to it. Raises PlanError naming the file and,
        where it is known, the line.
        """
        is_path = isinstance(source, Path) or ("\n" not in source and "=" not in source and source.endswith(".toml"))
        file = Path(source) if is_path else None
        text = read_text(file) if file else str(source)
        try:
            given = tomllib.loads(text)
            given["use"] = [str(file.parent / path) if file else path for path in used(given)]
            load_all(given["use"])
            return spec.build(cls, given, "plan")
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise PlanError("a plan is not TOML", expected="a TOML document", found=error, where=file) from error
        except PlanError as error:
            line = line_of(error.found, text)
            place = ", ".join(str(part) for part in (file, line and f"line {line}", error.where) if part)
            raise PlanError(
                error.problem, expected=error.expected, found=error.found, where=place, remedy=error.remedy
            ) from error


def integers(sequence: Any) -> Any:
    """Token ids as plain ints, from whatever iterable of numbers (a tensor, an array) they came in."""
    return tuple(sequence.tolist() if hasattr(sequence, "tolist") else sequence) if is_iterable(sequence) else sequence


def is_iterable(value: Any) -> bool:
    """Whether the value holds others and is not text."""
    return hasattr(value, "__iter__") and not isinstance(value, (str, bytes, dict))


def nested(value: Any) -> Iterator[Any]:
    """Every component in the plan, those inside others included."""
    if isinstance(value, tuple):
        for element in value:
            yield from nested(element)
    elif dataclasses.is_dataclass(value):
        if spec.is_named(type(value)):
            yield value
        for field in dataclasses.fields(value):
            yield from nested(getattr(value, field.name))


def check_component(component: Any) -> None:
    """The component's name must lead back to its class, and a pass must declare a contract that there is."""
    cls = type(component)
    base = next(base for base in registry.BASES if isinstance(component, base))
    found = registry.find(base, spec_name(cls.__name__))
    if not registry.same_owner(found, cls):
        raise PlanError(
            f"two {registry.kind_name(base)} classes claim the name {spec_name(cls.__name__)!r}",
            found=f"{registry.owner(found)} and {registry.owner(cls)}",
            remedy="rename one of the two classes",
        )
    if isinstance(component, Pass) and component.contract not in get_args(Contract):
        raise PlanError(
            f"{component.pass_name()} declares a contract that there is not",
            expected=" or ".join(get_args(Contract)),
            found=component.contract,
            where=f"{cls.__name__}.contract",
        )


def load_all(paths: Sequence[Any]) -> None:
    """Load the user's files, so that the names they define can be found; what is no path is refused later."""
    for path in paths:
        if isinstance(path, str):
            registry.load_file(path)


def used(given: dict[str, Any]) -> list[Any]:
    """The files that a document names under `use`."""
    paths = given.get("use", [])
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise PlanError("plan.use has the wrong type", expected="a list of paths", found=paths, where="plan.use")
    return paths


def read_text(file: Path) -> str:
    """The file's text."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise PlanError("a plan cannot be read", expected="a TOML file", found=found, where=file) from error


def none_to_table(value: Any) -> Any:
    """TOML has no null; an empty table stands for it."""
    if isinstance(value, dict):
        return {key: none_to_table(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [none_to_table(inner) for inner in value]
    return {} if value is None else value


def line_of(found: object, text: str) -> int | None:
    """The line on which a word of the document first stands by itself, counted from 1."""
    match = re.search(rf"(?<![\w-]){re.escape(found)}(?![\w-])", text) if isinstance(found, str) and found else None
    return text.count("\n", 0, match.start()) + 1 if match else None
