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
from typing import Any, ClassVar

import torch
from torch import fx

from graft.compiler.canonical import aten, graft
from graft.compiler.errors import PassError
from graft.compiler.nodes import call_nodes, new_node
from graft.compiler.passing import Contract, Pass, View, exact
from graft.compiler.program import FLAT, Function, KVState


@dataclass(frozen=True)
class KVCache(Pass):
    """The target becomes one function on rows: prefill chunks, single tokens and draft trees of any sequences."""

    contract: ClassVar[Contract] = exact
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "cache-free"})
    provides: ClassVar[frozenset[str]] = frozenset({"kv-cache"})
    breaks: ClassVar[frozenset[str]] = frozenset({"cache-free"})

    def run(self, view: View) -> None:
        for function in view.functions:
            unembedding = view.trunk.unembedding
            layouts = state_layouts(function)
            function.inputs = FLAT
            function.states = tuple(state for state, _ in layouts)
            inputs = flat_inputs(function, view.by)
            select_wanted(function, unembedding, inputs["wanted"], view.by)
            states = [thread_state(function, state, nodes, inputs, view) for state, nodes in layouts]
            flatten_outputs(function, states, view.by)
            function.graph.eliminate_dead_code()
            fold_sizes(function)
            function.derive()


def state_layouts(function: Function) -> list[tuple[KVState, list[fx.Node]]]:
    """Attention nodes grouped by the cache rows they need, one state for each group."""
    groups: dict[tuple, list[fx.Node]] = {}
    for node in call_nodes(function.graph, [graft.attention.default]):
        key, value = (argument.meta["val"] for argument in node.args[1:3])
        layout = (int(key.shape[1]), int(key.shape[3]), int(value.shape[3]), value.dtype)
        groups.setdefault(layout, []).append(node)
    if not groups:
        raise PassError("kv-cache found no attention", where=f"function {function.name}")
    names = ["kv"] if len(groups) == 1 else [f"kv_{index}" for index in range(len(groups))]
    return [
        (KVState(name, len(nodes), *layout), nodes) for name, (layout, nodes) in zip(names, groups.items(), strict=True)
    ]


def flat_inputs(function: Function, by: str) -> dict[str, fx.Node]:
    """Placeholders for the flat signature; the model's code goes on reading tokens and positions as a batch of one."""
    graph, inputs = function.graph, {}
    old = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    first = next(iter(graph.nodes))
    for spec in (*function.inputs, *(state.input for state in function.states)):
        if spec.name in old:
            inputs[spec.name] = old[spec.name]
        else:
            with graph.inserting_before(first):
                inputs[spec.name] = graph.placeholder(spec.name)
        first.prepend(inputs[spec.name])
    for name in ("tokens", "positions"):
        users = list(old[name].users)
        with graph.inserting_before(first):
            batch = graph.call_function(aten.unsqueeze.default, (old[name], 0))
        batch.meta = {"val": old[name].meta["val"], "origin": old[name].meta["origin"]}
        for user in users:
            user.replace_input_with(old[name], batch)
    return inputs


def select_wanted(function: Function, unembedding: fx.Node, wanted: fx.Node, by: str) -> None:
    """Only the rows whose logits are wanted reach the unembedding."""
    hidden = unembedding.args[0]
    with function.graph.inserting_before(unembedding):
        rows = function.graph.call_function(aten.index_select.default, (hidden, 1, wanted))
    rows.meta = dict(hidden.meta)
    unembedding.replace_input_with(hidden, rows)


def thread_state(function: Function, state: KVState, nodes: list[fx.Node], inputs: dict, view: View) -> fx.Node:
    """Replace the attention nodes by append and attend, the state passed from one to the next; returns the last."""
    graph, current = function.graph, inputs[state.name]
    for index, node in enumerate(nodes):
        q, k, v, scale, *rest = node.args
        window, softcap, sinks = (*rest, *(0, 0.0, None)[len(rest) :])[:3]
        with graph.inserting_before(node):
            current = bare(graph, graft.kv_append.default, (current, k, v, inputs["sequences"], inputs["lengths"], index), node)
            rows = (inputs["sequences"], inputs["positions"], inputs["parents"], inputs["lengths"])
            out = bare(graph, graft.kv_attend.default, (current, q, *rows, index, scale, window, softcap, sinks), node)
        node.replace_all_uses_with(out)
        view.match()
    return current


def bare(graph: fx.Graph, target: Any, args: tuple, like: fx.Node) -> fx.Node:
    """A node whose fake value is derived only when the whole function has its new signature."""
    node = graph.call_function(target, args)
    node.meta["origin"] = like.meta["origin"]
    return node


def flatten_outputs(function: Function, states: list[fx.Node], by: str) -> None:
    """Drop the batch dim from logits and hidden states; logits are float32, or float64 where the model is."""
    graph, output = function.graph, function.output
    logits, hidden = output.args[0]
    with graph.inserting_before(output):
        if logits.meta["val"].dtype not in (torch.float32, torch.float64):
            logits = bare(graph, aten._to_copy.default, (logits,), logits)
            logits.kwargs = {"dtype": torch.float32}
        logits, hidden = (bare(graph, aten.squeeze.dim, (node, 0), like) for node, like in zip((logits, hidden), output.args[0], strict=True))
    output.args = ((logits, hidden, *states),)


def fold_sizes(function: Function) -> None:
    """The batch is one: replace its size, read from any input, and what arithmetic makes of it."""
    for node in list(function.graph.nodes):
        if node.target is aten.sym_size.int and node.args[1] == 0 and node.args[0].target is aten.unsqueeze.default:
            node.replace_all_uses_with(1)
        elif node.target is operator.mul and 1 in node.args:
            node.replace_all_uses_with(next((a for a in node.args if a != 1), 1))
    function.graph.eliminate_dead_code()
