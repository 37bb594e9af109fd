"""Random draft heads for tests: folders in graft's layout and in others', and their equations in plain torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from graft.passes.heads.config import Described, HeadsConfig
from graft.passes.heads.dialects import CONFIG, WEIGHTS
from graft.passes.heads.layer import DecoderLayer
from tests.families import VOCABULARY

MEDUSA = HeadsConfig("medusa", heads=3, width=64, vocabulary=VOCABULARY, layers=2)
HYDRA = HeadsConfig("hydra", heads=3, width=64, vocabulary=VOCABULARY, layers=2, biased=True)
SMALL = HeadsConfig("hydra", heads=3, width=64, vocabulary=40, unembedding="target", reduced=True)
PREFIXED = replace(HYDRA, layers=1, prefix=DecoderLayer(heads=4, kv_heads=4, head_dim=16, intermediate=96))


def random_tensors(config: Described, seed: int = 0) -> dict[str, Tensor]:
    """Tensors that keep activations of order one; a draft vocabulary is every third token."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in config.shapes().items():
        if name == "draft_vocabulary":
            found[name] = torch.arange(config.vocabulary) * 3 + 1
            continue
        noise = torch.randn(*shape, generator=generator)
        found[name] = noise / math.sqrt(shape[-1]) if len(shape) == 2 else 0.1 * noise + ("norm" in name)
    return found


def write(folder: Path, config: Described, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """The heads in graft's own layout."""
    return write_files(folder, config.to_json(), tensors or random_tensors(config), WEIGHTS)


def write_files(folder: Path, data: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Path:
    """A folder with config.json and one file of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(data))
    if name.endswith(".safetensors"):
        save_file(dict(tensors), folder / name)
    else:
        torch.save(dict(tensors), folder / name)
    return folder


def reference_logits(
    config: HeadsConfig, tensors: Mapping[str, Tensor], head: int, hidden: Tensor, embedded: list[Tensor], own: Tensor
) -> Tensor:
    """Medusa's and Hydra's published equations on rows [N, width]: `embedded` are the tokens behind the hidden state
    in order (Hydra reads them), `own` is the target's unembedding."""
    if config.kind == "medusa":
        x = hidden + silu(linear(hidden, tensors[f"{head}.input.weight"], tensors[f"{head}.input.bias"]))
    else:
        u = torch.cat([hidden, *embedded], -1)
        x = linear(u, tensors[f"{head}.residual.weight"], tensors[f"{head}.residual.bias"])
        x = x + silu(linear(u, tensors[f"{head}.input.weight"], tensors[f"{head}.input.bias"]))
    for block in range(1, config.layers):
        x = x + silu(linear(x, tensors[f"{head}.blocks.{block}.weight"], tensors[f"{head}.blocks.{block}.bias"]))
    if config.unembedding == "own":
        return linear(x, tensors[f"{head}.unembedding.weight"], tensors.get(f"{head}.unembedding.bias"))
    if config.unembedding == "shared":
        return linear(x, tensors["unembedding.weight"])
    return linear(x, own[tensors["draft_vocabulary"]] if config.reduced else own)


def reference_prefix(prefix: DecoderLayer, tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """A Llama decoder layer and the final norm over the hidden states [L, width] of one text."""

    def norm(x: Tensor, name: str) -> Tensor:
        return tensors[f"prefix.{name}.weight"] * x * (x.pow(2).mean(-1, keepdim=True) + prefix.eps).rsqrt()

    def turn(x: Tensor) -> Tensor:
        half = prefix.head_dim // 2
        angles = torch.arange(len(hidden))[:, None] / prefix.rope_theta ** (torch.arange(half) / half)
        pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([pairs.real, pairs.imag], -1)

    x, length = norm(hidden, "input_norm"), len(hidden)
    q, k, v = (linear(x, tensors[f"prefix.{one}_proj.weight"]).view(length, -1, prefix.head_dim) for one in "qkv")
    q, k, v = (one.transpose(0, 1)[None] for one in (turn(q), turn(k), v))
    attended = scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).reshape(length, -1)
    hidden = hidden + linear(attended, tensors["prefix.o_proj.weight"])
    x = norm(hidden, "post_norm")
    gated = silu(linear(x, tensors["prefix.gate_proj.weight"])) * linear(x, tensors["prefix.up_proj.weight"])
    return norm(hidden + linear(gated, tensors["prefix.down_proj.weight"]), "norm")
