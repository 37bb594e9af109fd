"""Keep far tokens of a KV state in pages: encoded, given up, or read in part.

before:
    kv_1 = kv_append(kv, k, v, sequences, lengths, 0)
    o = kv_attend(kv_1, q, sequences, positions, parents, lengths, 0, 0.25)
    return o, kv_1
after (compress-kv{codec=affine}):
    kv_1 = kv_append(kv, k, v, sequences, kv_lengths, 0)
    o = kv_attend_pages(kv_1, q, sequences, parents, kv_lengths, kv_starts, kv_pages, kv_table, kv_counts, None, None,
                        0, 16, 0.25, 0.0, None, "affine", "")
    return o, kv_1
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import fx

from graft.compiler.canonical import ATTENTION, aten, graft
from graft.compiler.errors import PassError
from graft.compiler.kv.codecs import IN_PLACE, Codec
from graft.compiler.kv.eviction import Eviction
from graft.compiler.kv.layout import Pages
from graft.compiler.kv.selection import Selection
from graft.compiler.nodes import named_arguments, new_input, sort_nodes, untyped_node
from graft.compiler.passing import Contract, Pass, View, approximate
from graft.compiler.pipeline import PassWarning
from graft.compiler.program import Function, KVState
from graft.compiler.spec import show

TARGET = "forward"
"""Name of the target's function."""


@dataclass(frozen=True)
class CompressKV(Pass):
    """The KV cache of full attention, compressed by a codec, an eviction policy, a selection, or several of them.

    Tokens that are far, in front of a cut that moves every `every` tokens, are read from pages; `recent` tokens or more
    stay dense behind it (compiler/kv/layout.py). Attention with a sliding window is left as it is: what it reads is
    bounded already. On the target the output changes, and is the same however it is decoded; on a draft (`SelfDraft`)
    it never does.
    """

    codec: Codec = IN_PLACE
    """How far tokens are stored; in place: not at all, for a selection among them."""
    eviction: Eviction | None = None
    """Which of them are given up."""
    selection: Selection | None = None
    """Which of them a row reads."""
    recent: int = 64
    every: int = 64
    prompt: Literal["streamed", "dense"] = "streamed"
    """Whether the cut moves in the prompt, too, or first at its end."""

    contract: ClassVar[Contract] = approximate
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "kv-cache"})

    def __post_init__(self) -> None:
        self.pages  # noqa: B018  (refuses what does not go together)

    @property
    def pages(self) -> Pages:
        """The layout. Raises PlanError for options that do not go together."""
        return Pages(self.codec, self.eviction, self.selection, self.recent, self.every, self.prompt)

    def run(self, view: View) -> None:
        if self.eviction is not None and TARGET in view.side:
            text = "gives tokens up: perplexity may hardly show it, yet what a text asks for later can be gone"
            warnings.warn(f"{show(self)} {text}", PassWarning, stacklevel=2)
        for function in view.functions:
            fitting = [state for state in function.states if fits(function, state, view)]
            states = {state.name: paged(function, state, self.pages) for state in fitting}
            function.states = tuple(states.get(state.name, state) for state in function.states)
            for state in states.values():
                for spec in state.far_inputs:
                    new_input(function.graph, spec.name)
            for state in states.values():
                rewrite(function, state, view)
                view.note(f"{state.name}: {state.bytes_per_token:.0f} bytes per far token")
            sort_nodes(function.graph)
            function.derive()


def accesses(function: Function, state: KVState) -> list[fx.Node]:
    """The appends and attends of a state, in order."""
    found, values = [], {function.placeholder(state.name)}
    for node in function.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and node.args[:1] and node.args[0] in values:
            found.append(node)
            if node.target is graft.kv_append.default:
                values.add(node)
    return found


def fits(function: Function, state: KVState, view: View) -> bool:
    """Whether the state can have pages: nothing that reads it has a window."""
    if state.pages is not None:
        raise PassError(
            f"the state {state.name} is compressed already",
            found=show(state.pages.codec),
            where=f"function {function.name}",
            remedy="give one compress-kv all of codec, eviction and selection",
        )
    attends = [node for node in accesses(function, state) if node.target in ATTENTION]
    windows = [node for node in attends if named_arguments(node)["window"]]
    if windows:
        view.miss(state.name, f"{len(windows)} of {len(attends)} attentions have a sliding window")
    return not windows


def paged(function: Function, state: KVState, pages: Pages) -> KVState:
    """The state with pages, and with room for queries where something reads those."""
    if not pages.reads_queries:
        return replace(state, pages=pages)
    attend = next(node for node in accesses(function, state) if node.target in ATTENTION)
    heads = int(attend.args[1].meta["val"].shape[1])
    scale = float(named_arguments(attend)["scale"])
    return replace(state, pages=pages, query_dim=heads // state.heads * state.key_dim, scale=scale)


def rewrite(function: Function, state: KVState, view: View) -> None:
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
        view.match()


def beside(graph: fx.Graph, v: fx.Node, q: fx.Node, heads: int) -> fx.Node:
    """Values [1, kv heads, N, value dim], behind each the queries of its group, which q [1, heads, N, d] has."""
    queries = int(q.meta["val"].shape[1])
    group = queries // heads
    each = [untyped_node(graph, aten.slice.Tensor, (q, 1, index, queries, group), like=q) for index in range(group)]
    return untyped_node(graph, aten.cat.default, ([v, *each], -1), like=v)
