"""Add EAGLE-3's drafter: one function for the text, one for what is drafted behind it, on a KV state of their own.

before:
    return logits, hidden
after, for two streams, which the target hands out behind its hidden states, in the function for the text:
    streams = cat([slice(hidden, -1, 64, 128), slice(hidden, -1, 128, 192)], -1)
    feature = linear(streams, fc)
    both = cat([norm(embedding(table, tokens), n), norm(feature, m)], -1)
    return feature, linear_rows(both, [q, k, v], [], [0, 64, 0, 32, 0, 32])
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from graft.compiler.building import Builder
from graft.compiler.canonical import aten
from graft.compiler.nodes import Value, cat
from graft.compiler.passing import Contract, Pass, View, lossless
from graft.passes.heads.eagle import EagleConfig
from graft.passes.heads.graphs import Installed, decoder_layer, install
from graft.passes.heads.taps import tap
from graft.passes.merge_linears import MergeLinears


@dataclass(frozen=True)
class EagleHeads(Pass):
    """EAGLE-3 (2503.01840): a feature of the text up to t, made of streams of the target, is run through a decoder
    layer with the token at t + 1 and says what follows it; the layer's own result is the feature for what is drafted.

    `function`_0 reads the target's streams, `function`_1 the feature of the row before; both write the same KV.
    """

    folder: Path
    """Trained heads: graft's own layout, SafeAILab's or speculators' (passes/heads/eagle.py)."""
    function: str = "heads"
    """What the functions are called, and the parameters in the model."""

    contract: ClassVar[Contract] = lossless
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "kv-cache"})

    def run(self, view: View) -> None:
        heads = install(view, self.folder, "eagle-3", EagleConfig, self.function)
        count = len(view.trunk.layers)
        taps = (2, count // 2, count - 3) if heads.config.taps is None else heads.config.taps
        total, starts = tap(view, taps)
        builder = self.builder(view, heads, 0, total)
        width = heads.config.streams_width
        streams = [builder["hidden"].apply(aten.slice.Tensor, -1, start, start + width) for start in starts]
        self.finish(view, heads, builder, feature_of(builder, heads, streams))
        builder = self.builder(view, heads, 1, heads.config.width)
        self.finish(view, heads, builder, builder["hidden"])

    def builder(self, view: View, heads: Installed[EagleConfig], level: int, width: int) -> Builder:
        """One of the functions in the making, over rows of so many numbers."""
        inputs, states = [heads.hidden(width)], heads.states(heads.config.layers)
        return Builder(view, f"{self.function}_{level}", inputs, states)

    def finish(self, view: View, heads: Installed[EagleConfig], builder: Builder, feature: Value) -> None:
        """The decoder layers over feature and token, and the logits of what they make."""
        config, kv = heads.config, builder[f"{self.function}_kv"]
        embedded = heads.norm(builder, builder.embed("tokens", heads.table), "layers.0.embedding_norm")
        normed = heads.norm(builder, feature, "layers.0.input_norm")
        x, read = normed if config.normed_residual else feature, cat([embedded, normed])
        for layer in range(config.layers):
            x, kv = decoder_layer(builder, heads, x, f"layers.{layer}", kv, layer, None if layer else read)
        last = heads.norm(builder, x, "norm")
        heads.finish(builder, heads.logits(builder, builder.wanted(last)), last if config.normed_feature else x, kv)
        MergeLinears().run(View(view.program, view.by, (builder.function.name,)))


def feature_of(builder: Builder, heads: Installed[EagleConfig], streams: list[Value]) -> Value:
    """fc over the target's streams [N, width] each, behind the norms that the heads have of them."""
    if heads.config.stream_norms == "each":
        streams = [heads.norm(builder, one, f"fc_norms.{index}") for index, one in enumerate(streams)]
    together = cat(streams)
    if heads.config.stream_norms == "all":
        together = heads.norm(builder, together, "fc_norm")
    return builder.linear(together, heads.path("fc"))
