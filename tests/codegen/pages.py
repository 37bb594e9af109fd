"""Functions that are one attention over pages, and what they are called with: slots and heads have their own pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

import graft.components
from graft.compiler.canonical import aten, graft
from graft.compiler.kv.codecs import IN_PLACE, PAGE, Codec, Content, DensePages
from graft.compiler.kv.layout import Pages
from graft.compiler.kv.selection import Selection
from graft.compiler.program import FLAT, Function, Input, KVState
from graft.compiler.spec import show


@dataclass(frozen=True)
class Unread(DensePages):
    """A codec that only its decoder in torch reads."""

    loader: ClassVar[str] = ""


@dataclass(frozen=True)
class Case:
    """An attention."""

    codec: Codec = IN_PLACE
    selection: Selection | None = None
    dtype: torch.dtype = torch.float32
    heads: int = 2
    group: int = 3
    key_dim: int = 64
    value_dim: int = 64
    softcap: float = 0.0
    queries: bool = False
    """Whether queries are kept beside keys."""
    layers: int = 3

    @property
    def state(self) -> KVState:
        query_dim = self.group * self.key_dim if self.queries else 0
        pages = Pages(self.codec, None, self.selection)
        sizes = (self.layers, self.heads, self.key_dim, self.value_dim)
        return KVState("kv", *sizes, self.dtype, query_dim, pages=pages)

    @property
    def row_inputs(self) -> tuple[Input, ...]:
        sizes = {"q": self.heads * self.group * self.key_dim, "k": self.heads * self.key_dim}
        sizes["v"] = self.heads * (self.value_dim + self.state.query_dim)
        return tuple(Input(name, ("N", size), self.dtype) for name, size in sizes.items())

    @property
    def scale(self) -> float:
        return self.key_dim**-0.5

    def function(self, layers: Sequence[int] = (2,)) -> Function:
        """Appends and attends in each of these layers, with the same keys and queries."""
        state, graph = self.state, fx.Graph()
        names = [spec.name for spec in (*FLAT, *self.row_inputs, state.input, *state.far_inputs)]
        given = {name: graph.placeholder(name) for name in names}

        def heads(name: str, count: int) -> fx.Node:
            split = graph.call_function(aten.reshape.default, (given[name], [1, -1, count, self.width(name)]))
            return graph.call_function(aten.permute.default, (split, [0, 2, 1, 3]))

        q, k, v = heads("q", self.heads * self.group), heads("k", self.heads), heads("v", self.heads)
        far = {spec.name.removeprefix("kv_"): given[spec.name] for spec in state.far_inputs}
        kv, outs = given["kv"], []
        for layer in layers:
            kv = graph.call_function(
                graft.kv_append.default, (kv, k, v, given["sequences"], far["lengths"], layer)
            )
            rows = (given["sequences"], given["parents"], far["lengths"], far["starts"])
            stored = (far["pages"], far["table"], far["counts"], far.get("labels"), far.get("channels"))
            how = (layer, self.value_dim, self.scale, self.softcap, None, show(self.codec))
            chosen = show(self.selection) if self.selection else ""
            outs.append(graph.call_function(graft.kv_attend_pages.default, (kv, q, *rows, *stored, *how, chosen)))
        out = graph.call_function(aten.cat.default, (outs, 2)) if len(outs) > 1 else outs[0]
        width = len(layers) * self.heads * self.group * self.value_dim
        flat = graph.call_function(aten.reshape.default, (out, [-1, width]))
        wanted = graph.call_function(aten.index_select.default, (flat, 0, given["wanted"]))
        logits = graph.call_function(aten._to_copy.default, (wanted,), {"dtype": torch.float32})
        graph.output((logits, flat, kv))
        function = Function("forward", graph, nn.Module(), (*FLAT, *self.row_inputs), (state,))
        function.derive()
        return function

    def width(self, name: str) -> int:
        """Elements of a head of q, k or v."""
        return self.value_dim + self.state.query_dim if name == "v" else self.key_dim


@dataclass
class Stored:
    """A state with far entries: [slots] tokens in all, and everything a function is called with behind its rows."""

    lengths: Tensor
    tensors: list[Tensor]


def random_stored(case: Case, far: Sequence[int], tail: Sequence[int], seed: int = 0, ragged: bool = True) -> Stored:
    """Slots with so many far tokens and so many behind the cut. Where heads may differ in their entries they do."""
    generator = torch.Generator().manual_seed(seed)
    state, slots, most = case.state, len(far), -(-max(*far, 1) // PAGE)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(case.dtype)

    in_place, per_head = case.codec.in_place, (state.layers, slots, state.heads)
    whole = torch.tensor(far)
    counts = whole[None, :, None].expand(per_head).clone()
    if ragged and not in_place:
        counts -= torch.randint(0, 70, per_head, generator=generator)
        counts[..., 0] = whole
        counts.clamp_(min=0)
    held = torch.tensor(tail) + (whole if in_place else 0)
    kv = random(*per_head, int(held.max()) + 40, state.width)
    keys = random(*per_head, most * PAGE, case.key_dim) * (1 + torch.arange(case.key_dim) % 5).to(case.dtype)
    values = random(*per_head, most * PAGE, case.value_dim)
    if in_place:
        keys[..., : kv.shape[3], :] = kv[..., : most * PAGE, : case.key_dim]
    content = [one.unflatten(3, (most, PAGE)) for one in (keys, values)]
    queries = random(*per_head, most, 96, case.key_dim)
    pages = case.codec.encode(Content(*content, queries)).flatten(0, 3)
    order = torch.randperm(len(pages), generator=generator)
    table = order.argsort().int().view(*per_head, most)
    stored = [held, whole if in_place else torch.zeros_like(whole), pages[order], table, counts.int()]
    if case.selection is not None:
        width = case.selection.width(case.key_dim)
        channels = torch.rand(*per_head, case.key_dim, generator=generator).argsort(-1)[..., :width].contiguous()
        if width > case.key_dim:
            channels = torch.zeros(*per_head, width, dtype=torch.int64)
        labels = case.selection.labels(content[0], channels.unsqueeze(3).expand(*per_head, most, width))
        laid = labels.transpose(-1, -2).contiguous().flatten(-2).view(torch.uint8).flatten(0, 3)
        stored += [laid[order], channels]
    return Stored(whole + torch.tensor(tail), [kv, *stored])


def random_rows(case: Case, count: int, seed: int = 0) -> list[Tensor]:
    """q, k and v of so many rows."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(count, int(spec.sizes[1]), generator=generator, dtype=torch.float64).to(case.dtype)
        for spec in case.row_inputs
    ]
