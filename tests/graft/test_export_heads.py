"""Trained heads in the layout of a server: what a reader that knows that layout alone computes from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu

import graft
from graft.cli import main
from graft.passes.heads.config import HeadsConfig
from tests.families import VOCABULARY, build
from tests.heads import HYDRA, MEDUSA, random_tensors, reference_logits, write

REDUCED = replace(MEDUSA, layers=1, vocabulary=40, unembedding="target", reduced=True)


def served(folder: Path, hidden: Tensor) -> list[Tensor]:
    """Logits [N, vocabulary] of every head as vLLM's `medusa` method computes them from its own files."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert config["model_type"] == "medusa" and config["medusa_fc_bias"]
    found = []
    for head in range(config["num_heads"]):
        x = hidden
        for layer in range(config["num_hidden_layers"]):
            name = f"blocks.{head}.layers.{layer}"
            x = x + silu(linear(x, tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias")))
        unembedding = tensors["lm_head.weight" if config["original_lm_head"] else f"lm_heads.{head}.weight"]
        logits = torch.full((len(x), config["vocab_size"]), -torch.inf)
        logits[:, tensors.get("token_map", slice(None))] = linear(x, unembedding)
        assert unembedding.shape[0] == config["truncated_vocab_size"]
        found.append(logits)
    assert not any(name.startswith("blocks") for name in tensors)
    return found


@pytest.mark.parametrize("config", [MEDUSA, REDUCED], ids=["own", "reduced"])
def test_a_server_computes_what_the_heads_compute(config: HeadsConfig, tmp_path: Path) -> None:
    model = build("llama")
    folder = graft.export_heads(write(tmp_path / "heads", config), tmp_path / "served", model)
    tensors, hidden = random_tensors(config), torch.randn(5, config.width)
    own = model.get_output_embeddings().weight.detach()
    tokens = tensors.get("draft_vocabulary", torch.arange(VOCABULARY))
    for head, logits in enumerate(served(folder, hidden)):
        expected = reference_logits(config, tensors, head, hidden, [], own)
        assert torch.allclose(logits[:, tokens], expected, atol=1e-5)
        assert logits.isfinite().sum() == expected.numel()
    assert graft.compile(model, graft.Plan(draft=[graft.Heads(str(folder))]), backend="aten").program["heads"]


def test_heads_that_a_server_cannot_run_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    for config in (HYDRA, replace(MEDUSA, biased=True), replace(MEDUSA, width=48)):
        with pytest.raises(graft.CheckpointError, match="no place in vLLM's layout"):
            graft.export_heads(write(tmp_path / "heads", config), tmp_path / "served", model)
    assert not (tmp_path / "served").exists()


def test_the_command_exports(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    heads = write(tmp_path / "heads", REDUCED)
    arguments = ["export-heads", str(heads), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "served")]
    assert main([*arguments, "--quiet"]) == 0
    assert len(served(tmp_path / "served", torch.randn(2, 64))) == 3
