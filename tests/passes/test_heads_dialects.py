"""Checkpoints of draft heads: what others publish reads as the same tensors, and what is not right is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graft.compiler.errors import CheckpointError
from graft.passes.heads.config import HeadsConfig
from graft.passes.heads.dialects import CONFIG, WEIGHTS, read_heads
from tests.heads import HYDRA, MEDUSA, PREFIXED, SMALL, random_tensors, write, write_files

LLAMA = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    **{f"{one}_proj": f"self_attn.{one}_proj" for one in "qkvo"},
    **{f"{one}_proj": f"mlp.{one}_proj" for one in ("gate", "up", "down")},
}


def published(config: HeadsConfig, tensors: dict[str, Tensor], vllm: bool = False) -> dict[str, Tensor]:
    """The tensors under the names in their publishers' code."""
    found = {}
    for name, tensor in tensors.items():
        head, role, *rest = (*name.split("."), "")
        block = 0 if role in ("input", "residual") else int(rest[0]) if role == "blocks" else config.layers
        part = name.rpartition(".")[2]
        if vllm:
            new = {"unembedding": f"lm_heads.{head}.{part}"}.get(role, f"blocks.{head}.layers.{block}.{part}")
            new = "token_map" if name == "draft_vocabulary" else new
        elif config.kind == "medusa":
            new = f"{head}.{block}.{part}" if role == "unembedding" else f"{head}.{block}.linear.{part}"
        elif head == "prefix":
            new = "prefix_embeding_layer." + ("norm.weight" if role == "norm" else f"layers.0.{LLAMA[role]}.weight")
        elif role == "unembedding":
            new = f"hydra_lm_head.{head}.{'1.' if config.prefix else ''}{part}"
        else:
            place = 2 * block + 1 if config.prefix else block
            inner = "res_connection" if role == "residual" else "linear"
            new = f"hydra_mlp.{head}.{place}.{inner}.{part}"
        found[new] = tensor
    return found


def read_back(folder: Path, config: HeadsConfig) -> None:
    found, tensors = read_heads(folder)
    assert found == config
    expected = random_tensors(config)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("file", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
def test_medusa_is_read_by_its_own_names_whatever_its_configuration_counts(file: str, tmp_path: Path) -> None:
    data = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "x"}
    read_back(write_files(tmp_path, data, published(MEDUSA, random_tensors(MEDUSA)), file), MEDUSA)


def test_vllms_medusa_is_read_without_biases_and_with_a_token_map(tmp_path: Path) -> None:
    config = HeadsConfig("medusa", 2, 64, 40, reduced=True)
    tensors = random_tensors(config)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}
    data = {"model_type": "medusa", "num_heads": 2, "num_hidden_layers": 1, "truncated_vocab_size": 40}
    names = {f"medusa_heads.{name}": tensor for name, tensor in published(config, kept, vllm=True).items()}
    found, read = read_heads(write_files(tmp_path, data, names, "model.safetensors"))
    assert found == config
    assert all(torch.equal(read[name], kept.get(name, torch.zeros(64))) for name in tensors)


@pytest.mark.parametrize("config", [HYDRA, PREFIXED], ids=["hydra", "hydra++"])
def test_hydra_is_read_by_its_own_names(config: HeadsConfig, tmp_path: Path) -> None:
    tensors = published(config, random_tensors(config))
    data: dict[str, Any] = {"hydra_num_heads": 3, "hydra_num_layers": config.layers, "hydra_head_arch": "mlp"}
    if config.prefix:
        data |= {"hydra_head_arch": "prefix-mlp", "num_attention_heads": 4}
        tensors["prefix_embeding_layer.embed_tokens.weight"] = torch.zeros(3, 64)
    read_back(write_files(tmp_path, data, tensors, "hydra_lm_head.pt"), config)


@pytest.mark.parametrize("config", [MEDUSA, HYDRA, SMALL, PREFIXED], ids=["medusa", "hydra", "reduced", "hydra++"])
def test_grafts_own_layout_reads_back(config: HeadsConfig, tmp_path: Path) -> None:
    read_back(write(tmp_path / "heads", config), config)


def test_missing_and_surplus_tensors_are_named(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    del tensors["1.residual.bias"]
    with pytest.raises(CheckpointError, match=r"missing[^$]*1\.residual\.bias"):
        read_heads(write(tmp_path / "less", SMALL, tensors))
    with pytest.raises(CheckpointError, match=r"not among[^$]*7\.input\.weight"):
        read_heads(write(tmp_path / "more", SMALL, random_tensors(SMALL) | {"7.input.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"wrong shape[^$]*0\.input\.bias"):
        read_heads(write(tmp_path / "other", SMALL, random_tensors(SMALL) | {"0.input.bias": torch.zeros(3)}))
    medusa = published(MEDUSA, random_tensors(MEDUSA)) | {"lm_head.extra": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"not among[^$]*lm_head\.extra"):
        read_heads(write_files(tmp_path / "names", {"medusa_num_heads": 3}, medusa, "medusa_lm_head.pt"))


class Planted:
    """What a torch file must not be able to execute."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("planted").write_text, ("x",))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(CONFIG)):
        read_heads(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"speculators_model_type": "dflash", "draft_vocab_size": 3}))
    with pytest.raises(CheckpointError, match=r"does not know[^$]*Hydra, Medusa[^$]*dflash"):
        read_heads(tmp_path)
    folder = write(tmp_path / "cut", SMALL)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_heads(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=re.escape(WEIGHTS)):
        read_heads(folder)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / CONFIG).write_text(json.dumps({"medusa_num_heads": 1}))
    torch.save({"0.0.linear.weight": Planted()}, tmp_path / "bad" / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_heads(tmp_path / "bad")
    assert not (tmp_path / "planted").exists()


def test_a_description_that_is_not_right_is_refused(tmp_path: Path) -> None:
    write(tmp_path, SMALL)
    for change in ({"heads": 0}, {"kind": "other"}, {"prefix": {"heads": 1}}, {"width": "64"}):
        (tmp_path / CONFIG).write_text(json.dumps(SMALL.to_json() | change))
        with pytest.raises(CheckpointError, match="description"):
            read_heads(tmp_path)
