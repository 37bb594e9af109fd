"""Add a copy of the target that approximate passes change, to draft for it with its weights and its KV.

before:
    def forward(...): kv_1 = kv_append(kv, ..., layer 0); kv_2 = kv_append(kv_1, ..., layer 1); kv_3 = ..., layer 2
after (add-draft{changes=drop-block{index=1,kind=attention}}):
    def forward(...): as before
    def self_draft(...): kv_1 = kv_append(kv, ..., layer 0); kv_2 = kv_append(kv_1, ..., layer 2)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graft.compiler.canonical import graft
from graft.compiler.errors import PassError, PlanError
from graft.compiler.nodes import call_nodes
from graft.compiler.ordering import ordered
from graft.compiler.passing import Contract, Pass, View, lossless
from graft.compiler.program import Function
from graft.compiler.spec import show
from graft.passes.dead_code import DeadCode
from graft.passes.kv_cache import Layout, flatten, row_layout, state_layouts
from graft.passes.merge_linears import MergeLinears

FACTS = frozenset({"canonical", "cache-free"})
"""What holds of the copy."""


@dataclass(frozen=True)
class AddDraft(Pass):
    """Add a function that drafts: the target with some approximations, on the target's own KV state.

    An attention that is left keeps its rows in the layer of the state that it has in the target, so both functions read
    and write one cache.
    """

    changes: tuple[Pass, ...] = ()
    """What to change, in order; passes for functions without a cache, then those for functions with one."""
    function: str = "self_draft"
    """The new function's name."""
    layout: tuple[Pass, ...] = ()
    """What the target's KV state is changed by behind this pass, for which the draft has to read it likewise."""

    contract: ClassVar[Contract] = lossless
    requires: ClassVar[frozenset[str]] = FACTS

    def run(self, view: View) -> None:
        target = view.function
        draft = target.copy()
        draft.name = self.function
        view.add(draft)
        for one in ordered([one for one in self.changes if one.requires <= FACTS], FACTS):
            self.change(draft, one, view)
        aimed = View(view.program, view.by, (self.function,))
        flatten(draft, shared_layouts(draft, target), aimed)
        for one in [one for one in self.changes if not one.requires <= FACTS]:
            self.change(draft, one, view)
        for one in (*self.layout, MergeLinears(), DeadCode()):
            one.run(aimed)

    def change(self, draft: Function, one: Pass, view: View) -> None:
        """Run one of the changes. Raises PassError where it changes nothing."""
        before = [node.format_node() for node in draft.graph.nodes]
        inner = View(view.program, one.pass_name(), (self.function,))
        one.run(inner)
        if before == [node.format_node() for node in draft.graph.nodes]:
            raise PassError(
                f"{show(one)} changes nothing in the draft",
                found=inner.misses[0] if inner.misses else "the same nodes",
                remedy="leave it out, or give it something to do",
            )
        view.note(f"{self.function}: {show(one)}")


def shared_layouts(draft: Function, target: Function) -> list[Layout]:
    """The target's states, and the layer in them of every attention node that the draft has left.

    Raises PassError where a pass changed what a layer keeps of a token, or made an attention that the target lacks.
    """
    found = []
    nodes = {node.name: node for node in call_nodes(draft.graph, [graft.attention.default])}
    for state, layers in state_layouts(target):
        held: dict[fx.Node, int] = {}
        for known, layer in layers.items():
            node = nodes.pop(known.name, None)
            if node is None:
                continue
            if row_layout(node) != row_layout(known):
                raise layout_error(node, f"{row_layout(node)} in the place of {row_layout(known)}")
            held[node] = layer
        if held:
            order = list(draft.graph.nodes)
            found.append((state, dict(sorted(held.items(), key=lambda pair: order.index(pair[0])))))
    if nodes:
        raise layout_error(next(iter(nodes.values())), "an attention that the target does not have")
    if not found:
        raise PassError("a draft needs one attention block at least", found="none", where=f"function {draft.name}")
    return found


def layout_error(node: fx.Node, found: str) -> PassError:
    """The error for a draft that cannot share the target's KV."""
    return PassError(
        "a draft on the target's KV state must keep of a token what the target keeps",
        expected="(kv heads, key dim, value dim, dtype) of every layer as they are",
        found=found,
        where=node.format_node(),
        remedy="leave the pass out, or draft with a compiled model of its own (DraftModel)",
    )


def check_changes(changes: tuple[Pass, ...], where: str) -> None:
    """Raise PlanError for passes that cannot be aimed at a draft: without a function that they change, or on rows."""
    wrong = [one for one in changes if one.contract == "lossless" or not one.requires <= FACTS | {"kv-cache"}]
    if wrong or not changes:
        raise PlanError(
            "a draft is made by passes that change a function",
            expected="one approximate pass or several, which require no more than canonical and cache-free or kv-cache",
            found=", ".join(map(show, wrong)) or "none",
            where=where,
        )
