"""What a folder of routers holds: a description, and for each routed feed-forward one linear.

    config.json                       {"format": "graft routers", "width": 576, "intermediate": 1536, ...}
    routers.safetensors               3.weight [outputs, width] and 3.bias [outputs] of feed-forward 3, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from graft.compiler.errors import CheckpointError
from graft.passes.routing.folder import check_shapes, read_folder

FORMAT, WEIGHTS, WHAT = "graft routers", "routers.safetensors", "routers"


@dataclass(frozen=True)
class RoutingConfig:
    """How feed-forwards are cut into blocks of neurons, and which of them a row runs.

    Either the `top_k` blocks that the router ranks highest (FactorLLM, 2408.11855; blocks of neurons in their order),
    or as many of the first blocks as `prefixes` says for the output that it ranks highest: (1, 2, ..., n) is Adaptive
    Computation Modules (2312.10193), (0, 1, n) the switch between nothing, a small and the whole feed-forward of
    Duo-LLM (2410.10846), whose small one is then the first block. Blocks are added up as they are, without weights of
    the router: all of them together are the feed-forward.
    """

    width: int
    intermediate: int
    bounds: tuple[int, ...]
    """Block i holds the neurons from bounds[i] to bounds[i + 1]; even numbers, from 0 to `intermediate`."""
    layers: tuple[int, ...]
    """Which feed-forwards are routed, ascending."""
    top_k: int | None = None
    prefixes: tuple[int, ...] | None = None
    """Ascending numbers of blocks."""

    def __post_init__(self) -> None:
        blocks, sizes = len(self.bounds) - 1, self.prefixes
        right = blocks > 1 and (self.bounds[0], self.bounds[-1]) == (0, self.intermediate) and self.width > 0
        right &= ascending(self.bounds) and all(bound % 2 == 0 for bound in self.bounds[:-1])
        right &= bool(self.layers) and ascending(self.layers) and self.layers[0] >= 0
        right &= (self.top_k is None) is not (sizes is None)
        right &= self.top_k is None or 0 < self.top_k < blocks
        right &= sizes is None or (len(sizes) > 1 and ascending(sizes) and sizes[0] >= 0 and sizes[-1] <= blocks)
        if not right:
            raise CheckpointError(
                "the description of routers is not right",
                expected="ascending even bounds from 0 to the intermediate size, layers, and top_k below the number of "
                "blocks or ascending prefixes of up to all of them",
                found=self,
            )

    @property
    def blocks(self) -> int:
        """Of each feed-forward."""
        return len(self.bounds) - 1

    @property
    def outputs(self) -> int:
        """Numbers that a router ranks."""
        return self.blocks if self.prefixes is None else len(self.prefixes)

    def needing(self, block: int) -> tuple[int, int]:
        """The outputs, from first to last, of which one has to rank among the first for the block to run."""
        if self.prefixes is None:
            return block, block + 1
        return next((at for at, size in enumerate(self.prefixes) if size > block), self.outputs), self.outputs

    def check(self, tensors: Mapping[str, Tensor], where: object) -> None:
        """Raise CheckpointError, naming them, for tensors that are missing, surplus or of another shape."""
        expected: dict[str, tuple[int, ...]] = {}
        for layer in self.layers:
            expected |= {f"{layer}.weight": (self.outputs, self.width), f"{layer}.bias": (self.outputs,)}
        check_shapes(expected, tensors, WHAT, where)

    def to_json(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {"format": FORMAT, **asdict(self)}


def ascending(numbers: tuple[int, ...]) -> bool:
    """Whether they are whole numbers, each larger than the one before."""
    whole = all(type(number) is int for number in numbers)
    return whole and all(one < other for one, other in pairwise(numbers))


def read_routers(folder: str | Path) -> tuple[RoutingConfig, dict[str, Tensor]]:
    """A folder's description and tensors. Raises CheckpointError for what cannot be read or does not fit together."""
    folder = Path(folder).expanduser()
    config, tensors = read_folder(RoutingConfig, folder, FORMAT, WEIGHTS, WHAT)
    config.check(tensors, folder)
    return config, tensors
