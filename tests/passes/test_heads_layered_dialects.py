"""Checkpoints of EAGLE-3 and Clover-2 as they are published: read as graft's own, and refused with a name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graft.compiler.errors import CheckpointError
from graft.passes.heads.config import Described
from graft.passes.heads.dialects import read_heads
from graft.passes.heads.layer import LAYER_NAMES, DecoderLayer
from tests.families import VOCABULARY
from tests.heads import random_tensors, write, write_files
from tests.heads_layered import CLOVER, EAGLE, LAYER, WIDE

ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SAFEAI: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "rms_norm_eps": 1e-06,
    "hidden_act": "silu", "vocab_size": VOCABULARY, "draft_vocab_size": 40, "torch_dtype": "float16",
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "use_aux_hidden_state": True},
}  # fmt: skip
SPECULATORS: dict[str, Any] = {
    "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_version": "0.9.0",
    "draft_vocab_size": VOCABULARY, "norm_before_residual": True, "fc_norm": True, "norm_output": True,
    "target_hidden_size": 64, "eagle_aux_hidden_state_layer_ids": [0, 2],
    "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "x"}},
    "transformer_layer_config": {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
CLOVER2: dict[str, Any] = SAFEAI | {"clover": {"num_heads": 3, "num_layers": 2}, "rope_theta": 500000.0}
del CLOVER2["draft_vocab_size"], CLOVER2["eagle_config"]
ROLES = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
CLOVER_ROLES = {
    "first": "clover_head_mlp_rnn", "next": "clover_head_mlp_rnn2", "head": "clover_head_mlp",
    "next_head": "clover_head_mlp2", "head_norm": "clover_head_norm", "norm": "clover_norm",
}  # fmt: skip


def published_eagle(tensors: dict[str, Tensor], first: str) -> dict[str, Tensor]:
    """Under the names in the publishers' code; `first` is what they call the layer that reads the embedding."""
    found = {}
    for name, tensor in tensors.items():
        at, _, inner = name.partition(".")
        if name == "draft_vocabulary":
            found["d2t"] = tensor - torch.arange(len(tensor))
            found["t2d"] = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, tensor, True)
        elif at == "layers":
            number, role, part = inner.split(".")
            names = {"embedding_norm": "input_layernorm", "input_norm": "hidden_norm"} if number == "0" else {}
            layer = first if number == "0" else f"layers.{number}"
            found[f"{layer}.{names.get(role) or ROLES[role]}.{part}"] = tensor
        else:
            whole = {"unembedding": "lm_head", "embedding": "embed_tokens", "fc_norms": "fc_norm"}
            found[f"{whole.get(at, at)}.{inner}"] = tensor
    return found


def published_clover(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Likewise, with the frozen copies of the target's unembedding that the publishers' training writes down."""
    copies = {name: torch.ones(VOCABULARY, 64) for name in ("lm_head.weight", "clover_embed_tokens.weight")}
    for name, tensor in tensors.items():
        at, _, inner = name.partition(".")
        if at == "layers":
            number, role, part = inner.split(".")
            copies[f"layers.{number}.{ROLES[role]}.{part}"] = tensor
        else:
            inner = inner.replace("norm.", "input_layernorm.")
            copies[f"{CLOVER_ROLES[at]}.{inner}"] = tensor
    return copies


def read_back(folder: Path, config: Described, expected: dict[str, Tensor]) -> None:
    found, tensors = read_heads(folder)
    assert found == config
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_the_authors_eagle_3_is_read_by_its_own_names(file: str, tmp_path: Path) -> None:
    tensors = random_tensors(EAGLE)
    read_back(write_files(tmp_path, SAFEAI, published_eagle(tensors, "midlayer"), file), EAGLE, tensors)


def test_eagle_3_of_speculators_is_read_with_every_option(tmp_path: Path) -> None:
    tensors = random_tensors(WIDE)
    names = published_eagle(tensors, "layers.0")
    read_back(write_files(tmp_path, SPECULATORS, names, "model.safetensors"), WIDE, tensors)


def test_clover_2_is_read_by_its_own_names_and_turns_by_its_own_rope(tmp_path: Path) -> None:
    tensors = random_tensors(CLOVER)
    folder = write_files(tmp_path, CLOVER2, published_clover(tensors), "model.safetensors")
    copy = {"embedding.weight": torch.ones(VOCABULARY, 64)}
    read_back(folder, replace(CLOVER, embedding=VOCABULARY), tensors | copy)


@pytest.mark.parametrize("config", [EAGLE, WIDE, CLOVER], ids=["eagle-3", "every option", "clover-2"])
def test_grafts_own_layout_reads_back(config: Described, tmp_path: Path) -> None:
    read_back(write(tmp_path / "heads", config), config, random_tensors(config))


@pytest.mark.parametrize("name", ["d2t", "t2d", "fc.weight", "midlayer.hidden_norm.weight", "lm_head.weight"])
def test_a_tensor_of_eagle_3_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    tensors = published_eagle(random_tensors(EAGLE), "midlayer")
    del tensors[name]
    ours = {"midlayer.hidden_norm.weight": "layers.0.input_norm.weight", "lm_head.weight": "unembedding.weight"}
    with pytest.raises(CheckpointError, match=rf"are missing[^$]*{ours.get(name, name)}"):
        read_heads(write_files(tmp_path, SAFEAI, tensors, "model.safetensors"))


def test_tensors_that_are_surplus_are_named(tmp_path: Path) -> None:
    tensors = published_eagle(random_tensors(EAGLE), "midlayer") | {"midlayer.mlp.extra.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"not among those of EAGLE-3[^$]*midlayer\.mlp\.extra\.weight"):
        read_heads(write_files(tmp_path / "eagle", SAFEAI, tensors, "model.safetensors"))
    tensors = published_eagle(random_tensors(EAGLE), "midlayer") | {"fc.bias": torch.zeros(64)}
    with pytest.raises(CheckpointError, match=r"not among those of EAGLE-3[^$]*fc\.bias"):
        read_heads(write_files(tmp_path / "bias", SAFEAI, tensors, "model.safetensors"))
    tensors = published_clover(random_tensors(CLOVER)) | {"clover_head_mlp3.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"not among those of Clover-2[^$]*clover_head_mlp3\.weight"):
        read_heads(write_files(tmp_path / "clover", CLOVER2, tensors, "model.safetensors"))


def test_two_maps_of_the_draft_vocabulary_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    tensors = published_eagle(random_tensors(EAGLE), "midlayer")
    tensors["t2d"] = tensors["t2d"].roll(1)
    with pytest.raises(CheckpointError, match="do not name the same tokens"):
        read_heads(write_files(tmp_path, SAFEAI, tensors, "model.safetensors"))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"model_type": "deepseek_v3"}, "llama or qwen3[^$]*deepseek_v3"),
        ({"hidden_act": "gelu"}, "silu[^$]*gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "llama3[^$]*yarn"),
        ({"hidden_size": "wide"}, "configuration of qwen3"),
    ],
    ids=["model", "activation", "rope", "size"],
)
def test_layers_of_other_architectures_are_refused(change: dict[str, Any], found: str, tmp_path: Path) -> None:
    layer = SPECULATORS["transformer_layer_config"] | change
    names = published_eagle(random_tensors(WIDE), "layers.0")
    with pytest.raises(CheckpointError, match=found):
        read_heads(write_files(tmp_path, SPECULATORS | {"transformer_layer_config": layer}, names, "model.safetensors"))


def test_a_scaled_rope_turns_as_in_transformers(tmp_path: Path) -> None:
    data = SAFEAI | {"rope_scaling": ROPE, "rope_theta": 500000.0, "max_position_embeddings": 256}
    tensors = published_eagle(random_tensors(EAGLE), "midlayer")
    config, _ = read_heads(write_files(tmp_path, data, tensors, "model.safetensors"))
    assert config.decoder_layer == replace(LAYER, rope_theta=500000.0, rope_scaling=ROPE)
    read, _ = read_heads(write(tmp_path / "own", config, random_tensors(config)))
    rope = ROPE | {"rope_theta": 500000.0}
    reference = LlamaRotaryEmbedding(LlamaConfig(head_dim=16, max_position_embeddings=256, rope_parameters=rope))
    assert isinstance(read.decoder_layer, DecoderLayer)
    torch.testing.assert_close(read.decoder_layer.frequencies(), reference.inv_freq)
