"""What changed between two snapshots of a program, layer by layer, identical changes folded.

A node is followed by its name, which passes keep. Where only its sizes changed (a batch became rows) it is counted and
not shown. Changes are grouped by the layer that the node's module belongs to, so that a program that lost a block is
still compared with what the block was in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from graft.compiler.errors import GraftError
from graft.compiler.layers import Run, find_layers, fold, layer_path
from graft.compiler.listing import INDENT, Line, aligned, column_widths, is_shown, node_line, rule, signature, wrapped
from graft.compiler.notation import Notation, bytes_text
from graft.compiler.program import Function, Program

KINDS = 3
"""Changes of size that are shown by example in one group."""


@dataclass(frozen=True)
class Change:
    """One line of a diff."""

    sign: str
    """"-" or "+"."""
    line: Line


@dataclass
class Group:
    """What changed in one layer, or outside of the layers."""

    path: str
    """Module path of the layer, such as "model.layers.3"; empty outside of the layers."""
    changes: list[Change] = field(default_factory=list)
    resized: list[tuple[str, str, str]] = field(default_factory=list)
    """(node, type before, type after) where nothing else changed."""

    def pattern(self, local: set[str]) -> str:
        """The same text for layers in which the same changed: names in `local`, which differ from layer to layer, are
        numbered as they appear, and the index of a layer's state is left out."""
        numbers: dict[str, str] = {}
        lines = [f"{change.sign} {change.line.text}  # {change.line.module}" for change in self.changes]
        lines += sorted({f"{before} -> {after}" for _, before, after in self.resized})
        text = re.sub(r", layer=\d+", "", "\n".join(lines))

        def number(match: re.Match) -> str:
            return numbers.setdefault(match[0], f"%{len(numbers)}") if match[0] in local else match[0]

        return re.sub(r"(?<![.\w])[A-Za-z_]\w*(?![\w(])", number, text)


@dataclass
class FunctionDiff:
    """What changed in one function."""

    name: str
    signature: list[tuple[str, str]]
    """(sign, line) of the `def` where it changed."""
    groups: list[Group]
    bytes_before: int
    bytes_after: int
    local: set[str]
    """Names of nodes that belong to one layer."""

    def names(self, sign: str) -> list[str]:
        """Nodes with a line of that sign."""
        return [change.line.node for group in self.groups for change in group.changes if change.sign == sign]

    @property
    def removed(self) -> list[str]:
        """Nodes that are gone."""
        return [name for name in self.names("-") if name not in set(self.names("+"))]

    @property
    def added(self) -> list[str]:
        """Nodes that are new."""
        return [name for name in self.names("+") if name not in set(self.names("-"))]

    @property
    def changed(self) -> list[str]:
        """Nodes that compute something else, or on something else."""
        return [name for name in self.names("-") if name in set(self.names("+"))]

    @property
    def resized(self) -> list[str]:
        """Nodes of which only the sizes changed."""
        return [name for group in self.groups for name, _, _ in group.resized]

    @property
    def title(self) -> str:
        """The counts in one line."""
        counts = [
            f"{len(names)} {word}"
            for names, word in (
                (self.removed, "removed"),
                (self.added, "added"),
                (self.changed, "changed"),
                (self.resized, "resized"),
            )
            if names
        ]
        size = bytes_text(self.bytes_after)
        if self.bytes_before != self.bytes_after:
            size = f"{bytes_text(self.bytes_before)} -> {size}"
        return f"{self.name} | {', '.join(counts) or 'no change'} | parameters {size}"


@dataclass
class Diff:
    """What changed between two snapshots; str() is the text."""

    before: str
    after: str
    functions: list[FunctionDiff]

    def __str__(self) -> str:
        parts = ["\n".join(function_lines(function)) for function in self.functions]
        return "\n\n".join([f"# {self.before} -> {self.after}", *parts])

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """The same as dicts and lists, nothing folded."""
        return {
            "before": self.before,
            "after": self.after,
            "functions": [
                {
                    "name": function.name,
                    "signature": [list(line) for line in function.signature],
                    "bytes_before": function.bytes_before,
                    "bytes_after": function.bytes_after,
                    **{key: getattr(function, key) for key in ("removed", "added", "changed", "resized")},
                    "groups": [asdict(group) for group in function.groups],
                }
                for function in self.functions
            ],
        }


def diff_snapshots(program: Program, before: str, after: str | None = None) -> Diff:
    """What changed between two of the program's snapshots: "capture" or names of passes. Without `after`, up to the
    program as it is. Raises GraftError for an unknown name, naming the nearest."""
    old = snapshot(program, before)
    return diff_programs(old, program if after is None else snapshot(program, after), before, after or "now")


def snapshot(program: Program, name: str) -> Program:
    """The snapshot of that name."""
    if name not in program.snapshots:
        near = difflib.get_close_matches(name, program.snapshots, 1)
        raise GraftError(
            "the program has no such snapshot",
            expected=", ".join(program.snapshots) or "a program compiled with snapshots",
            found=name,
            remedy=f'did you mean "{near[0]}"?' if near else None,
        )
    return program.snapshots[name]


def diff_programs(old: Program, new: Program, before: str = "before", after: str = "after") -> Diff:
    """What changed from one program to the other."""
    names = dict.fromkeys([*old.functions, *new.functions])
    found = [diff_functions(old.functions.get(name), new.functions.get(name), name) for name in names]
    return Diff(before, after, found)


def diff_functions(old: Function | None, new: Function | None, name: str) -> FunctionDiff:
    """What changed in one function; None where it is not there."""
    sides = [Side(function) for function in (old, new)]
    marked = [(sign, line) for sign, side in zip("-+", sides, strict=True) for line in side.signature]
    # A node stays in one group, even where it moved because other layers read it now.
    place = sides[0].place | sides[1].place
    lines = [side.grouped(place) for side in sides]
    groups = [diff_group(path, *(side.get(path, []) for side in lines)) for path in merged_order(*map(list, lines))]
    return FunctionDiff(
        name,
        marked if sides[0].signature != sides[1].signature else [],
        [group for group in groups if group.changes or group.resized],
        bytes_before=sides[0].bytes,
        bytes_after=sides[1].bytes,
        local=sides[0].local | sides[1].local,
    )


class Side:
    """One of the two functions that are compared, as lines."""

    def __init__(self, function: Function | None) -> None:
        self.signature: list[str] = []
        self.place: dict[str, str] = {}
        """Node -> the group it belongs to."""
        self.lines: dict[str, Line] = {}
        self.local: set[str] = set()
        self.bytes = 0
        if function:
            self.read(function)

    def read(self, function: Function) -> None:
        """Fill in everything from the function."""
        notation, layers = Notation(function), find_layers(function)
        self.signature, self.bytes = signature(function, notation), Program({function.name: function}).parameter_bytes
        self.local = {state.name for state in function.states} | ({layers.trunk.entry.name} if layers.trunk else set())
        for section in layers.sections:
            outside = "before the first layer" if section is layers.head else "after the last layer"
            for node in filter(is_shown, section.nodes):
                path = "" if section is layers.head else layer_path(node) or section.path
                self.place[node.name] = path or outside
                self.lines[node.name] = node_line(node, notation, layer_path(node))
            if section is not layers.head:
                self.local |= {node.name for node in section.nodes}

    def grouped(self, place: dict[str, str]) -> dict[str, list[Line]]:
        """The lines by group."""
        groups: dict[str, list[Line]] = {}
        for name, line in self.lines.items():
            groups.setdefault(place[name], []).append(line)
        return groups


def merged_order(old: list[str], new: list[str]) -> list[str]:
    """The groups of both, in order."""
    merged: list[str] = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        merged += old[i:j] if tag == "equal" else [*old[i:j], *new[k:m]]
    return list(dict.fromkeys(merged))


def diff_group(path: str, old: list[Line], new: list[Line]) -> Group:
    """What changed in one group: lines that are the same but for their sizes are set apart."""
    group = Group(path)
    before, after = ({line.node: line for line in side} for side in (old, new))
    for name in before.keys() & after.keys():
        if before[name].call == after[name].call:
            # Left out of the comparison: a line that only moved did not change.
            if before[name].type != after[name].type:
                group.resized.append((name, before[name].type, after[name].type))
            before[name] = after[name]
    group.resized.sort(key=lambda entry: list(after).index(entry[0]))
    was, now = [before[line.node].text for line in old], [line.text for line in new]
    gone, come = set(was) - set(now), set(now) - set(was)
    lines = [{line.text: line for line in side.values()} for side in (before, after)]
    for tag, i, j, k, m in difflib.SequenceMatcher(None, was, now, autojunk=False).get_opcodes():
        if tag != "equal":
            group.changes += [Change("-", lines[0][text]) for text in was[i:j] if text in gone]
            group.changes += [Change("+", lines[1][text]) for text in now[k:m] if text in come]
    return group


def function_lines(function: FunctionDiff) -> Iterator[str]:
    """The text of a function's diff."""
    yield f"# {function.title}"
    if function.signature:
        yield ""
        yield from (f"{sign} {line}" for sign, line in function.signature)
    for run in fold([group.pattern(function.local) for group in function.groups]):
        yield from run_text(run, function.groups)


def run_text(run: Run, groups: list[Group]) -> Iterator[str]:
    """A heading and the first repetition of the groups that change alike."""
    shown = groups[run.first : run.first + run.period]
    numbers = [group.path.rsplit(".", 1)[-1] for group in groups[run.first : run.last + 1]]
    for group in shown:
        layer = group.path.rsplit(".", 1)[-1]
        title = f"layer {layer}" if layer.isdecimal() else group.path
        if run.repeats > 1:
            title = f"layers {numbers[0]}-{numbers[-1]}, x{run.repeats} (shown: layer {layer})"
        yield ""
        yield rule(title, "  ", f". = {group.path}" if layer.isdecimal() else "")
        yield from group_text(group)


def group_text(group: Group) -> Iterator[str]:
    """The lines of one group, deletions and insertions in place."""
    columns = column_widths([change.line for change in group.changes])
    for change in group.changes:
        first, *rest = aligned([change.line], columns, f"{change.sign} ")
        yield first
        yield from rest
    if group.resized:
        kinds = dict.fromkeys(f"{before} -> {after}" for _, before, after in group.resized)
        shown = [kind.replace(" ", "\0") for kind in list(kinds)[:KINDS]]
        more = [f"{len(kinds) - KINDS}\0more"] if len(kinds) > KINDS else []
        text = f"{len(group.resized)} resized: {'; '.join([*shown, *more])}"
        yield from wrapped("~ ", text, "  " + INDENT, separator="; ")
