"""What a folder of zero-computation experts holds: how many of each kind, and tensors for each mixture.

    config.json              {"format": "graft zero-computation experts", "zero": 1, "copy": 1, "constant": 1, ...}
    experts.safetensors      3.router [zero + copy + constant, width], 3.mix [2 constant, width] and
                             3.vectors [constant, width] of mixture 3, ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graft.compiler.errors import CheckpointError
from graft.passes.routing.config import ascending

FORMAT = "graft zero-computation experts"
CONFIG, WEIGHTS = "config.json", "experts.safetensors"


@dataclass(frozen=True)
class ZeroComputationConfig:
    """How many experts of each kind stand behind a mixture's own, in this order, and in which mixtures."""

    zero: int
    """Experts that give zero."""
    copy: int
    """Experts that give their input x."""
    constant: int
    """Experts that give a1 x + a2 v, where (a1, a2) = softmax(W x): W in `mix`, v in `vectors`."""
    layers: tuple[int, ...]
    """Which mixtures, counted from 0 in the order of the model, ascending."""

    def __post_init__(self) -> None:
        counts = (self.zero, self.copy, self.constant)
        right = all(type(count) is int and count >= 0 for count in counts) and sum(counts) > 0
        if not right or not self.layers or not ascending(self.layers) or self.layers[0] < 0:
            raise CheckpointError(
                "the description of zero-computation experts is not right",
                expected="numbers of zero, copy and constant experts, one of them at least, and ascending layers",
                found=self,
            )

    @property
    def count(self) -> int:
        """Of all kinds together."""
        return self.zero + self.copy + self.constant

    def check(self, tensors: Mapping[str, Tensor], width: int, where: object) -> None:
        """Raise CheckpointError, naming them, for tensors that are missing, surplus or of another shape."""
        expected: dict[str, tuple[int, ...]] = {}
        for layer in self.layers:
            expected[f"{layer}.router"] = (self.count, width)
            if self.constant:
                expected |= {f"{layer}.mix": (2 * self.constant, width), f"{layer}.vectors": (self.constant, width)}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            wrong = min(name for name in expected.keys() | found if expected.get(name) != found.get(name))
            raise CheckpointError(
                "the tensors of zero-computation experts do not fit their description and this model",
                expected=f"{wrong} {list(expected.get(wrong, ())) or 'not there'}",
                found=f"{wrong} {list(found.get(wrong, ())) or 'not there'}",
                where=where,
            )

    def to_json(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {"format": FORMAT, **asdict(self)}


def read_experts(folder: str | Path) -> tuple[ZeroComputationConfig, dict[str, Tensor]]:
    """A folder's description and tensors. Raises CheckpointError for what cannot be read."""
    folder = Path(folder).expanduser()
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        expected = f"{CONFIG} and {WEIGHTS}"
        raise CheckpointError("experts cannot be read", expected=expected, found=error, where=folder) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError("these are no such experts", expected=f'"format": "{FORMAT}"', where=folder / CONFIG)
    names = [field.name for field in fields(ZeroComputationConfig) if field.name in data]
    given: dict[str, Any] = {name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in names}
    try:
        return ZeroComputationConfig(**given), tensors
    except TypeError as error:
        problem = "the description of zero-computation experts is not right"
        raise CheckpointError(problem, found=error, where=folder / CONFIG) from error
