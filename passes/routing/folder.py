"""Folders of parts of feed-forwards that were trained: config.json describes them, one file holds their tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graft.compiler.errors import CheckpointError

CONFIG = "config.json"

T = TypeVar("T")


def read_folder(kind: type[T], folder: Path, form: str, weights: str, what: str) -> tuple[T, dict[str, Tensor]]:
    """The description, a dataclass of tuples and numbers, and the tensors. `form` is what "format" has to say there,
    `what` the parts' name. Raises CheckpointError for what cannot be read."""
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / weights)
    except (OSError, ValueError, SafetensorError) as error:
        expected = f"{CONFIG} and {weights}"
        raise CheckpointError(f"{what} cannot be read", expected=expected, found=error, where=folder) from error
    if not isinstance(data, dict) or data.get("format") != form:
        raise CheckpointError(f"this is no folder of {what}", expected=f'"format": "{form}"', where=folder / CONFIG)
    names = [field.name for field in fields(kind) if field.name in data]  # type: ignore[arg-type]
    given: dict[str, Any] = {name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in names}
    try:
        return kind(**given), tensors
    except TypeError as error:
        raise CheckpointError(f"the description of {what} is not right", found=error, where=folder / CONFIG) from error


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], what: str, where: object
) -> None:
    """Raise CheckpointError, naming one, for tensors that are missing, surplus or of another shape."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = min(name for name in expected.keys() | found if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"the tensors of {what} do not fit their description and this model",
            expected=f"{wrong} {list(expected.get(wrong, ())) or 'not there'}",
            found=f"{wrong} {list(found.get(wrong, ())) or 'not there'}",
            where=where,
        )
