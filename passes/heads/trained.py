"""Folders that `train-heads` writes for parts without a published layout: config.json and one file of tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graft.compiler.errors import CheckpointError
from graft.passes.heads.dialects import CONFIG

Shapes = Mapping[str, tuple[int, ...]]


def read_trained(
    folder: str | Path, what: str, file: str, shapes: Callable[[dict[str, Any]], Shapes], **made_for: object
) -> dict[str, Tensor]:
    """The tensors of a folder. `shapes` says from config.json what there must be, `made_for` what stands there.

    Raises CheckpointError where that is not so, naming what is missing or surplus; `what` is the part's name.
    """
    where = Path(folder).expanduser()
    try:
        data = json.loads((where / CONFIG).read_text())
        said = {name: data[name] for name in made_for}
        expected, tensors = dict(shapes(data)), load_file(where / file)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"there is no {what} here",
            expected=f"{CONFIG} and {file}, as train-heads writes them",
            found=f"{type(error).__name__}: {error}",
            where=where,
        ) from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if said != made_for or found != expected:
        missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        wrong = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
        raise CheckpointError(
            f"the {what} does not fit",
            expected=f"{made_for or what}, tensors of sizes {expected}",
            found=f"{said or what}; missing: {missing}; surplus: {surplus}; of other sizes: {wrong}",
            where=where,
        )
    return tensors
