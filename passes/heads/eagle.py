"""EAGLE-3 (2503.01840): what describes its checkpoints, their tensors under graft's own names, and how they are read.

    fc.weight                               over the target's tapped streams, side by side
    fc_norm.weight, fc_norms.0.weight, ...  a norm of all of them, or of each, in front of fc (speculators)
    layers.0.embedding_norm.weight          of the token's embedding, beside layers.0.input_norm of the feature
    layers.0.q_proj.weight, ...             over both, side by side; further layers are plain ones
    norm.weight, unembedding.weight         from the feature to logits
    embedding.weight                        where it is not the target's
    draft_vocabulary                        int64 [v]: the target's token for each draft id; absent: all tokens

Names and equations are those of the code in SafeAILab/EAGLE (eagle/model/cnets.py) and in vllm-project/speculators
(src/speculators/models/eagle3), as read in November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from graft.compiler.errors import CheckpointError
from graft.passes.heads.config import Described, Unembedding, refuse
from graft.passes.heads.layer import DecoderLayer, Shapes, layer_from, rename_layer

TAPS = 3
"""Streams that are tapped where nothing else is said."""


@dataclass(frozen=True)
class EagleConfig(Described):
    """EAGLE-3: a feature made of streams of the target, then a decoder layer whose feature feeds its next run."""

    kind: Literal["eagle-3"]
    width: int
    streams_width: int
    """Of the target's hidden states."""
    vocabulary: int
    layer: DecoderLayer
    layers: int = 1
    taps: tuple[int, ...] | None = None
    """In front of which of the target's layers the streams are read, N of N for the end of the last one. None: in
    front of 2, N // 2 and N - 3."""
    unembedding: Unembedding = "shared"
    reduced: bool = False
    embedding: int = 0
    """Tokens of the heads' own embedding; 0 where it is the target's."""
    stream_norms: Literal["none", "all", "each"] = "none"
    """Norms in front of fc: none, one over all streams side by side, or one of each."""
    normed_residual: bool = False
    """Whether the first layer adds to the normed feature rather than to the feature."""
    normed_feature: bool = False
    """Whether the next run reads the feature behind the last norm."""

    def __post_init__(self) -> None:
        if self.taps is not None:
            object.__setattr__(self, "taps", tuple(self.taps))
        numbers = (self.width, self.streams_width, self.vocabulary, self.layers, self.count)
        right = all(type(number) is int and number >= 1 for number in numbers)
        right &= self.kind == "eagle-3" and self.unembedding in ("shared", "target")
        right &= self.stream_norms in ("none", "all", "each") and isinstance(self.layer, DecoderLayer)
        if not right:
            raise self.wrong(
                "kind eagle-3, a layer, numbers of 1 or more, an unembedding that is shared or the target's"
            )

    @property
    def count(self) -> int:
        """How many streams are tapped."""
        return TAPS if self.taps is None else len(self.taps)

    @property
    def target_width(self) -> int:
        """See `Described.target_width`."""
        return self.streams_width

    @property
    def decoder_layer(self) -> DecoderLayer:
        """See `Described.decoder_layer`."""
        return self.layer

    def shapes(self) -> Shapes:
        """See `Described.shapes`."""
        width, streams = self.width, self.count * self.streams_width
        found: Shapes = {"fc.weight": (width, streams), "norm.weight": (width,)}
        if self.stream_norms == "all":
            found["fc_norm.weight"] = (streams,)
        if self.stream_norms == "each":
            found |= {f"fc_norms.{index}.weight": (self.streams_width,) for index in range(self.count)}
        if self.embedding:
            found["embedding.weight"] = (self.embedding, width)
        found["layers.0.embedding_norm.weight"] = (width,)
        for index in range(self.layers):
            found |= self.layer.shapes(f"layers.{index}", width, 0 if index else 2 * width)
        return found | self.vocabulary_shapes()


def rename_eagle(name: str) -> str | None:
    """SafeAILab's `midlayer` and speculators' `layers.0` are one; names of the rest are common to both."""
    whole = {"lm_head.weight": "unembedding.weight", "embed_tokens.weight": "embedding.weight"}
    whole |= {"input_norm.weight": "fc_norm.weight", "d2t": "d2t", "t2d": "t2d"}
    whole |= {one: one for one in ("fc.weight", "norm.weight")}
    if name in whole:
        return whole[name]
    if match := re.fullmatch(r"fc_norm\.(\d+)\.weight", name):
        return f"fc_norms.{match[1]}.weight"
    match = re.fullmatch(r"(?:midlayer|layers\.(\d+))\.(.+)", name)
    if match is None:
        return None
    at, inner = f"layers.{match[1] or 0}", match[2]
    first = {"input_layernorm.weight": "embedding_norm.weight", "hidden_norm.weight": "input_norm.weight"}
    if at == "layers.0" and inner in first:
        return f"{at}.{first[inner]}"
    return rename_layer(inner, at)


def describe_eagle(data: Mapping[str, Any], tensors: dict[str, Tensor]) -> EagleConfig:
    """From the configuration of either layout; d2t, which counts from the draft's own ids, becomes the draft
    vocabulary."""
    inside = (
        data.get("transformer_layer_config") if "speculators_model_type" in data else {**data, "model_type": "llama"}
    )
    layer, width, tokens = layer_from(inside, head_norms="layers.0.q_norm.weight" in tensors)
    numbers = [int(match[1]) for match in (re.match(r"layers\.(\d+)\.", name) for name in tensors) if match]
    taps = data.get("eagle_aux_hidden_state_layer_ids")
    taps = taps or (data.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    vocabulary = int(data.get("draft_vocab_size") or tokens)
    translate(tensors, vocabulary, vocabulary != tokens)
    return EagleConfig(
        "eagle-3",
        width,
        int(data.get("target_hidden_size") or width),
        vocabulary,
        layer,
        layers=max(numbers, default=0) + 1,
        taps=tuple(map(int, taps)) if taps else None,
        reduced=vocabulary != tokens,
        embedding=tokens if "embedding.weight" in tensors else 0,
        stream_norms="all" if data.get("norm_before_fc") else "each" if data.get("fc_norm") else "none",
        normed_residual=bool(data.get("norm_before_residual")),
        normed_feature=bool(data.get("norm_output")),
    )


def translate(tensors: dict[str, Tensor], vocabulary: int, reduced: bool) -> None:
    """Put `draft_vocabulary` in the place of d2t and t2d, which say the same; where all tokens are drafted they say
    nothing. Raises CheckpointError where one is missing or they contradict each other."""
    offsets, chosen = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if not reduced:
        return
    held = {name for name, tensor in (("d2t", offsets), ("t2d", chosen)) if tensor is not None}
    refuse("are missing", {"d2t", "t2d"} - held, "a reduced draft vocabulary")
    assert offsets is not None and chosen is not None
    found = offsets.long() + torch.arange(len(offsets))
    if len(offsets) != vocabulary or not found.sort().values.equal(chosen.bool().nonzero().flatten()):
        raise CheckpointError(
            "d2t and t2d do not name the same tokens",
            expected=f"draft_vocab_size tokens in both, {vocabulary}",
            found=f"{len(offsets)} offsets in d2t, {int(chosen.sum())} tokens in t2d",
            where="d2t",
        )
    tensors["draft_vocabulary"] = found
