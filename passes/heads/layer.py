"""A decoder layer of Llama's kind that heads have of their own: sizes, tensors, and how checkpoints name them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from graft.compiler.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
LAYER_NAMES = {
    "input_layernorm": "input_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "o_proj",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "post_attention_layernorm": "post_norm",
    "mlp.gate_proj": "gate_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "down_proj",
}
"""transformers' names in a decoder layer -> ours."""
SCALINGS = ("linear", "llama3")
"""Kinds of rope whose frequencies are one vector, whatever the length, and whose cosines are not scaled."""


@dataclass(frozen=True)
class DecoderLayer:
    """One Llama decoder layer with a KV of its own."""

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rope_theta: float = 10000.0
    eps: float = 1e-6
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    """transformers' further parameters of the rope, "rope_type" among them; None for frequencies as they are."""
    attention_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    """Whether queries and keys have a norm of each head, as in Qwen3."""

    def shapes(self, at: str, width: int, read: int = 0) -> Shapes:
        """Of its tensors under `at`; attention reads `read` numbers of a token, `width` where that is not given."""
        inside, kv, read = self.heads * self.head_dim, self.kv_heads * self.head_dim, read or width
        sizes = {"q": (inside, read), "k": (kv, read), "v": (kv, read), "o": (width, inside)}
        mlp = {"gate": (self.intermediate, width), "up": (self.intermediate, width), "down": (width, self.intermediate)}
        found: Shapes = {f"{at}.input_norm.weight": (width,), f"{at}.post_norm.weight": (width,)}
        for some, biased in ((sizes, self.attention_bias), (mlp, self.mlp_bias)):
            for name, (rows, columns) in some.items():
                found[f"{at}.{name}_proj.weight"] = (rows, columns)
                if biased:
                    found[f"{at}.{name}_proj.bias"] = (rows,)
        if self.head_norms:
            found |= {f"{at}.q_norm.weight": (self.head_dim,), f"{at}.k_norm.weight": (self.head_dim,)}
        return found

    def frequencies(self) -> Tensor:
        """float32 [head_dim / 2]: by how much positions turn queries and keys."""
        if self.rope_scaling is None:
            powers = -torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
            return self.rope_theta**powers
        rope = self.rope_scaling | {"rope_theta": self.rope_theta}
        kind, longest = rope.get("rope_type"), int(rope.get("original_max_position_embeddings", 1))
        if kind not in SCALINGS:
            raise unsupported("rope_type", kind, " or ".join(SCALINGS))
        config = LlamaConfig(head_dim=self.head_dim, max_position_embeddings=longest + 1, rope_parameters=rope)
        frequencies: Tensor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
        return frequencies.float()


def rename_layer(name: str, at: str) -> str | None:
    """A tensor's name in a decoder layer of transformers -> ours under `at`; None for what is not known."""
    inner, _, part = name.rpartition(".")
    return f"{at}.{LAYER_NAMES[inner]}.{part}" if inner in LAYER_NAMES and part in ("weight", "bias") else None


def layer_from(data: Any, head_norms: bool = False) -> tuple[DecoderLayer, int, int]:
    """A layer as a configuration of transformers describes it, what it leaves out being transformers' defaults; then
    the width and the vocabulary there. Raises CheckpointError where the layer is of another kind."""
    kind = data.get("model_type", "llama") if isinstance(data, dict) else None
    if kind not in ("llama", "qwen3"):
        raise unsupported("model_type", kind, "llama or qwen3")
    try:
        config = AutoConfig.for_model(kind, **{name: value for name, value in data.items() if name != "model_type"})
    except Exception as error:  # transformers checks its fields with errors of several libraries
        raise unsupported("config.json", error, f"a configuration of {kind}") from error
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if config.hidden_act != "silu" or sliding:
        found = "sliding attention" if sliding else config.hidden_act
        raise unsupported("hidden_act", found, "silu, and attention to all tokens")
    rope = {name: value for name, value in config.rope_parameters.items() if name not in ("type", "rope_theta")}
    scaled = rope.get("rope_type", "default") != "default"
    layer = DecoderLayer(
        int(config.num_attention_heads),
        int(config.num_key_value_heads),
        int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        int(config.intermediate_size),
        float(config.rope_parameters["rope_theta"]),
        float(config.rms_norm_eps),
        rope if scaled else None,
        bool(config.attention_bias),
        bool(getattr(config, "mlp_bias", False)),
        head_norms,
    )
    layer.frequencies()  # an unknown rope is refused while its description is read
    return layer, int(config.hidden_size), int(config.vocab_size)


def unsupported(what: str, found: object, expected: str) -> CheckpointError:
    """The error for a checkpoint of an architecture that graft does not have."""
    return CheckpointError(
        "draft heads with a decoder layer of a kind that graft does not know",
        expected=expected,
        found=found,
        where=what,
    )
