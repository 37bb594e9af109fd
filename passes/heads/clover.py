"""Clover-2 (2408.00264): what describes its checkpoints, their tensors under graft's own names, and how they are read.

    first.norm.weight, first.q.weight, ...  the attention decoder in front of the augmenting block, over the hidden
                                            state and the token behind it; q, k and v have biases
    layers.0.q_proj.weight, ..., norm.weight    the augmenting block: decoder layers, and a norm
    head.weight, head.bias                  of the first head, over the block's result
    next.norm.weight, next.q.weight, ...    the attention decoder of all further heads
    next_head.weight, next_head.bias        of all further heads, over the state and the token's embedding
    head_norm.weight                        in front of the unembedding
    embedding.weight                        where it is not the target's unembedding, of which training makes a copy
    unembedding.weight, draft_vocabulary    as in passes/heads/config.py

Names and equations are those of the code in XiaoBin1992/clover (clover/model/clover2.py), as read in November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from graft.passes.heads.config import Described, Unembedding
from graft.passes.heads.layer import DecoderLayer, Shapes, layer_from, rename_layer

DECODERS = ("first", "next")
NAMES = {
    "clover_head_mlp_rnn": "first",
    "clover_head_mlp_rnn2": "next",
    "clover_head_mlp": "head",
    "clover_head_mlp2": "next_head",
    "clover_head_norm": "head_norm",
    "clover_norm": "norm",
}
"""Published names of modules -> ours."""


@dataclass(frozen=True)
class CloverConfig(Described):
    """Clover-2: an attention decoder and an augmenting block make a state, which each head after the first updates."""

    kind: Literal["clover-2"]
    heads: int
    width: int
    vocabulary: int
    layer: DecoderLayer
    layers: int = 2
    """Of the augmenting block."""
    unembedding: Unembedding = "target"
    reduced: bool = False
    embedding: int = 0
    """Tokens of the heads' own embedding; 0 where it is the target's unembedding."""

    def __post_init__(self) -> None:
        numbers = (self.heads, self.width, self.vocabulary, self.layers)
        right = all(type(number) is int and number >= 1 for number in numbers)
        right &= self.kind == "clover-2" and self.unembedding in ("shared", "target")
        right &= isinstance(self.layer, DecoderLayer) and self.width % self.layer.heads == 0
        if not right:
            raise self.wrong(
                "kind clover-2, a layer, numbers of 1 or more, an unembedding that is shared or the target's"
            )

    @property
    def decoder_layer(self) -> DecoderLayer:
        """See `Described.decoder_layer`."""
        return self.layer

    def shapes(self) -> Shapes:
        """See `Described.shapes`."""
        width = self.width
        found: Shapes = {}
        for decoder in DECODERS:
            found[f"{decoder}.norm.weight"] = (width,)
            for name in "qkv":
                found |= {f"{decoder}.{name}.weight": (width, width), f"{decoder}.{name}.bias": (width,)}
        for index in range(self.layers):
            found |= self.layer.shapes(f"layers.{index}", width)
        found |= {"norm.weight": (width,), "head_norm.weight": (width,)}
        for name, read in (("head", width), ("next_head", 2 * width)):
            found |= {f"{name}.weight": (width, read), f"{name}.bias": (width,)}
        if self.embedding:
            found["embedding.weight"] = (self.embedding, width)
        return found | self.vocabulary_shapes()


def rename_clover(name: str) -> str | None:
    """XiaoBin1992/clover. The frozen copy of the target's unembedding that training writes down is not needed."""
    if name == "lm_head.weight":
        return ""
    if name == "clover_embed_tokens.weight":
        return "embedding.weight"
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        return rename_layer(match[2], f"layers.{match[1]}")
    module, _, inner = name.partition(".")
    inner = inner.replace("input_layernorm.", "norm.") if module.startswith("clover_head_mlp_rnn") else inner
    return f"{NAMES[module]}.{inner}" if module in NAMES else None


def describe_clover(data: Mapping[str, Any], tensors: dict[str, Tensor]) -> CloverConfig:
    """Positions turn by 10000 whatever rope_theta says: the published layer does not read it."""
    given = {name: value for name, value in data.items() if name not in ("model_type", "rope_parameters", "rope_theta")}
    layer, width, tokens = layer_from({**given, "rope_theta": 10000.0})
    sizes = data["clover"]
    embedding = tokens if "embedding.weight" in tensors else 0
    heads, layers = int(sizes["num_heads"]), int(sizes["num_layers"])
    return CloverConfig("clover-2", heads, width, tokens, layer, layers, embedding=embedding)
