"""What a training run trains: a network, its loss, its figures, and the folder that comes out, one class for a kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graft.compiled import CompiledModel
from graft.compiler.errors import CheckpointError
from graft.compiler.shapes import attribute
from graft.compiler.trunk import find_trunk
from graft.passes.heads.config import HeadsConfig
from graft.passes.heads.dialects import WEIGHTS
from graft.passes.heads.layer import DecoderLayer
from graft.training.features import Sample, Shards
from graft.training.networks import HeadsNetwork
from graft.training.options import TrainOptions
from graft.training.steps import Figures, losses, measure


class Network(Protocol):
    """A module that names its parameters as its folder does."""

    def named(self) -> dict[str, Tensor]:
        """Parameters by their names in the folder."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """All of them."""


class Trainee(Protocol):
    """What a run asks of a kind."""

    file: str
    """Name of the file of tensors."""

    @property
    def network(self) -> Network:
        """What is trained."""

    def losses(self, batch: Sequence[Sample]) -> list[Tensor]:
        """The parts of the loss; each counts `TrainOptions.decay` times the one before."""

    def measure(self, held: Iterable[Sequence[Sample]]) -> Figures:
        """Figures of sequences that are not trained on: "loss" and "tokens_per_step" among them."""

    def finished(self, best: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """config.json but for figures and training, and the tensors, both as they are written."""


class TrainedHeads:
    """Medusa, Hydra and Hydra++."""

    file = WEIGHTS

    def __init__(self, compiled: CompiledModel, shards: Shards, options: TrainOptions) -> None:
        device, size = compiled.decoder.device, compiled.decoder.vocabulary
        embedding, matrix = tables(compiled)
        count = min(options.vocabulary or size, size)
        self.chosen = shards.frequent(count, size) if count < size else torch.arange(size)
        self.embedding = embedding.float()
        unembedding = matrix[self.chosen.to(device)]
        self.dtype = unembedding.dtype
        self.draft_id = torch.full((size,), -1, device=device)
        self.draft_id[self.chosen.to(device)] = torch.arange(count, device=device)
        assert options.kind in ("medusa", "hydra")
        self.config = HeadsConfig(
            options.kind, options.heads, int(unembedding.shape[1]), count, options.layers, options.unembedding,
            reduced=count < size, prefix=prefix_of(compiled) if options.prefix else None,
        )  # fmt: skip
        self.network: HeadsNetwork = HeadsNetwork(self.config, unembedding, options.seed).to(device)

    def losses(self, batch: Sequence[Sample]) -> list[Tensor]:
        """See `Trainee.losses`: one for each head."""
        return losses(self.network, batch, self.embedding, self.draft_id)

    def measure(self, held: Iterable[Sequence[Sample]]) -> Figures:
        """See `Trainee.measure`."""
        return measure(self.network, held, self.embedding, self.draft_id)

    def finished(self, best: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Trainee.finished`."""
        tensors = {name: tensor.to("cpu", self.dtype).contiguous() for name, tensor in best.items()}
        if self.config.reduced:
            tensors["draft_vocabulary"] = self.chosen
        self.config.check(tensors, self.file)
        return self.config.to_json(), tensors


def tables(compiled: CompiledModel) -> tuple[Tensor, Tensor]:
    """The target's embedding and unembedding. Raises CheckpointError where they were given up."""
    forward = compiled.program["forward"]
    trunk = find_trunk(forward.graph)
    nodes = (trunk.embedding.args[0], trunk.unembedding.args[1])
    found = [attribute(forward.weights, node.target) for node in nodes]
    if any(tensor.is_meta for tensor in found):
        raise CheckpointError("heads are trained with the target's own tables", remedy="compile without release")
    return found[0].detach(), found[1].detach()


def prefix_of(compiled: CompiledModel) -> DecoderLayer:
    """A prefix layer of the shape of the target's own layers."""
    config, state = compiled.generator.face.config, compiled.program["forward"].states[0]
    heads = int(config.num_attention_heads)
    inside = int(getattr(config, "intermediate_size", 0) or 4 * config.hidden_size)
    return DecoderLayer(heads, state.heads, int(config.hidden_size) // heads, inside)
