"""A function as a graph for graphviz: a cluster for each layer and block, identical layers folded."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from graft.compiler.canonical import node_class
from graft.compiler.errors import GraftError
from graft.compiler.layers import Layers, Run, Section, find_layers
from graft.compiler.listing import by_block, is_shown
from graft.compiler.notation import Notation, target_name
from graft.compiler.program import Function

COLOURS = {
    "matmul": "#cfe2f3",
    "attention": "#f9cb9c",
    "state": "#ffe599",
    "gather": "#d9ead3",
    "reduction": "#ead1dc",
    "view": "#f3f3f3",
}
"""Fill colour by class of operator; white for the rest."""

SECONDS = 120
"""Time that `dot` is given."""


@dataclass
class Drawing:
    """A drawing of a function."""

    dot: str
    """Graphviz's language."""
    svg: str | None
    """None where the program `dot` is not installed."""

    @property
    def note(self) -> str:
        """Why there is no SVG, and what to do; empty where there is one."""
        if self.svg is not None:
            return ""
        return "the program dot is not installed: this is graphviz text (install graphviz, then dot -Tsvg)"

    def save(self, path: str | Path) -> Path:
        """Write the SVG, or without one the graphviz text beside it with the ending .dot; returns what was written."""
        path = Path(path) if self.svg is not None else Path(path).with_suffix(".dot")
        path.write_text(self.svg if self.svg is not None else self.dot, encoding="utf-8")
        return path


def draw_function(function: Function, *, full: bool = False) -> Drawing:
    """Draw the function; `full` draws every layer. Raises GraftError where dot fails."""
    dot = dot_text(function, full=full)
    program = shutil.which("dot")
    if program is None:
        return Drawing(dot, None)
    try:
        command = [program, "-Tsvg"]
        done = subprocess.run(command, input=dot, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise GraftError("dot took too long", expected=f"{SECONDS} s", where=function.name) from error
    if done.returncode:
        raise GraftError("dot failed", found=done.stderr.strip().splitlines()[:1], where=function.name)
    return Drawing(dot, done.stdout)


def dot_text(function: Function, *, full: bool = False) -> str:
    """The function in graphviz's language."""
    notation, layers = Notation(function), find_layers(function)
    runs = tuple(Run(number, 1, 1) for number in range(len(layers.layers))) if full else layers.runs
    shown = shown_layers(runs)
    stand_in = stand_ins(layers, runs)
    lines = [
        "digraph {",
        "  graph [rankdir=TB, fontname=Helvetica, fontsize=11, compound=true, newrank=true]",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica, fontsize=9, height=0.2]',
        "  edge [arrowsize=0.5, color=gray40]",
        f"  label={quoted(function.name)}; labelloc=t",
    ]
    for node in function.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"  {quoted(node.name)} [shape=ellipse, label={label(node.name, notation.node_type(node))}]")
    for section in (layers.head, *(layers.layers[number] for number in shown), layers.tail):
        title = next((run.title for run in runs if run.first == section.layer), f"layer {section.layer}")
        lines += cluster(section, title, notation)
    lines.append(f"  output [shape=ellipse, label={label('return', '')}]")
    return "\n".join([*lines, *edges(function, stand_in), "}"]) + "\n"


def shown_layers(runs: Iterable[Run]) -> list[int]:
    """The layers that are drawn: of every run the first repetition."""
    found: list[int] = []
    for run in runs:
        found += shown_layers(run.inner) if run.inner else [run.first]
    return found


def stand_ins(layers: Layers, runs: Iterable[Run]) -> dict[fx.Node, fx.Node]:
    """Node of a layer that is not drawn -> the node of a drawn layer in its place."""
    shown = set(shown_layers(runs))
    drawn: dict[fx.Node, fx.Node] = {}
    for number in sorted(shown, reverse=True):
        drawn.update((layers.twins[node], node) for node in layers.layers[number].nodes if node in layers.twins)
    hidden = (node for section in layers.layers if section.layer not in shown for node in section.nodes)
    return {node: drawn[layers.twins[node]] for node in hidden if node in layers.twins}


def cluster(section: Section, title: str, notation: Notation) -> Iterator[str]:
    """A section's nodes, those of a layer in a frame with a frame for each block."""
    nodes = [node for node in section.nodes if is_shown(node)]
    if not section.blocks:
        yield from (f"  {statement(node, notation)}" for node in nodes)
        return
    yield f"  subgraph cluster_{section.layer} {{ label={quoted(title)}; style=rounded; color=gray60"
    for index, (heading, group) in enumerate(by_block(section, nodes)):
        yield f"    subgraph cluster_{section.layer}_{index} {{ label={quoted(heading)}; style=dotted; color=gray60"
        yield from (f"      {statement(node, notation, section.path)}" for node in group)
        yield "    }"
    yield "  }"


def statement(node: fx.Node, notation: Notation, prefix: str = "") -> str:
    """One node: its operator with the parameters it reads, and its type."""
    parameters = [notation.argument(operand, prefix) for operand in node.all_input_nodes if operand.op == "get_attr"]
    colour = COLOURS.get(node_class(node.target), "white")
    text = label(" ".join([target_name(node.target), *parameters]), notation.node_type(node))
    return f'{quoted(node.name)} [label={text}, tooltip={quoted(node.name)}, fillcolor="{colour}"]'


def edges(function: Function, stand_in: dict[fx.Node, fx.Node]) -> Iterator[str]:
    """The edges between drawn nodes; of a folded layer only what leaves the fold, from the node in its place."""
    seen = set()
    for node in function.graph.nodes:
        if node in stand_in or not (node.op == "output" or (node.op == "call_function" and is_shown(node))):
            continue
        for operand in node.all_input_nodes:
            if operand.op == "placeholder" or (operand.op == "call_function" and is_shown(operand)):
                source = stand_in.get(operand, operand)
                edge = (source.name, "output" if node.op == "output" else node.name)
                if edge not in seen:
                    seen.add(edge)
                    yield f"  {quoted(edge[0])} -> {quoted(edge[1])}"


def label(title: str, type_: str) -> str:
    """Two lines of text."""
    return quoted(f"{title}\n{type_}" if type_ else title)


def quoted(text: str) -> str:
    """Text as graphviz wants it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
