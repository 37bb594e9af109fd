"""What a pass is: a frozen dataclass whose fields are its options, and what it is handed."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from graft.compiler.errors import PassError
from graft.compiler.nodes import origin_of, touched
from graft.compiler.program import Function, Program
from graft.compiler.trunk import Trunk, find_trunk

Contract = Literal["exact", "lossless", "approximate"]

exact: Contract = "exact"
"""The same logits, within the dtype's tolerance (compiler/tolerance.py)."""
lossless: Contract = "lossless"
"""The target's logits and states are untouched; what is added can only draft, or hand out hidden states to drafts."""
approximate: Contract = "approximate"
"""The output may change; the report says by how much."""


@dataclass(frozen=True)
class Pass(ABC):
    """A transformation of a program.

    Subclass it, make the subclass a frozen dataclass, and it can be used in a plan: its name is the class name in
    lower case with dashes (`SkipFFN` -> "skip-ffn"), its fields are its options.
    """

    contract: ClassVar[Contract] = approximate
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    """Facts that must hold before: "canonical", "cache-free", "kv-cache", or what another pass provides."""
    provides: ClassVar[frozenset[str]] = frozenset()
    """Facts that hold after."""
    breaks: ClassVar[frozenset[str]] = frozenset()
    """Facts that no longer hold after."""
    tidies: ClassVar[bool] = False
    """Whether finding nothing to do is as good an outcome as any; else a pass that matches nothing warns."""

    @classmethod
    def pass_name(cls) -> str:
        """The name that plans and reports use."""
        return spec_name(cls.__name__)

    @abstractmethod
    def run(self, view: View) -> None:
        """Change the view's functions. Every change counts as a match; call `view.miss` where a condition fails."""


def spec_name(class_name: str) -> str:
    """`SkipFFN` -> "skip-ffn", `KVCache` -> "kv-cache", `DropBlock` -> "drop-block", `H2O` -> "h2o"."""
    words = re.findall(r"[A-Z]+(?:[0-9]+[A-Z]*)*(?![a-z])|[A-Z]?[a-z0-9]+", class_name)
    return "-".join(word.lower() for word in words)


@dataclass
class View:
    """The program's functions on one side, the target's or a draft's, as a pass sees and changes them."""

    program: Program
    by: str
    """Name of the pass."""
    side: tuple[str, ...] = ("forward",)
    """Names of the functions the pass is aimed at."""
    matches: int = 0
    misses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def functions(self) -> list[Function]:
        """The functions the pass is aimed at."""
        return [self.program[name] for name in self.side]

    @property
    def function(self) -> Function:
        """The one function most passes are about."""
        return self.functions[0]

    @property
    def trunk(self) -> Trunk:
        """The residual stream of `function`, found afresh."""
        return find_trunk(self.function.graph, self.by)

    def add(self, function: Function) -> None:
        """Add a function that drafts to the program. Raises PassError where another pass has added one of that name."""
        if function.name in self.program.functions:
            raise self.taken(f"the function {function.name!r}", self.program[function.name])
        self.program.functions[function.name] = function
        self.match()

    def taken(self, what: str, holder: Function) -> PassError:
        """The error for something to be added that the function `holder` is or has already."""
        owners = {origin_of(node).passes[:1] for node in holder.graph.nodes if node.op == "call_function"}
        owner = "the target" if () in owners else next(iter(owners))[0]
        return PassError(
            f"two passes want to add {what}",
            expected="a name of its own for each",
            found=f"{owner} and {self.by}",
            where=f"function {holder.name}",
            remedy="give one of them another name, or leave it out",
        )

    def match(self, count: int = 1) -> None:
        """Say that the pass did something here; passes that change nodes through the trunk need not."""
        self.matches += count

    def miss(self, where: object, reason: str) -> None:
        """Say which condition failed first, and where; shown if the pass matches nothing at all."""
        self.misses.append(f"{where}: {reason}")

    def note(self, text: str) -> None:
        """A line for the report."""
        self.notes.append(text)


def changed_nodes(before: Program, after: Program) -> Iterator[tuple[str, str]]:
    """(function, node) of every node that is new or has other arguments."""
    for name, function in after.functions.items():
        old = before.functions[name].graph.nodes if name in before.functions else ()
        known = {node.name: (str(node.target), str(node.args), str(node.kwargs)) for node in old}
        for node in function.graph.nodes:
            if known.get(node.name) != (str(node.target), str(node.args), str(node.kwargs)):
                yield name, node.name


def mark_touched(before: Program, after: Program, by: str) -> int:
    """Record the pass in the origin of every node it made or changed; how many they are."""
    changed = list(changed_nodes(before, after))
    nodes = {name: {node.name: node for node in function.graph.nodes} for name, function in after.functions.items()}
    for name, node in changed:
        meta = nodes[name][node].meta
        if "origin" in meta:
            meta["origin"] = touched(meta["origin"], by)
    return len(changed)
