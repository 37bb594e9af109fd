"""Add Hydra's heads as functions that draft, one for each level: a head sees the tokens drafted before it.

before:
    hidden = norm(h)
    return linear(hidden, unembedding), hidden
after, beside the unchanged target, for the second head:
    u = cat([hidden, embedding(table, token_1), embedding(table, tokens)], -1)
    l = linear_rows(u, [r, w], [c, b], [0, 64, 0, 64])
    x = add(slice(l, -1, 0, 64), silu(slice(l, -1, 64, 128)))
    return linear(index_select(x, 0, wanted), o), x
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from graft.compiler.building import Builder
from graft.compiler.canonical import aten
from graft.compiler.nodes import Value, cat
from graft.compiler.passing import Contract, Pass, View, lossless
from graft.compiler.program import Input
from graft.passes.heads.config import HeadsConfig
from graft.passes.heads.graphs import Installed, decoder_layer, install
from graft.passes.merge_linears import MergeLinears


@dataclass(frozen=True)
class HydraHeads(Pass):
    """Hydra (2402.05109): head i reads the hidden state at t and the tokens from t + 1 to t + 1 + i.

    With a prefix layer (Hydra++) the first function runs it over the hidden states of accepted tokens, with a KV of its
    own, and hands on its result in the place of the hidden state.
    """

    folder: Path
    """Trained heads: graft's own layout, or Hydra's (passes/heads/dialects.py)."""
    function: str = "heads"
    """Of head i the function is called `function`_i; the parameters stand under it in the model."""

    contract: ClassVar[Contract] = lossless
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "kv-cache"})

    def run(self, view: View) -> None:
        """A level's `tokens` are the last on the path, `token_k` those k before it; hidden is what unembeddings read,
        with a prefix layer of level 0 the layer's result."""
        heads = install(view, self.folder, "hydra", HeadsConfig, self.function)
        for level in range(heads.config.heads):
            self.add_level(view, heads, level)

    def add_level(self, view: View, heads: Installed[HeadsConfig], level: int) -> None:
        """The function of one head."""
        name, prefix = f"{self.function}_{level}", heads.config.prefix if level == 0 else None
        earlier = [f"token_{back}" for back in range(level, 0, -1)]
        inputs = [heads.hidden(), *(Input(token, ("N",), torch.int64) for token in earlier)]
        states = heads.states(1) if prefix is not None else []
        builder = Builder(view, name, inputs, states)
        hidden, written = builder["hidden"], list[Value]()
        if prefix is not None:
            hidden, kv = decoder_layer(builder, heads, hidden, "prefix", builder[states[0].name])
            hidden, written = heads.norm(builder, hidden, "prefix.norm"), [kv]
        read = cat([hidden, *(builder.embed(token, heads.table) for token in (*earlier, "tokens"))])
        straight, bent = (builder.linear(read, heads.path(f"{level}.{name}")) for name in ("residual", "input"))
        x = straight + bent.apply(aten.silu.default)
        x = heads.blocks(builder, x, level, heads.config.layers)
        logits = heads.logits(builder, builder.wanted(x), level)
        heads.finish(builder, logits, hidden if prefix is not None else x, *written)
        MergeLinears().run(View(view.program, view.by, (name,)))
