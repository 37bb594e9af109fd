"""Giving KV states pages: what writes and reads them goes over to a tail and pages, state by state."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import fx

from graft.compiler.canonical import ATTENTION, aten, graft
from graft.compiler.kv.layout import Pages
from graft.compiler.nodes import named_arguments, new_input, untyped_node
from graft.compiler.program import Function, KVState
from graft.compiler.spec import show

LAYER = {graft.kv_append.default: 5, graft.kv_attend.default: 6}
"""Which argument says the layer."""


def accesses(function: Function, state: KVState) -> list[fx.Node]:
    """The appends and attends of a state, in order."""
    found, values = [], {function.placeholder(state.name)}
    for node in function.graph.nodes:
        if node.target in LAYER and node.args[0] in values:
            found.append(node)
            if node.target is graft.kv_append.default:
                values.add(node)
    return found


def windowed_layers(function: Function, state: KVState) -> tuple[list[int], list[int]]:
    """The layers that read the state, and those of them that do so with a sliding window."""
    given = [named_arguments(node) for node in accesses(function, state) if node.target in ATTENTION]
    return [one["layer"] for one in given], [one["layer"] for one in given if one["window"]]


def split_windows(function: Function, state: KVState, windowed: Collection[int]) -> KVState:
    """Take the layers without a window out of a state, into one of their own, and return that."""
    full = [layer for layer in range(state.layers) if layer not in windowed]
    numbers = {layer: index for layers in (full, sorted(windowed)) for index, layer in enumerate(layers)}
    apart, rest = replace(state, name=f"{state.name}_full", layers=len(full)), replace(state, layers=len(windowed))
    chains = {True: new_input(function.graph, apart.name), False: function.placeholder(state.name)}
    for node in accesses(function, state):
        at = LAYER[node.target]
        layer = node.args[at]
        node.args = (chains[layer in full], *node.args[1:at], numbers[layer], *node.args[at + 1 :])
        if node.target is graft.kv_append.default:
            chains[layer in full] = node
    index, outputs = function.states.index(state), list(function.output.args[0])
    outputs[2 + index] = chains[False]
    function.output.args = ((*outputs, chains[True]),)
    function.states = (*(rest if one is state else one for one in function.states), apart)
    return apart


def add_pages(function: Function, states: Sequence[KVState], pages: Pages) -> list[KVState]:
    """Give these states of a function pages; what becomes of them. Values are to be derived afresh."""
    made = {state: paged(function, state, pages) for state in states}
    function.states = tuple(made.get(state, state) for state in function.states)
    for state in made.values():
        for spec in state.far_inputs:
            new_input(function.graph, spec.name)
    for state in made.values():
        rewrite(function, state)
    return list(made.values())


def paged(function: Function, state: KVState, pages: Pages) -> KVState:
    """The state with pages, and with room for queries where something reads those."""
    if not pages.reads_queries:
        return replace(state, pages=pages)
    attend = next(node for node in accesses(function, state) if node.target in ATTENTION)
    heads = int(attend.args[1].meta["val"].shape[1])
    scale = float(named_arguments(attend)["scale"])
    return replace(state, pages=pages, query_dim=heads // state.heads * state.key_dim, scale=scale)


def rewrite(function: Function, state: KVState) -> None:
    """Let appends go to the tail, with queries where they are kept, and attention read pages and tail."""
    graph, given = function.graph, {spec.name.removeprefix(f"{state.name}_"): spec.name for spec in state.far_inputs}
    far = {name: function.placeholder(full) for name, full in given.items()}
    assert state.pages is not None
    codec, selection = show(state.pages.codec), show(state.pages.selection) if state.pages.selection else ""
    nodes = accesses(function, state)
    queries = {node.args[6]: node.args[1] for node in nodes if node.target in ATTENTION}
    for node in nodes:
        with graph.inserting_before(node):
            if node.target is graft.kv_append.default:
                kv, k, v, sequences, _, layer = node.args
                if state.query_dim:
                    v = beside(graph, v, queries[layer], state.heads)
                new = untyped_node(graph, node.target, (kv, k, v, sequences, far["lengths"], layer), like=node)
            else:
                old = named_arguments(node)
                rows = (old["sequences"], old["parents"], far["lengths"], far["starts"])
                stored = (far["pages"], far["table"], far["counts"], far.get("labels"), far.get("channels"))
                how = (old["layer"], state.value_dim, old["scale"], old["softcap"], old["sinks"], codec, selection)
                new = untyped_node(
                    graph, graft.kv_attend_pages.default, (old["kv"], old["q"], *rows, *stored, *how), like=node
                )
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def beside(graph: fx.Graph, v: fx.Node, q: fx.Node, heads: int) -> fx.Node:
    """Values [1, kv heads, N, value dim], behind each the queries of its group, which q [1, heads, N, d] has."""
    queries = int(q.meta["val"].shape[1])
    group = queries // heads
    each = [untyped_node(graph, aten.slice.Tensor, (q, 1, index, queries, group), like=q) for index in range(group)]
    return untyped_node(graph, aten.cat.default, ([v, *each], -1), like=v)
