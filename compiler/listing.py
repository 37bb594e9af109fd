"""The text of a function and of a program, identical layers folded.

A function reads as Python: its signature, one line for each node as `name: type = call`, parameters by path. Inside a
layer a path that starts with a dot is relative to the path in the layer's heading. At the right stands the module that
a node comes from, where it is not the one of the line above.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from graft.compiler.cost import Workload, function_cost
from graft.compiler.layers import Layers, Run, Section, find_layers
from graft.compiler.nodes import origin_of
from graft.compiler.notation import Notation, bytes_text, count_text, relative
from graft.compiler.program import Function, Program
from graft.compiler.shapes import attribute, storage_bytes

WIDTH = 120
INDENT = "    "
NAME_COLUMN, TYPE_COLUMN, CALL_COLUMN = 26, 26, 44
"""Widest columns; what is longer pushes its own line only."""


@dataclass(frozen=True)
class Line:
    """One node as text."""

    node: str
    type: str
    call: str
    module: str = ""

    @property
    def text(self) -> str:
        """Without alignment: `name: type = call`."""
        return f"{self.node}: {self.type} = {self.call}"


def list_function(function: Function, *, full: bool = False) -> str:
    """The function as text, at most 120 columns wide where names allow it; `full` prints every layer."""
    notation, layers = Notation(function), find_layers(function)
    lines = [*header(function, layers), "", *signature(function, notation)]
    lines += section_lines(layers.head, notation, layers, INDENT, head_title(layers))
    runs = tuple(Run(number, 1, 1) for number in range(len(layers.layers))) if full else layers.runs
    lines += run_lines(runs, notation, layers, INDENT)
    lines += section_lines(layers.tail, notation, layers, INDENT, "after the last layer")
    returned = ", ".join(notation.argument(value) for value in results(function))
    lines += ["", *wrapped(f"{INDENT}return ", returned, INDENT * 2)]
    return "\n".join([*lines, *bodies(function), "", *footer(function)])


def list_program(program: Program, *, full: bool = False) -> str:
    """The history of passes, every function, and the host program."""
    parts = []
    if program.records:
        passes = [f"{record.name} ({record.contract})" for record in program.records]
        parts.append("\n".join(wrapped("# passes: ", ", ".join(passes), "#   ")))
    parts += [list_function(function, full=full) for function in program.functions.values()]
    if program.host is not None:
        parts.append(f"# host program\n\n{program.host}")
    return "\n\n\n".join(parts)


def header(function: Function, layers: Layers) -> list[str]:
    """What the function is, in two comment lines: its size, and the passes that left a mark on it."""
    calls = [node for node in function.graph.nodes if node.op == "call_function"]
    parameters = read_parameters(function)
    facts = [function.name, f"{len(calls)} nodes"]
    if layers.layers:
        kinds = len(set(layers.classes))
        facts.append(f"{len(layers.layers)} layers" + (f", {kinds} different" if kinds > 1 else ", all the same"))
    facts.append(f"{len(parameters)} parameters, {bytes_text(storage_bytes(parameters.values()))}")
    facts += [f"{state.name}: {bytes_text(state.bytes_per_token)} per token" for state in function.states]
    passes = dict.fromkeys(name for node in calls for name in origin_of(node).passes)
    history = wrapped("# ", f"made or changed by: {', '.join(passes)}", "#   ") if passes else []
    return [f"# {' | '.join(facts)}", *history]


def read_parameters(function: Function) -> dict[str, Tensor]:
    """The parameters and constants that the function reads, by path."""
    held = {n.target: attribute(function.weights, n.target) for n in function.graph.nodes if n.op == "get_attr"}
    return {path: tensor for path, tensor in held.items() if isinstance(tensor, Tensor)}


def signature(function: Function, notation: Notation) -> list[str]:
    """The `def` line, wrapped."""
    placeholders = [node for node in function.graph.nodes if node.op == "placeholder"]
    inputs = [f"{node.name}: {notation.node_type(node)}" for node in placeholders]
    values = [value if isinstance(value, fx.Node) else None for value in results(function)]
    outputs = ", ".join("None" if value is None else notation.node_type(value) for value in values)
    result = f") -> ({outputs}):"
    one_line = f"def {function.name}({', '.join(inputs)}{result}"
    if len(one_line) <= WIDTH:
        return [one_line]
    whole = [text.replace(" ", "\0") for text in inputs]
    return [f"def {function.name}(", *wrapped(INDENT, ", ".join(whole) + ",", INDENT), *wrapped("", result, INDENT)]


def results(function: Function) -> tuple:
    """What the function returns."""
    value = function.output.args[0]
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def head_title(layers: Layers) -> str:
    """Heading of what comes before the layers; none where there are no layers."""
    return "before the first layer" if layers.layers else ""


def run_lines(runs: Iterable[Run], notation: Notation, layers: Layers, indent: str) -> Iterator[str]:
    """Runs of layers, the first repetition of each shown."""
    for run in runs:
        if run.inner and run.repeats > 1:
            yield from ("", rule(run.title, indent))
            yield from run_lines(run.inner, notation, layers, indent + INDENT)
        else:
            yield from section_lines(layers.layers[run.first], notation, layers, indent, run.title)


def section_lines(section: Section, notation: Notation, layers: Layers, indent: str, title: str) -> Iterator[str]:
    """A heading, then the section's nodes by block."""
    shown = [node for node in section.nodes if is_shown(node)]
    if not shown:
        return
    prefix = section.path
    yield ""
    if title:
        yield rule(title, indent, f". = {prefix}" if prefix else "")
    groups = list(by_block(section, shown))
    lines = [(heading, [node_line(node, notation, prefix) for node in nodes]) for heading, nodes in groups]
    columns = column_widths([line for _, group in lines for line in group])
    for heading, group in lines:
        if heading:
            yield from ([] if heading == groups[0][0] else [""])
            yield f"{indent}# {heading}"
        yield from aligned(group, columns, indent)


def rule(title: str, indent: str, note: str = "") -> str:
    """A heading across the page."""
    start = f"{indent}# ── {title} "
    end = f" {note} ──" if note else ""
    return f"{start}{'─' * (WIDTH - len(start) - len(end))}{end}"


def by_block(section: Section, nodes: list[fx.Node]) -> Iterator[tuple[str, list[fx.Node]]]:
    """(heading, nodes) by block: a layer's attention, then its feed-forward; the rest has no heading."""
    left = dict.fromkeys(nodes)
    placed = {node for block in section.blocks for node in (*block.nodes, block.residual)}
    own = [node for node in left if node not in placed and any(user in placed for user in node.users)]
    for block in section.blocks:
        group = {*block.nodes, block.residual} & left.keys()
        group |= {node for node in own if any(user in group for user in node.users)} & left.keys()
        yield block.kind, [node for node in left if node in group]
        for node in group:
            del left[node]
    if left:
        yield "", list(left)


def is_shown(node: fx.Node) -> bool:
    """Whether the node has a line. A size is written out where it is used, an assertion of export's says nothing."""
    return isinstance(node.meta.get("val"), (Tensor, tuple, list)) or bool(node.users and node.meta.get("val") is None)


def node_line(node: fx.Node, notation: Notation, prefix: str = "") -> Line:
    """The node as text, with paths relative to `prefix`."""
    module = relative(origin_of(node).module, prefix)
    if module == prefix or module.startswith("_"):
        module = ""
    return Line(node.name, notation.node_type(node), notation.call(node, prefix), module)


def column_widths(lines: list[Line]) -> tuple[int, int, int]:
    """Widths of names, types and calls, so that most lines are aligned and few are stretched."""
    name = widest([len(line.node) + 1 for line in lines], NAME_COLUMN)
    type_ = widest([len(line.type) for line in lines], TYPE_COLUMN)
    modules = max([len(line.module) for line in lines], default=0)
    room = WIDTH - len(INDENT) * 2 - name - type_ - len(" = ") - len("  # ") - modules
    return name, type_, widest([len(line.call) for line in lines], max(room, CALL_COLUMN))


def widest(widths: list[int], limit: int) -> int:
    """The widest of those within the limit."""
    return max([width for width in widths if width <= limit], default=0)


def aligned(lines: Iterable[Line], columns: tuple[int, int, int], indent: str) -> Iterator[str]:
    """The lines in columns; the module is left out where it is the one shown last, and put off where it has no room."""
    shown = ""
    for line in lines:
        start = f"{indent}{line.node + ':':<{columns[0]}} {line.type:<{columns[1]}} = "
        comment = f"  # {line.module}" if line.module and line.module != shown else ""
        text = max(f"{start}{line.call:<{columns[2]}}{comment}", f"{start}{line.call}{comment}", key=fitting)
        if len(text) <= WIDTH:
            shown = line.module
            yield text.rstrip()
        else:
            yield from wrapped(start, line.call, " " * len(start) + INDENT)


def fitting(text: str) -> int:
    """Length, but 0 where the text is too wide."""
    return len(text) * (len(text) <= WIDTH)


def wrapped(start: str, text: str, indent: str, separator: str = ", ") -> list[str]:
    """`start + text`, broken at separators where it is too wide; continuation lines start with `indent`. A NUL in the
    text is a space at which it is never broken."""
    if len(start) + len(text) > WIDTH:
        items = separator.join(item.replace(" ", "\0") for item in text.split(separator))
        lines = textwrap.wrap(
            items, WIDTH, initial_indent=start, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    else:
        lines = [start + text]
    return [line.replace("\0", " ") for line in lines]


def bodies(function: Function) -> Iterator[str]:
    """The branches of torch.cond, as code behind the function."""
    for node in function.graph.nodes:
        held = attribute(function.weights, node.target) if node.op == "get_attr" else None
        if isinstance(held, fx.GraphModule):
            yield from ("", f"{INDENT}# {node.target}")
            yield from textwrap.indent(held.code.strip(), INDENT).splitlines()


def footer(function: Function) -> list[str]:
    """What a call costs: the formulas, and their values for one token."""
    cost = function_cost(function)
    estimate = cost.at(Workload())
    return [
        *wrapped("# FLOPs = ", str(cost.flops), "#     ", separator=" + "),
        *wrapped("# bytes = ", str(cost.bytes), "#     ", separator=" + "),
        f"# at {Workload().text(cost.symbols)}: {count_text(estimate.flops, 'FLOP')}, {bytes_text(estimate.bytes)}:",
        f"#     weights {bytes_text(estimate.weights)}, KV {bytes_text(estimate.kv)},"
        f" activations {bytes_text(estimate.activations)}",
    ]
