"""Calibrations as JSON files that say which model they are of, checked when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graft.compiler.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FORMAT = "graft calibration"
SAMPLED = 64
"""Elements of every parameter that a model is known by."""
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What a model is known by: its shape, and a SHA-256 over names, sizes and some elements of its parameters."""
    seen = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]
        seen.update(f"{name} {tuple(parameter.shape)}".encode())
        # In bfloat16, so that a model in another dtype is the same model.
        seen.update(some.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return {**shape(model.config), "parameters": seen.hexdigest()}


def shape(config: PretrainedConfig) -> dict[str, Any]:
    """The part of a fingerprint that needs no parameters."""
    return {name: getattr(config.get_text_config(), name, None) for name in SHAPE}


def write(path: str | Path, kind: str, model: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write a file whole or not at all. Raises CheckpointError where it cannot be written."""
    path = Path(path).expanduser()
    content = {"format": FORMAT, "kind": kind, "model": dict(model), "result": dict(result)}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(json.dumps({**content, "sha256": digest(content)}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError("a calibration cannot be written", found=error, where=path) from error


def read(path: str | Path, kind: str, model: PreTrainedModel | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the model's fingerprint, the result) of a file.

    Raises CheckpointError for a file that is not a whole calibration of this kind, and, where one is given, for a
    calibration of another model.
    """
    path = Path(path).expanduser()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("a calibration cannot be read", expected="JSON", found=error, where=path) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError("this is not a calibration", expected=f'"format": "{FORMAT}"', where=path)
    held = data.pop("sha256", None)
    if held != digest(data):
        raise CheckpointError(
            "a calibration is damaged",
            expected=f"SHA-256 {digest(data)}",
            found=held,
            where=path,
            remedy="calibrate again; a file that was edited by hand counts as damaged",
        )
    if data["kind"] != kind:
        raise CheckpointError("this is a calibration of another kind", expected=kind, found=data["kind"], where=path)
    if model is not None and (own := fingerprint(model)) != data["model"]:
        differ = [name for name in own if own[name] != data["model"].get(name)]
        raise CheckpointError(
            "a calibration was made on another model",
            expected=", ".join(f"{name} {own[name]}" for name in differ),
            found=", ".join(f"{name} {data['model'].get(name)}" for name in differ),
            where=path,
            remedy="calibrate this model",
        )
    return data["model"], data["result"]


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 over the content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
