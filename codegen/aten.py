"""Runs a function through ATen: every operator as torch has it, the KV state written in place.

The function's values stay values: only what the checker has shown to have one successor, the states, becomes a buffer
that is written. What depends on the call's rows alone (places in the cache, ancestry, masks) is computed once per
call and shared by all layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from graft.codegen.guards import guarded_nodes
from graft.codegen.skips import SkipCount
from graft.compiler.canonical import ATTENTION, MATMULS, graft
from graft.compiler.cost import CostModel, Workload
from graft.compiler.errors import LoweringError
from graft.compiler.nodes import call_nodes, named_arguments
from graft.compiler.ops import NO_PARENT, softmax_attention
from graft.compiler.program import FLAT, Function, KernelRecord
from graft.compiler.shapes import attribute


class Layout:
    """Where the rows of one call stand, and what each may see."""

    def __init__(self, sequences: Tensor, positions: Tensor, parents: Tensor, lengths: Tensor) -> None:
        self.device = sequences.device
        slots, self.positions, self.parents = sequences.tolist(), positions, parents.tolist()
        lengths_list = lengths.tolist()
        starts = [row for row, slot in enumerate(slots) if row == 0 or slot != slots[row - 1]]
        self.runs = [
            (slots[start], lengths_list[slots[start]], start, end)
            for start, end in zip(starts, [*starts[1:], len(slots)], strict=True)
        ]
        """(slot, committed tokens, first row, row after the last) of each sequence in the call."""
        self.sequences = sequences
        self.masks: dict[tuple[int, int], Tensor | None] = {}

    @cached_property
    def places(self) -> Tensor:
        """int64 [N]: where in its slot each row is written."""
        spans = [torch.arange(length, length + end - start) for _, length, start, end in self.runs]
        return torch.cat(spans).to(self.device)

    def is_chain(self, start: int, end: int) -> bool:
        """Whether each of these rows follows the one before it."""
        return self.parents[start] == NO_PARENT and self.parents[start + 1 : end] == list(range(start, end - 1))

    def mask(self, run: int, window: int) -> Tensor | None:
        """bool [rows, committed + rows] of one sequence; None where every row sees every key."""
        if (run, window) not in self.masks:
            self.masks[run, window] = self.make_mask(*self.runs[run][1:], window)
        return self.masks[run, window]

    def make_mask(self, length: int, start: int, end: int, window: int) -> Tensor | None:
        count = end - start
        if count == 1 and not (window and length + 1 > window):
            return None
        visible = torch.ones(count, length + count, dtype=torch.bool)
        if self.is_chain(start, end):
            visible[:, length:] = torch.ones(count, count, dtype=torch.bool).tril()
        else:
            own: list[list[bool]] = []
            for row in range(start, end):
                parent = self.parents[row]
                above = own[parent - start] if parent != NO_PARENT else [False] * count
                own.append([seen or column == row - start for column, seen in enumerate(above)])
            visible[:, length:] = torch.tensor(own)
        if window:
            positions = self.positions[start:end].cpu()
            keys = torch.cat([torch.arange(length), positions])
            visible &= positions[:, None] - keys[None, :] < window
        return visible.to(self.device)


def append(layout: Layout, kv: Tensor, k: Tensor, v: Tensor, layer: int) -> None:
    """Write this call's keys and values (graft::kv_append) in place."""
    key_dim = k.shape[-1]
    if len(layout.runs) == 1:
        slot, length, start, end = layout.runs[0]
        target = kv[layer, slot, :, length : length + end - start]
        target[..., :key_dim] = k[0]
        target[..., key_dim:] = v[0]
    else:
        rows = kv[layer]
        rows[..., :key_dim][layout.sequences, :, layout.places] = k[0].transpose(0, 1)
        rows[..., key_dim:][layout.sequences, :, layout.places] = v[0].transpose(0, 1)


def attend(
    layout: Layout, kv: Tensor, q: Tensor, layer: int, scale: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """graft::kv_attend, sequence by sequence: [1, N, heads, value dim]."""
    outs = []
    for run, (slot, length, start, end) in enumerate(layout.runs):
        stored = kv[layer, slot, :, : length + end - start]
        keys, values = stored[..., : q.shape[-1]], stored[..., q.shape[-1] :]
        rows = q[:, :, start:end]
        if softcap or sinks is not None:
            visible = layout.mask(run, window)
            if visible is None:
                visible = torch.ones(end - start, stored.shape[1], dtype=torch.bool, device=q.device)
            out = softmax_attention(rows, keys[None], values[None], visible, scale, softcap, sinks)[0]
        else:
            out = grouped_attention(rows[0], keys, values, layout, run, scale, window)
        outs.append(out.transpose(0, 1))
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]


def grouped_attention(
    q: Tensor, keys: Tensor, values: Tensor, layout: Layout, run: int, scale: float, window: int
) -> Tensor:
    """[heads, rows, value dim] of one sequence: the query heads that share a kv head become rows of it, so that no key
    is copied."""
    _, length, start, end = layout.runs[run]
    heads, count, _ = q.shape
    groups = heads // keys.shape[0]
    if length == 0 and not window and count > 1 and layout.is_chain(start, end):
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, dim=0), values.repeat_interleave(groups, dim=0)
        return scaled_dot_product_attention(q[None], keys[None], values[None], is_causal=True, scale=scale)[0]
    mask = layout.mask(run, window)
    if mask is not None and groups > 1:
        mask = mask.repeat(groups, 1)
    grouped = q.reshape(1, keys.shape[0], groups * count, q.shape[-1])
    out = scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=mask, scale=scale)
    return out.reshape(heads, count, values.shape[-1])


class AtenExecutable:
    """A function as a GraphModule over ATen, states written in place."""

    backend = "aten"
    invariant = False
    """A library matmul may sum in another order for another number of rows."""

    kernels: tuple[KernelRecord, ...] = ()
    prediction = None
    memory: Mapping[str, int] = MappingProxyType({})
    panels: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, function: Function) -> None:
        if not function.flat:
            raise LoweringError(
                "only functions on flat rows can be lowered",
                expected=", ".join(spec.name for spec in FLAT),
                found=", ".join(spec.name for spec in function.inputs),
                where=f"function {function.name}",
                remedy="run the kv-cache pass first",
            )
        self.function = function
        self.guarded = guarded_nodes(function)
        self.skipped = torch.zeros(len(self.guarded), 4, dtype=torch.int64, device=function.device)
        self.module = fx.GraphModule(function.weights, in_place(function, [one.mask for one in self.guarded]))
        self.run: Callable[..., tuple[Tensor, ...]] = self.module.forward

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits, hidden, *masks = self.run(*inputs)
        if masks:
            wanted = [(mask != 0).flatten() == one.wanted for mask, one in zip(masks, self.guarded, strict=True)]
            self.skipped += torch.stack([tally(one) for one in wanted])
        return logits, hidden

    @property
    def skips(self) -> tuple[SkipCount, ...]:
        """See codegen.executable.Executable."""
        costs = CostModel(self.function)
        found = []
        for one, counts in zip(self.guarded, self.skipped.tolist(), strict=True):
            products = [costs.node(node) for node in one.nodes if node.target in MATMULS]
            weights = sum(int(cost.at(Workload()).weights) for cost in products)
            found.append(SkipCount(one.name, one.regions, weights, *counts))
        return tuple(found)

    def share_threads(self, beside: object) -> None:
        """See codegen.executable.Executable: torch's threads are shared by all."""

    def forget_skips(self) -> None:
        """See codegen.executable.Executable."""
        self.skipped.zero_()

    def top(self, logits: Tensor, count: int) -> Tensor | None:
        """See codegen.executable.Executable."""
        return None

    def read_plain(self) -> set[int]:
        """See codegen.executable.Executable: ATen reads every parameter as it is."""
        function = self.function
        names = [node.target for node in function.graph.nodes if node.op == "get_attr"]
        return {attribute(function.weights, name).data_ptr() for name in names}

    @property
    def source(self) -> str:
        """The generated Python."""
        return self.module.code


def tally(wanted: Tensor) -> Tensor:
    """int64 [4] of a call: one call, one that no row needed, rows, rows that did not need it."""
    rows, needed = torch.tensor(wanted.numel(), device=wanted.device), wanted.sum()
    return torch.stack([torch.ones_like(rows), (needed == 0).long(), rows, rows - needed])


def in_place(function: Function, shown: Sequence[str] = ()) -> fx.Graph:
    """The function's graph with appends and attends replaced by their in-place forms; in the place of the states it
    returns the nodes of these names."""
    graph = copy.deepcopy(function.graph)
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    touching = call_nodes(graph, [graft.kv_append.default, *ATTENTION - {graft.attention.default}])
    layouts: dict[fx.Node, fx.Node] = {}
    for lengths in dict.fromkeys(named_arguments(node)["lengths"] for node in touching):
        with graph.inserting_after(list(inputs.values())[-1]):
            rows = (*(inputs[name] for name in ("sequences", "positions", "parents")), lengths)
            layouts[lengths] = graph.call_function(Layout, rows)
    for node in touching:
        state, buffer = node.args[0], state_input(node)
        layout = layouts[named_arguments(node)["lengths"]]
        with graph.inserting_before(node):
            if node.target is graft.kv_append.default:
                _, k, v, _, _, layer = node.args
                graph.call_function(append, (layout, buffer, k, v, layer))
            elif node.target is graft.kv_attend_pages.default:
                # Its reference meaning decodes every page at every step: right, and no more than that.
                node.replace_all_uses_with(graph.call_function(node.target, (buffer, *node.args[1:])))
            else:
                _, q, _, _, _, _, *rest = node.args
                out = graph.call_function(attend, (layout, buffer, q, *rest))
                node.replace_all_uses_with(out)
        assert isinstance(state, fx.Node)
    output = graph.output_node()
    named = {node.name: node for node in graph.nodes}
    output.args = ((*output.args[0][:2], *(named[name] for name in shown)),)
    for node in reversed(touching):
        graph.erase_node(node)
    graph.lint()
    return graph


def state_input(node: fx.Node) -> fx.Node:
    """The placeholder that a state value comes from."""
    state: Any = node.args[0]
    while state.op != "placeholder":
        state = state.args[0]
    return state
