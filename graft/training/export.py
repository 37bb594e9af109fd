"""Trained draft heads in the layout of a server: Medusa heads as vLLM reads them.

Hydra's heads and Kangaroo's adapter have no layout in vLLM or in the `speculators` library.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from graft.compiler.errors import CheckpointError
from graft.passes.heads.config import HeadsConfig
from graft.passes.heads.dialects import CONFIG, read_heads

TENSORS = "model.safetensors"


def export_heads(folder: str | Path, out: str | Path, model: PreTrainedModel) -> Path:
    """Write the Medusa heads in `folder`, trained for `model`, to the folder `out`, which is made, as vLLM's `medusa`
    method reads them; returns it. Heads that share the target's unembedding take the rows that they draft from.

    Raises CheckpointError for heads of another kind or another model, and for unembeddings with a bias, for which that
    layout has no place.
    """
    config, tensors = read_heads(folder)
    width, vocabulary = model.config.get_text_config().hidden_size, model.config.get_text_config().vocab_size
    biased = isinstance(config, HeadsConfig) and config.biased
    if not isinstance(config, HeadsConfig) or config.kind != "medusa" or biased or config.width != width:
        raise CheckpointError(
            "these draft heads have no place in vLLM's layout",
            expected=f"medusa heads of width {width} without a bias behind them",
            found=f"{config.kind} heads of width {config.width}{', biased' if biased else ''}",
            where=folder,
        )
    if config.unembedding == "target":
        rows = model.get_output_embeddings().weight.detach()
        tensors["unembedding.weight"] = rows[tensors["draft_vocabulary"]] if config.reduced else rows
    target = Path(out).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    save_file({published(name): tensor.contiguous().clone() for name, tensor in tensors.items()}, target / TENSORS)
    data = json.dumps(description(config, tensors, vocabulary), indent=2)
    (target / CONFIG).write_text(data + "\n", encoding="utf-8")
    return target


def published(name: str) -> str:
    """vLLM's name of a tensor."""
    if match := re.fullmatch(r"(\d+)\.(?:input|blocks\.(\d+))\.(weight|bias)", name):
        return f"blocks.{match[1]}.layers.{match[2] or 0}.{match[3]}"
    if match := re.fullmatch(r"(\d+)\.unembedding\.weight", name):
        return f"lm_heads.{match[1]}.weight"
    return {"unembedding.weight": "lm_head.weight", "draft_vocabulary": "token_map"}[name]


def description(config: HeadsConfig, tensors: dict[str, Tensor], vocabulary: int) -> dict[str, Any]:
    """vLLM's config.json."""
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": config.width,
        "vocab_size": vocabulary,
        "truncated_vocab_size": len(tensors["draft_vocabulary"]) if config.reduced else vocabulary,
        "num_heads": config.heads,
        "num_hidden_layers": config.layers,
        "medusa_fc_bias": True,
        "original_lm_head": config.unembedding != "own",
    }
