"""Reading trained draft heads: graft's own folders, and those that others publish, by their own key names.

A checkpoint is a folder with config.json and one file of tensors, in safetensors or a torch file, which is read with
weights_only, so that nothing in it is executed. What the tensors of each dialect are called is in `DIALECTS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graft.compiler.errors import CheckpointError
from graft.passes.heads.clover import CloverConfig, describe_clover, rename_clover
from graft.passes.heads.config import FORMAT, Described, HeadsConfig, refuse
from graft.passes.heads.eagle import EagleConfig, describe_eagle, rename_eagle
from graft.passes.heads.layer import DecoderLayer, rename_layer

CONFIG = "config.json"
WEIGHTS = "heads.safetensors"
"""File of tensors in graft's own layout."""
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Dialect:
    """How one publisher writes heads down."""

    name: str
    kind: str
    """Of its heads; "" where config.json says it."""
    files: tuple[str, ...]
    """Where the tensors may be, the first that exists counts."""
    matches: Callable[[Mapping[str, Any]], bool]
    """Whether a config.json is of this dialect."""
    rename: Callable[[str], str | None]
    """A tensor's name here -> ours; "" for what is known and not needed, None for what is not known."""
    describe: Callable[[Mapping[str, Any], Tensors], Described]
    """The description, from config.json and the renamed tensors."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """A folder's config.json. Raises CheckpointError where there is none."""
    path = Path(folder).expanduser() / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) else "text that is not JSON"
        raise CheckpointError(
            "there are no draft heads here", expected=f"a folder with {CONFIG}", found=found, where=path
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError("a description of draft heads is not an object", found=type(data).__name__, where=path)
    return data


def dialect_of(data: Mapping[str, Any], folder: str | Path) -> Dialect:
    """Who wrote the folder. Raises CheckpointError, naming the dialects, where nobody known did."""
    for dialect in DIALECTS:
        if dialect.matches(data):
            return dialect
    other = data.get("speculators_model_type") or data.get("model_type") or data.get("architectures")
    raise CheckpointError(
        "draft heads of a kind that graft does not know",
        expected=", ".join(dialect.name for dialect in DIALECTS),
        found=other or ", ".join(sorted(data)[:8]),
        where=Path(folder) / CONFIG,
    )


def kind_of(folder: str | Path) -> str:
    """Which kind of heads a folder holds. Raises CheckpointError where nobody known wrote it."""
    data = read_config(folder)
    return dialect_of(data, folder).kind or str(data.get("kind"))


def read_heads(folder: str | Path) -> tuple[Described, Tensors]:
    """The heads in a folder, tensors under graft's own names.

    Raises CheckpointError for a folder without heads, a dialect that is not known, a damaged file, and tensors that
    are missing, surplus or of the wrong shape.
    """
    folder = Path(folder).expanduser()
    data = read_config(folder)
    dialect = dialect_of(data, folder)
    path = next((folder / name for name in dialect.files if (folder / name).is_file()), None)
    if path is None:
        expected = " or ".join(dialect.files)
        raise CheckpointError("the tensors of draft heads are missing", expected=expected, where=folder)
    found, unknown = Tensors(), set()
    for name, tensor in read_tensors(path).items():
        ours = dialect.rename(name)
        if ours is None:
            unknown.add(name)
        elif ours:
            found[ours] = tensor
    refuse(f"are not among those of {dialect.name}", unknown, path)
    config = dialect.describe(data, found)
    config.check(found, path)
    return config, found


def read_tensors(path: Path) -> Tensors:
    """The tensors in a file. A torch file is read without executing anything in it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise damaged(path, error) from error
    except Exception as error:  # pickle's own error, which stands for "not weights only"
        raise damaged(path, error) from error
    if not isinstance(data, dict) or not all(isinstance(tensor, Tensor) for tensor in data.values()):
        raise damaged(path, type(data).__name__)
    return data


def damaged(path: Path, found: object) -> CheckpointError:
    """The error for a file that holds no tensors by name."""
    return CheckpointError(
        "a file of draft heads cannot be read", expected="tensors by name, and nothing else", found=found, where=path
    )


def count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that `pattern` finds in the names."""
    found = [int(match[1]) for match in (re.match(pattern, name) for name in tensors) if match]
    return max(found, default=-1) + 1


def width_of(tensors: Mapping[str, Tensor]) -> int:
    """The width of the target that the heads are for."""
    refuse("are missing", {"0.input.weight"} - tensors.keys(), "the first head")
    return int(tensors["0.input.weight"].shape[0])


def described(kind: Any, tensors: Tensors, **options: Any) -> HeadsConfig:
    """Heads with unembeddings of their own, as many as there are tensors of."""
    refuse("are missing", {"0.unembedding.weight"} - tensors.keys(), "the first head")
    return HeadsConfig(
        kind,
        count(tensors, r"(\d+)\."),
        width_of(tensors),
        int(tensors["0.unembedding.weight"].shape[0]),
        layers=max(count(tensors, r"\d+\.blocks\.(\d+)\."), 1),
        reduced="draft_vocabulary" in tensors,
        biased="0.unembedding.bias" in tensors,
        **options,
    )


def block_name(head: str, block: int, part: str) -> str:
    """Our name of a block's weight or bias."""
    return f"{head}.input.{part}" if block == 0 else f"{head}.blocks.{block}.{part}"


def rename_medusa(name: str) -> str | None:
    """FasterDecoding/Medusa: `{i}.{j}.linear.weight`, `.bias` of block j, `{i}.{L}.weight` the unembedding."""
    if match := re.fullmatch(r"(\d+)\.(\d+)\.linear\.(weight|bias)", name):
        return block_name(match[1], int(match[2]), match[3])
    match = re.fullmatch(r"(\d+)\.\d+\.weight", name)
    return f"{match[1]}.unembedding.weight" if match else None


def describe_medusa(data: Mapping[str, Any], tensors: Tensors) -> HeadsConfig:
    """The published v0.1 configurations say two heads where the file holds five: the file counts."""
    return described("medusa", tensors)


def rename_vllm(name: str) -> str | None:
    """vLLM: `blocks.{i}.layers.{j}.weight`, `lm_heads.{i}.weight`, `token_map`, perhaps behind `medusa_heads.`."""
    name = name.removeprefix("medusa_heads.")
    if match := re.fullmatch(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)", name):
        return block_name(match[1], int(match[2]), match[3])
    if match := re.fullmatch(r"lm_heads\.(\d+)\.weight", name):
        return f"{match[1]}.unembedding.weight"
    if name == "lm_head.weight":
        return "unembedding.weight"
    return "draft_vocabulary" if name == "token_map" else None


def describe_vllm(data: Mapping[str, Any], tensors: Tensors) -> HeadsConfig:
    """A missing bias is zero (`medusa_fc_bias` false); `original_lm_head`: all heads share one unembedding."""
    for name in [name for name in tensors if re.fullmatch(r"\d+\.(input|blocks\.\d+)\.weight", name)]:
        bias = f"{name.removesuffix('weight')}bias"
        tensors.setdefault(bias, tensors[name].new_zeros(tensors[name].shape[0]))
    if "draft_vocabulary" in tensors:
        tensors["draft_vocabulary"] = tensors["draft_vocabulary"].long()
    if not data.get("original_lm_head"):
        return described("medusa", tensors)
    refuse("are missing", {"unembedding.weight"} - tensors.keys(), "original_lm_head")
    heads, layers = count(tensors, r"(\d+)\."), max(count(tensors, r"\d+\.blocks\.(\d+)\."), 1)
    vocabulary, reduced = int(tensors["unembedding.weight"].shape[0]), "draft_vocabulary" in tensors
    return HeadsConfig("medusa", heads, width_of(tensors), vocabulary, layers, "shared", reduced)


def rename_hydra(name: str) -> str | None:
    """zankner/Hydra: `hydra_mlp.{i}.{j}.linear`, `.res_connection`, `hydra_lm_head.{i}[.1]`, `prefix_embeding_layer`.

    With a prefix layer blocks stand at odd places, dropouts between; what a LlamaModel has beside its layer and its
    norm is not used.
    """
    if match := re.fullmatch(r"hydra_mlp\.(\d+)\.(\d+)\.(linear|res_connection)\.(weight|bias)", name):
        head, block, role, part = match.groups()
        return f"{head}.place.{block}.{role}.{part}"
    if match := re.fullmatch(r"hydra_lm_head\.(\d+)(?:\.1)?\.(weight|bias)", name):
        return f"{match[1]}.unembedding.{match[2]}"
    inner = name.removeprefix("prefix_embeding_layer.")
    if inner == name:
        return None
    if inner == "embed_tokens.weight" or inner.endswith("rotary_emb.inv_freq"):
        return ""
    if inner == "norm.weight":
        return "prefix.norm.weight"
    return rename_layer(inner.removeprefix("layers.0."), "prefix")


def describe_hydra(data: Mapping[str, Any], tensors: Tensors) -> HeadsConfig:
    """The size of the prefix layer's heads comes from config.json where it is there, else it is 128, as Vicuna's."""
    places = sorted({int(name.split(".")[2]) for name in tensors if ".place." in name})
    for name in [name for name in tensors if ".place." in name]:
        head, _, place, role, part = name.split(".")
        block, tensor = places.index(int(place)), tensors.pop(name)
        if role == "res_connection":
            tensors[f"{head}.residual.{part}" if block == 0 else f"{head}.blocks.{block}.residual.{part}"] = tensor
        else:
            tensors[block_name(head, block, part)] = tensor
    prefix = None
    if "prefix.q_proj.weight" in tensors and "prefix.gate_proj.weight" in tensors:
        inside, kv = (int(tensors[f"prefix.{one}_proj.weight"].shape[0]) for one in ("q", "k"))
        size = int(data.get("head_dim") or inside // int(data.get("num_attention_heads") or max(inside // 128, 1)))
        prefix = DecoderLayer(
            inside // size,
            kv // size,
            size,
            int(tensors["prefix.gate_proj.weight"].shape[0]),
            float(data.get("rope_theta", 10000.0)),
            float(data.get("rms_norm_eps", 1e-6)),
        )
    return described("hydra", tensors, prefix=prefix)


KINDS: dict[Any, type[Described]] = {
    "medusa": HeadsConfig, "hydra": HeadsConfig, "eagle-3": EagleConfig, "clover-2": CloverConfig
}  # fmt: skip
"""What describes heads of a kind."""


def describe_own(data: Mapping[str, Any], tensors: Tensors) -> Described:
    """graft's own config.json."""
    return KINDS.get(data.get("kind"), HeadsConfig).from_json(data, CONFIG)


def is_eagle(data: Mapping[str, Any]) -> bool:
    """Both layouts of EAGLE-3: speculators say it, SafeAILab's have the size of a draft vocabulary."""
    kind = data.get("speculators_model_type")
    return kind == "eagle3" or (kind is None and "draft_vocab_size" in data)


HUB = ("model.safetensors", "pytorch_model.bin")
DIALECTS = (
    Dialect(FORMAT, "", (WEIGHTS,), lambda data: data.get("format") == FORMAT, lambda name: name, describe_own),
    Dialect(
        "Hydra", "hydra", ("hydra_lm_head.safetensors", "hydra_lm_head.pt"), lambda data: "hydra_num_heads" in data,
        rename_hydra, describe_hydra,
    ),
    Dialect(
        "Medusa", "medusa", ("medusa_lm_head.safetensors", "medusa_lm_head.pt"),
        lambda data: "medusa_num_heads" in data, rename_medusa, describe_medusa,
    ),
    Dialect(
        "vLLM's Medusa", "medusa", HUB, lambda data: data.get("model_type") == "medusa" and "num_heads" in data,
        rename_vllm, describe_vllm,
    ),
    Dialect("EAGLE-3", "eagle-3", HUB, is_eagle, rename_eagle, describe_eagle),
    Dialect("Clover-2", "clover-2", HUB, lambda data: isinstance(data.get("clover"), dict), rename_clover,
            describe_clover),
)  # fmt: skip
"""Who writes heads down, and how. A configuration is of the first that it matches."""
