"""Cut the target in two behind a layer: what is below drafts and is not run again when the draft is verified.

before:
    def forward(tokens, ..., kv): x = layers 0 to 29 of embedding(tokens); return unembed(norm(x)), norm(x), kv
after (split{layers=12}):
    def forward(...): as before
    def shallow_12(tokens, ..., kv): x = layers 0 to 11 of embedding(tokens); return unembed(norm(x)), x, kv
    def deep_12(tokens, ..., hidden, kv): x = layers 12 to 29 of hidden; return unembed(norm(x)), norm(x), kv
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graft.compiler.canonical import STATE_WRITES, aten
from graft.compiler.errors import PassError
from graft.compiler.host import exit_questions, split_host
from graft.compiler.nodes import untyped_node
from graft.compiler.passing import Contract, Pass, View, lossless
from graft.compiler.program import FLAT, Function, Input
from graft.compiler.trunk import HIDDEN, Trunk, find_trunk
from graft.passes.early_exit import check_exit
from graft.passes.exit_adapter import attach_adapter
from graft.passes.heads.taps import tapped


@dataclass(frozen=True)
class Split(Pass):
    """For each layer two functions on the target's KV state, which the host program calls in the place of `forward`.

    `shallow_N` runs the layers below N and has logits of its own, `deep_N` goes on from the hidden states it returned.
    The early logits are the final norm and unembedding of the stream at the exit (LayerSkip, 2404.16710), or with an
    adapter those of Kangaroo (2404.18911).
    """

    layers: tuple[int, ...]
    """How many layers are below, one cut for each."""
    adapter: str = ""
    """A safetensors file of adapter weights, see `Kangaroo`."""

    contract: ClassVar[Contract] = lossless
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "kv-cache"})

    def run(self, view: View) -> None:
        if known := exit_questions(view.program.functions):
            raise PassError(
                "the target is split by another drafter already",
                expected="one drafter that splits the target",
                found=f"exits behind layers {', '.join(map(str, known))} and {', '.join(map(str, self.layers))}",
                remedy="leave one of the two out; one that chooses among exits takes several layers",
            )
        if len(tapped(view.function.output.args[0][1])) > 1:
            raise PassError(
                f"{view.by} cuts a target of which another drafter reads streams",
                expected="a target that only hands out its final hidden states",
                found="streams inside it, beside them",
                remedy="leave one of the two drafters out",
            )
        for layer in self.layers:
            check_exit(view.trunk, layer, view.by)
            view.add(shallow(view, layer, self.adapter))
            view.add(deep(view, layer))
        view.program.host = split_host(self.layers)


def shallow(view: View, layer: int, adapter: str) -> Function:
    """The layers below `layer`; hidden states are the stream behind them."""
    function, trunk, stream = cut(view, f"shallow_{layer}", layer)
    if adapter:
        attach_adapter(view, function, trunk, layer, adapter)
    else:
        for block in reversed([block for one in trunk.layers[layer:] for block in one]):
            block.drop()
    output = function.output
    with function.graph.inserting_before(output):
        flat = untyped_node(function.graph, aten.squeeze.dim, (stream, 0), like=stream)
    logits, _, *states = output.args[0]
    output.args = ((logits, flat, *states),)
    function.graph.eliminate_dead_code()
    function.derive()
    return function


def deep(view: View, layer: int) -> Function:
    """The layers from `layer` on, over hidden states [N, width]."""
    function, _, stream = cut(view, f"deep_{layer}", layer)
    value, graph = stream.meta["val"], function.graph
    for write in [node for node in graph.nodes if node.target in STATE_WRITES and node < stream]:
        write.replace_all_uses_with(write.args[0])
    function.inputs = (*FLAT, Input(HIDDEN, ("N", int(value.shape[-1])), value.dtype))
    with graph.inserting_after(function.placeholder(FLAT[-1].name)):
        given = graph.placeholder(HIDDEN)
    with graph.inserting_before(next(node for node in graph.nodes if node.op == "call_function")):
        batch = untyped_node(graph, aten.unsqueeze.default, (given, 0), like=stream)
    stream.replace_all_uses_with(batch)
    graph.eliminate_dead_code()
    function.derive()
    return function


def cut(view: View, name: str, layer: int) -> tuple[Function, Trunk, fx.Node]:
    """A copy of the target under a name, its trunk, and the stream in front of the layer."""
    function = view.function.copy()
    function.name = name
    trunk = find_trunk(function.graph, view.by)
    return function, trunk, trunk.layers[layer][0].stream
