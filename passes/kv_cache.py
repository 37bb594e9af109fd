"""Turn cache-free attention over dense batches into append and attend on flat ragged tokens with a KV state.

before:
    o = attention(q, k, v, scale, window)
    return logits, hidden
after:
    kv_1 = kv_append(kv, k, v, sequences, lengths, 0)
    o = kv_attend(kv_1, q, sequences, positions, parents, lengths, 0, scale, window)
    return logits[wanted], hidden, kv_1
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graft.compiler.canonical import aten, graft
from graft.compiler.errors import PassError
from graft.compiler.nodes import call_nodes, new_input, untyped_node
from graft.compiler.passing import Contract, Pass, View, exact
from graft.compiler.program import FLAT, Function, KVState
from graft.compiler.trunk import find_trunk


@dataclass(frozen=True)
class KVCache(Pass):
    """The target becomes one function on rows: prefill chunks, single tokens and draft trees of any sequences."""

    contract: ClassVar[Contract] = exact
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "cache-free"})
    provides: ClassVar[frozenset[str]] = frozenset({"kv-cache"})
    breaks: ClassVar[frozenset[str]] = frozenset({"cache-free"})

    def run(self, view: View) -> None:
        for function in view.functions:
            flatten(function, state_layouts(function), view)


Layout = tuple[KVState, dict[fx.Node, int]]
"""A state, and for each attention node that keeps its rows in it the layer there."""


def flatten(function: Function, layouts: list[Layout], view: View) -> None:
    """Bring a dense function, one of the view's, to flat rows over these states."""
    unembedding = find_trunk(function.graph, view.by).unembedding
    function.inputs = FLAT
    function.states = tuple(state for state, _ in layouts)
    inputs = flat_inputs(function)
    select_wanted(unembedding, inputs["wanted"])
    states = [thread_state(inputs[state.name], layers, inputs, view) for state, layers in layouts]
    flatten_outputs(function, states)
    function.graph.eliminate_dead_code()
    fold_sizes(function)
    function.derive()


def row_layout(node: fx.Node) -> tuple[int, int, int, torch.dtype]:
    """What an attention node keeps of a token: kv heads, key dim, value dim, dtype."""
    key, value = (argument.meta["val"] for argument in node.args[1:3])
    return int(key.shape[1]), int(key.shape[3]), int(value.shape[3]), value.dtype


def state_layouts(function: Function) -> list[Layout]:
    """Attention nodes grouped by the cache rows they need, one state for each group."""
    groups: dict[tuple, list[fx.Node]] = {}
    for node in call_nodes(function.graph, [graft.attention.default]):
        groups.setdefault(row_layout(node), []).append(node)
    if not groups:
        raise PassError("kv-cache found no attention", where=f"function {function.name}")
    names = ["kv"] if len(groups) == 1 else [f"kv_{index}" for index in range(len(groups))]
    return [
        (KVState(name, len(nodes), *layout), {node: layer for layer, node in enumerate(nodes)})
        for name, (layout, nodes) in zip(names, groups.items(), strict=True)
    ]


def flat_inputs(function: Function) -> dict[str, fx.Node]:
    """Placeholders for the flat signature; the model's code goes on reading tokens and positions as a batch of one."""
    graph = function.graph
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for spec in (*function.inputs, *(state.input for state in function.states)):
        if spec.name not in inputs:
            inputs[spec.name] = new_input(graph, spec.name)
    for name in ("tokens", "positions"):
        users = list(inputs[name].users)
        with graph.inserting_after(list(inputs.values())[-1]):
            batch = untyped_node(graph, aten.unsqueeze.default, (inputs[name], 0), like=inputs[name])
        for user in users:
            user.replace_input_with(inputs[name], batch)
    return inputs


def select_wanted(unembedding: fx.Node, wanted: fx.Node) -> None:
    """Only the rows whose logits are wanted reach the unembedding."""
    hidden = unembedding.args[0]
    with unembedding.graph.inserting_before(unembedding):
        rows = untyped_node(unembedding.graph, aten.index_select.default, (hidden, 1, wanted), like=hidden)
    unembedding.replace_input_with(hidden, rows)


def thread_state(state: fx.Node, layers: dict[fx.Node, int], inputs: dict[str, fx.Node], view: View) -> fx.Node:
    """Replace the attention nodes by append and attend, the state passed from one to the next; returns the last."""
    graph = state.graph
    sequences, lengths = inputs["sequences"], inputs["lengths"]
    rows = (sequences, inputs["positions"], inputs["parents"], lengths)
    for node, index in layers.items():
        q, k, v, scale, *rest = node.args
        window, softcap, sinks = (*rest, *(0, 0.0, None)[len(rest) :])[:3]
        with graph.inserting_before(node):
            state = untyped_node(graph, graft.kv_append.default, (state, k, v, sequences, lengths, index), like=node)
            options = (index, scale, window, softcap, sinks)
            out = untyped_node(graph, graft.kv_attend.default, (state, q, *rows, *options), like=node)
        node.replace_all_uses_with(out)
        view.match()
    return state


def flatten_outputs(function: Function, states: list[fx.Node]) -> None:
    """Drop the batch dim from logits and hidden states; logits are float32, or float64 where the model is."""
    graph, output = function.graph, function.output
    logits, hidden = output.args[0]
    with graph.inserting_before(output):
        wide = logits
        if logits.meta["val"].dtype not in (torch.float32, torch.float64):
            wide = untyped_node(graph, aten._to_copy.default, (logits,), {"dtype": torch.float32}, like=logits)
        flat = [untyped_node(graph, aten.squeeze.dim, (node, 0), like=logits) for node in (wide, hidden)]
    output.args = ((*flat, *states),)


def fold_sizes(function: Function) -> None:
    """The batch is one: replace its size, read from any input, and what arithmetic makes of it."""
    for node in list(function.graph.nodes):
        if node.target is aten.sym_size.int and node.args[1] == 0 and node.args[0].target is aten.unsqueeze.default:
            node.replace_all_uses_with(1)
        elif node.target is operator.mul and 1 in node.args:
            node.replace_all_uses_with(next((a for a in node.args if a != 1), 1))
    function.graph.eliminate_dead_code()
