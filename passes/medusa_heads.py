"""Add Medusa's heads as a function that drafts: each guesses one place further from the same hidden state.

before:
    hidden = norm(h)
    return linear(hidden, unembedding), hidden
after, beside the unchanged target, for two heads:
    l = linear_rows(hidden, [w_0, w_1], [b_0, b_1], [0, 64, 0, 64])
    x_0 = add(hidden, silu(slice(l, -1, 0, 64)))
    x_1 = add(hidden, silu(slice(l, -1, 64, 128)))
    y_0 = linear(index_select(x_0, 0, wanted), u_0)
    y_1 = linear(index_select(x_1, 0, wanted), u_1)
    return cat([y_0, y_1], -1), x_1
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from graft.compiler.building import Builder
from graft.compiler.canonical import aten
from graft.compiler.nodes import cat
from graft.compiler.passing import Contract, Pass, View, lossless
from graft.passes.heads.config import HeadsConfig
from graft.passes.heads.graphs import install
from graft.passes.merge_linears import MergeLinears


@dataclass(frozen=True)
class MedusaHeads(Pass):
    """Medusa (2401.10774): head i reads the hidden state at t and guesses the token at t + 2 + i."""

    folder: Path
    """Trained heads: graft's own layout, Medusa's or vLLM's (passes/heads/dialects.py)."""
    function: str = "heads"
    """Name of the function, and of the heads among the model's parameters."""

    contract: ClassVar[Contract] = lossless
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "kv-cache"})

    def run(self, view: View) -> None:
        """The logits of all heads stand side by side, [R, heads * v]; hidden is the last head's."""
        heads = install(view, self.folder, "medusa", HeadsConfig, self.function)
        builder = Builder(view, self.function, [heads.hidden()])
        logits = []
        for head in range(heads.config.heads):
            first = builder.linear(builder["hidden"], heads.path(f"{head}.input"))
            x = heads.blocks(builder, builder["hidden"] + first.apply(aten.silu.default), head, heads.config.layers)
            logits.append(heads.logits(builder, builder.wanted(x), head))
        heads.finish(builder, cat(logits) if len(logits) > 1 else logits[0], x)
        MergeLinears().run(View(view.program, view.by, (self.function,)))
