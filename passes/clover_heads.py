"""Add Clover-2's heads as functions that draft, one for each level: a state of the text, updated by each token.

before:
    return logits, hidden
after, beside the target, for the second head of a model of width 64 with 4 heads of attention:
    e = embedding(table, tokens)
    kv = linear_rows(e, [w_k, w_v], [b_k, b_v], [0, 64, 0, 64])
    q = reshape(linear(norm(hidden, n), w_q, b_q), [-1, 4, 16])
    k = reshape(slice(kv, -1, 0, 64), [-1, 4, 16])
    v = reshape(slice(kv, -1, 64, 128), [-1, 4, 16])
    cosine = mul(mul(sum(mul(q, k), [-1], True), unit(q)), unit(k))
    s = add(hidden, reshape(mul(v, cosine), [-1, 64]))
    o = norm(index_select(linear(cat([s, e], -1), w, b), 0, wanted), m)
    return linear(o, unembedding), s
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
from graft.passes.heads.clover import CloverConfig
from graft.passes.heads.graphs import Installed, decoder_layer, install
from graft.passes.heads.taps import tap
from graft.passes.merge_linears import MergeLinears


@dataclass(frozen=True)
class CloverHeads(Pass):
    """Clover-2 (2408.00264). The first function reads the stream behind the target's last layer at t and the token at
    t + 1: an attention decoder puts them together, an augmenting block of decoder layers makes the state. Each further
    head updates the state by one token with an attention decoder, and reads both.

    The functions of further heads are equal: they share their parameters, and differ in the level that asks them.
    """

    folder: Path
    """Trained heads: graft's own layout, or XiaoBin1992/clover's (passes/heads/clover.py)."""
    function: str = "heads"
    """Of head i the function is called `function`_i; the parameters stand under it in the model."""

    contract: ClassVar[Contract] = lossless
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "kv-cache"})

    def run(self, view: View) -> None:
        heads = install(view, self.folder, "clover-2", CloverConfig, self.function, embeds_outputs=True)
        total, (start,) = tap(view, [len(view.trunk.layers)])
        self.add_first(view, heads, total, start)
        for level in range(1, heads.config.heads):
            builder = Builder(view, f"{self.function}_{level}", [heads.hidden()])
            embedded = builder.embed("tokens", heads.table)
            state = attention_decoder(builder, heads, "next", builder["hidden"], embedded)
            said = builder.linear(cat([state, embedded]), heads.path("next_head"))
            self.finish(view, heads, builder, said, state)

    def add_first(self, view: View, heads: Installed[CloverConfig], total: int, start: int) -> None:
        """The function of the first head, over rows of `total` numbers with the stream from `start` on."""
        builder = Builder(view, f"{self.function}_0", [heads.hidden(total)], heads.states(heads.config.layers))
        stream = builder["hidden"].apply(aten.slice.Tensor, -1, start, start + heads.config.width)
        embedded = builder.embed("tokens", heads.table)
        x, kv = attention_decoder(builder, heads, "first", stream, embedded), builder[f"{self.function}_kv"]
        for layer in range(heads.config.layers):
            x, kv = decoder_layer(builder, heads, x, f"layers.{layer}", kv, layer)
        state = heads.norm(builder, x, "norm")
        self.finish(view, heads, builder, builder.linear(state, heads.path("head")), state, kv)

    def finish(
        self, view: View, heads: Installed[CloverConfig], builder: Builder, said: Value, *results: Value
    ) -> None:
        """The logits of what a head says; then its other results."""
        normed = heads.norm(builder, builder.wanted(said), "head_norm")
        heads.finish(builder, heads.logits(builder, normed), *results)
        MergeLinears().run(View(view.program, view.by, (builder.function.name,)))


def attention_decoder(builder: Builder, heads: Installed[CloverConfig], at: str, x: Value, y: Value) -> Value:
    """x + cos(q, k) v for each head of attention, q from the norm of x, k and v from y: attention to a single key, its
    weight the cosine. All are [N, width]; the cosine is made in float32 at least."""
    spec = heads.config.layer
    sizes = [-1, spec.heads, heads.config.width // spec.heads]
    normed = heads.norm(builder, x, f"{at}.norm")
    made = (builder.linear(one, heads.path(f"{at}.{name}")) for name, one in (("q", normed), ("k", y), ("v", y)))
    q, k, v = (one.apply(aten.reshape.default, sizes) for one in made)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    q, k = (one if one.dtype == wide else one.apply(aten._to_copy.default, dtype=wide) for one in (q, k))
    cosine = (q * k).apply(aten.sum.dim_IntList, [-1], True)
    for one in (q, k):
        # Of a vector shorter than epsilon the length counts as epsilon.
        square = (one * one).apply(aten.sum.dim_IntList, [-1], True).apply(aten.clamp.default, spec.eps**2)
        cosine = cosine * square.apply(aten.rsqrt.default)
    cosine = cosine if x.dtype == wide else cosine.apply(aten._to_copy.default, dtype=x.dtype)
    return x + (v * cosine).apply(aten.reshape.default, [-1, heads.config.width])
