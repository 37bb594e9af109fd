"""What a folder of zero-computation experts holds: how many of each kind, and tensors for each mixture.

    config.json              {"format": "graft zero-computation experts", "zero": 1, "copy": 1, "constant": 1, ...}
    experts.safetensors      3.router [zero + copy + constant, width], 3.mix [2 constant, width] and
                             3.vectors [constant, width] of mixture 3, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from graft.compiler.errors import CheckpointError
from graft.passes.routing.config import ascending
from graft.passes.routing.folder import check_shapes, read_folder

FORMAT, WEIGHTS, WHAT = "graft zero-computation experts", "experts.safetensors", "zero-computation experts"


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
        check_shapes(expected, tensors, WHAT, where)

    def to_json(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {"format": FORMAT, **asdict(self)}


def read_experts(folder: str | Path) -> tuple[ZeroComputationConfig, dict[str, Tensor]]:
    """A folder's description and tensors. Raises CheckpointError for what cannot be read."""
    return read_folder(ZeroComputationConfig, Path(folder).expanduser(), FORMAT, WEIGHTS, WHAT)
