"""Taps: streams inside the target that its function hands out beside the final hidden states."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graft.compiler.canonical import aten
from graft.compiler.errors import PassError
from graft.compiler.host import exit_questions
from graft.compiler.nodes import new_node, untyped_node
from graft.compiler.passing import View
from graft.compiler.trunk import Trunk


def tap(view: View, layers: Sequence[int]) -> tuple[int, list[int]]:
    """Let the target's hidden states be followed, in the same rows, by the streams in front of these layers; N of N
    layers is the stream behind the last one.

    Returns the width of a row, and where in it each stream begins. What is handed out already is not handed out again,
    and stays where it is: a function that reads the first numbers of a row goes on reading the same. Raises PassError
    for a layer that the target does not have, and for a target that is cut in two.
    """
    function, trunk = view.function, view.trunk
    if known := exit_questions(view.program.functions):
        raise PassError(
            f"{view.by} reads streams of a target that another drafter splits",
            expected="a target that runs as a whole",
            found=f"exits behind layers {', '.join(map(str, known))}",
            remedy="leave one of the two drafters out",
        )
    logits, hidden, *states = function.output.args[0]
    wanted = [of_type(stream_before(trunk, layer, view.by), hidden) for layer in layers]
    parts = tapped(hidden)
    with function.graph.inserting_before(function.output):
        for stream in wanted:
            if all(part.args[0] is not stream for part in parts[1:]):
                parts.append(untyped_node(function.graph, aten.squeeze.dim, (stream, 0), like=stream))
        both = untyped_node(function.graph, aten.cat.default, (parts, -1), like=hidden)
    function.output.args = ((logits, both, *states),)
    function.graph.eliminate_dead_code()
    function.derive()
    widths = [int(part.meta["val"].shape[-1]) for part in parts]
    starts = [next(sum(widths[:at]) for at, part in enumerate(parts) if at and part.args[0] is one) for one in wanted]
    return sum(widths), starts


def tapped(hidden: fx.Node) -> list[fx.Node]:
    """The final hidden states, and the streams that a target's second result has beside them."""
    return list(hidden.args[0]) if hidden.target is aten.cat.default else [hidden]


def of_type(stream: fx.Node, hidden: fx.Node) -> fx.Node:
    """The stream in the element type of the hidden states; some models add in a wider one."""
    dtype = hidden.meta["val"].dtype
    if stream.meta["val"].dtype == dtype:
        return stream
    with stream.graph.inserting_after(stream):
        return new_node(stream.graph, aten._to_copy.default, (stream,), {"dtype": dtype}, like=stream)


def stream_before(trunk: Trunk, layer: int, by: str) -> fx.Node:
    """The stream in front of a layer. Raises PassError where there is none."""
    count = len(trunk.layers)
    if not 0 <= layer <= count:
        raise PassError(
            f"{by} reads a stream that the model does not have",
            expected=f"in front of one of its layers, 0 to {count}",
            found=layer,
            remedy="the heads are for a model of more layers",
        )
    return trunk.exit if layer == count else trunk.layers[layer][0].stream
