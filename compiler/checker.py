"""Whether a program is well formed; run between passes, so that a mistake is found where it is made.

The rules on graphs, values and states are here; the rule that a token's result never depends on its neighbours is in
compiler/token_rule.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graft.compiler.canonical import ATTENTION, NOT_CANONICAL, STATE_WRITES, graft, is_functional
from graft.compiler.errors import CheckError
from graft.compiler.nodes import named_arguments, place_of
from graft.compiler.program import Function, KVState, Program
from graft.compiler.shapes import Values, attribute, derive, same_type
from graft.compiler.token_rule import Sizes, mixes_tokens


def check(program: Program, where: str = "", derived: Mapping[str, tuple[Values, Sizes]] | None = None) -> None:
    """Raise CheckError naming the rule, the function, the node and its module, if the program is not well formed.

    `where` says at which point of the pipeline, e.g. "after skip-ffn". `derived` is what `derived_values` has just
    given for each function, by name; else it is asked for here.
    """
    for function in program.functions.values():
        try:
            check_function(function, derived[function.name] if derived else None)
        except CheckError as error:
            place = ", ".join(str(part) for part in (where, f"function {function.name}", error.where) if part)
            raise CheckError(
                error.problem, expected=error.expected, found=error.found, where=place, remedy=error.remedy
            ) from error


def check_function(function: Function, derived: tuple[Values, Sizes] | None = None) -> None:
    """All rules, the cheap ones on structure first."""
    check_graph(function)
    check_signature(function)
    for node in function.graph.nodes:
        if node.op == "call_function":
            check_node(function, node)
    values, sizes = derived or derived_values(function)
    for node in function.graph.nodes:
        if node.op == "call_function":
            check_value(node, values[node])
            mixed = mixes_tokens(node, values, sizes)
            if mixed is not None:
                raise CheckError(
                    "a value is combined across tokens outside attention",
                    expected="operators that treat every token by itself",
                    found=mixed,
                    where=place_of(node),
                    remedy="recurrences and convolutions over positions are not supported; see docs/limits.md",
                )
    check_output(function, values, sizes)
    for state in function.states:
        check_state(function, state, values)


def check_graph(function: Function) -> None:
    """fx's own well-formedness: nodes in topological order, names unique, arguments in the graph."""
    try:
        function.graph.lint()
    except Exception as error:
        raise CheckError("the graph is not well formed", found=str(error).splitlines()[0]) from error
    known = {"placeholder", "get_attr", "call_function", "output"}
    strange = next((node for node in function.graph.nodes if node.op not in known), None)
    if strange is not None:
        raise CheckError(
            "a node is of a kind that functions do not have",
            expected=", ".join(sorted(known)),
            found=strange.op,
            where=place_of(strange),
        )


def check_signature(function: Function) -> None:
    """The placeholders are the inputs and the states, in order; every parameter that is named exists."""
    expected = [spec.name for spec in function.signature]
    found = [node.name for node in function.graph.nodes if node.op == "placeholder"]
    if expected != found:
        raise CheckError(
            "the placeholders are not the signature's", expected=", ".join(expected), found=", ".join(found)
        )
    for node in function.graph.nodes:
        if node.op == "get_attr":
            try:
                attribute(function.weights, node.target)
            except AttributeError as error:
                raise CheckError("a parameter does not exist", found=node.target, where=place_of(node)) from error


def check_node(function: Function, node: fx.Node) -> None:
    """Metadata, canonical spelling, and the rules of single operators."""
    for key in ("val", "origin"):
        if key not in node.meta:
            raise CheckError(
                "a node lacks metadata",
                expected=f'meta["{key}"]',
                found="none",
                where=place_of(node),
                remedy="make nodes with graft.compiler.nodes.new_node",
            )
    if node.target in NOT_CANONICAL:
        raise CheckError(
            "an operator is not in canonical form",
            expected=NOT_CANONICAL[node.target],
            found=node.target,
            where=place_of(node),
        )
    if not is_functional(node.target):
        raise CheckError(
            "an operator may write its arguments, or is not an operator",
            expected="a functional operator with a schema",
            found=getattr(node.target, "__name__", node.target),
            where=place_of(node),
        )
    if node.target is graft.linear_rows.default:
        check_linear_rows(function, node)
    if node.target is graft.expert_linear.default:
        check_expert_linear(node)


def check_linear_rows(function: Function, node: fx.Node) -> None:
    """One range of existing rows for each parameter, a bias for each or for none, and the place of its input."""
    x, weights, biases, ranges, *rest = node.args
    if len(ranges) != 2 * len(weights) or len(biases) not in (0, len(weights)):
        raise CheckError(
            "linear_rows is given lists that do not fit together",
            expected="start and end row of each weight, and as many biases as weights, or none",
            found=f"{len(weights)} weights, {len(biases)} biases, ranges {list(ranges)}",
            where=place_of(node),
        )
    for index, parameter in enumerate((*weights, *biases)):
        if parameter.op != "get_attr":
            raise CheckError("linear_rows reads a weight that is computed", found=parameter.name, where=place_of(node))
        start, end = ranges[2 * (index % len(weights)) :][:2]
        rows = attribute(function.weights, parameter.target).shape[0]
        if not 0 <= start < end <= rows:
            raise CheckError(
                "linear_rows names rows that a parameter does not have",
                expected=f"0 <= start < end <= {rows}",
                found=f"{start} to {end} of {parameter.target}",
                where=place_of(node),
            )
    width, depths = x.meta["val"].shape[-1], [weight.meta["val"].shape[1] for weight in weights]
    starts, columns = (*rest, None, None)[:2]
    if columns is not None:
        first, last = columns
        if not 0 <= first < last <= min(depths):
            raise CheckError(
                "linear_rows names columns that a parameter does not have",
                expected=f"0 <= start < end <= {min(depths)}",
                found=f"{first} to {last}",
                where=place_of(node),
            )
        depths = [last - first for _ in depths]
    starts = [0] * len(weights) if starts is None else starts
    outside = [start for start, depth in zip(starts, depths, strict=False) if not 0 <= start <= width - depth]
    if len(starts) != len(weights) or outside or len(set(depths)) != 1:
        raise CheckError(
            "linear_rows names inputs that there are not",
            expected=f"for each weight the start of {depths[0]} of {width} features",
            found=f"starts {list(starts)} for weights of {depths} inputs",
            where=place_of(node),
        )


def check_expert_linear(node: fx.Node) -> None:
    """Experts that are parameters, with as many inputs as a slot has features, and a whole number for each slot."""
    x, weights, index, bias = (*node.args, None)[:4]
    computed = [one.name for one in (weights, bias) if one is not None and one.op != "get_attr"]
    if computed:
        raise CheckError("expert_linear reads experts that are computed", found=computed[0], where=place_of(node))
    sizes, slots, experts = (one.meta["val"].shape for one in (x, index, weights))
    offsets = experts[:2] if bias is None else bias.meta["val"].shape
    fits = len(sizes) == len(slots) + 1 and sizes[-1] == experts[-1] and sizes[-2] in (1, slots[-1])
    whole = index.meta["val"].dtype == torch.int64
    if len(experts) != 3 or not fits or not whole or tuple(offsets) != tuple(experts[:2]):
        raise CheckError(
            "expert_linear is given what does not fit together",
            expected="x [..., 1 or S, in], experts [E, out, in], int64 [..., S], and a bias [E, out] or none",
            found=f"x {list(sizes)}, experts {list(experts)}, index {list(slots)}, bias {list(offsets)}",
            where=place_of(node),
        )


def derived_values(function: Function) -> tuple[Values, Sizes]:
    """Every node's fake value, derived from the signature, and the names of the sizes in them."""
    inputs, fakes = function.fake_inputs()
    values = derive(function.graph, function.weights, inputs, fakes, strict=True)
    return values, Sizes({size.node.expr: name for name, size in fakes.symbols.items()})


def check_value(node: fx.Node, derived: Any) -> None:
    """What the node's metadata says it holds is what its operands make."""
    if not same_type(node.meta["val"], derived):
        raise CheckError(
            "a node's recorded value is not what its operands make",
            expected=type_text(derived),
            found=type_text(node.meta["val"]),
            where=place_of(node),
            remedy="call function.derive() at the end of a pass that changes types",
        )


def type_text(value: Any) -> str:
    """Dtype and sizes."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_output(function: Function, values: Values, sizes: Sizes) -> None:
    """Logits and hidden states with the rows that the signature promises, then the states."""
    outputs = function.output.args[0]
    count = 2 + len(function.states)
    if not isinstance(outputs, (tuple, list)) or len(outputs) != count:
        raise CheckError(
            "the outputs are not the signature's",
            expected=f"logits, hidden states and {count - 2} states",
            found=outputs,
        )
    rows = (["R"], ["N"]) if function.flat else (["B", "L"], ["B", "L"])
    for name, node, expected in zip(("logits", "hidden states"), outputs, rows, strict=False):
        shape = [sizes.text(size) for size in values[node].shape]
        if shape[:-1] != expected or not values[node].dtype.is_floating_point:
            raise CheckError(
                f"the {name} have the wrong type",
                expected=f"floating point [{', '.join(expected)}, ...]",
                found=f"{values[node].dtype} [{', '.join(shape)}]",
                where=place_of(node),
            )


def check_state(function: Function, state: KVState, values: Values) -> None:
    """One chain of writes from the state's input to its output, every reader in front of the next writer."""
    current = function.placeholder(state.name)
    written: set[int] = set()
    returned = function.output.args[0][2 + function.states.index(state)]
    while True:
        writers = [user for user in current.users if user.target in STATE_WRITES and user.args[0] is current]
        if len(writers) > 1:
            raise state_error(state, "has two writers of one value", "one writer", writers[1])
        for reader in [user for user in current.users if user not in writers and user.op != "output"]:
            if reader.target not in ATTENTION or reader.args[0] is not current:
                raise state_error(state, "is touched by another operator", "kv_append or kv_attend", reader)
            if writers and reader > writers[0]:
                raise state_error(state, "is read after it is written again", f"a read of {writers[0]}", reader)
            check_access(function, state, reader)
            if named_arguments(reader)["layer"] not in written:
                raise state_error(state, "is read where nothing is written", f"a layer of {sorted(written)}", reader)
        if not writers:
            break
        current = writers[0]
        check_access(function, state, current)
        check_rows(state, current, values)
        if current.args[5] in written:
            raise state_error(state, "has a layer that is written twice", "one write of each layer", current)
        written.add(current.args[5])
    if returned is not current:
        raise state_error(state, "is returned before its last write", str(current), returned)


def check_access(function: Function, state: KVState, node: fx.Node) -> None:
    """The layer exists, and the rows are described by the function's own inputs."""
    given = named_arguments(node)
    if not isinstance(given["layer"], int) or not 0 <= given["layer"] < state.layers:
        raise state_error(state, "has no such layer", f"0 to {state.layers - 1}", node)
    reads_pages = node.target is graft.kv_attend_pages.default
    if node.target in ATTENTION and reads_pages != (state.pages is not None):
        raise state_error(state, "is read as what it is not", "pages" if state.pages else "one tensor", node)
    own = {spec.name.removeprefix(f"{state.name}_"): spec.name for spec in state.far_inputs}
    known = {"sequences": "sequences", "positions": "positions", "parents": "parents", "lengths": "lengths"} | own
    expected = {name: function.placeholder(full) for name, full in known.items() if name in given}
    if any(given[name] is not node for name, node in expected.items()):
        raise state_error(state, "is used with rows of another call", f"inputs {', '.join(expected)}", node)


def check_rows(state: KVState, node: fx.Node, values: Values) -> None:
    """What is written has the state's heads and widths."""
    key, value = (values[argument].shape for argument in node.args[1:3])
    found, behind = (key[1], value[1], key[3], value[3]), state.value_dim + state.query_dim
    if found != (state.heads, state.heads, state.key_dim, behind):
        sizes = f"{state.heads} heads of {state.key_dim} + {behind}"
        raise state_error(state, "is written with other sizes", sizes, node)


def state_error(state: KVState, problem: str, expected: str, node: fx.Node) -> CheckError:
    """The error for a broken rule of states."""
    return CheckError(
        f"state {state.name} {problem}", expected=expected, found=node.format_node(), where=place_of(node)
    )
