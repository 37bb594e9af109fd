"""What a folder of trained draft heads holds: a description, and tensors under graft's own names.

    0.input.weight, 0.input.bias            W of head 0's first block (Hydra: over the hidden state and the embeddings)
    0.residual.weight, 0.residual.bias      R of it (Hydra)
    0.blocks.1.weight, 0.blocks.1.bias      the further blocks
    0.unembedding.weight                    where each head has its own
    unembedding.weight                      where they share one that is not the target's
    draft_vocabulary                        int64 [v]: the target's token for each draft id; absent: all tokens
    prefix.q_proj.weight, ...               the prefix layer (Hydra++)

The tensors of EAGLE-3 are in `passes/heads/eagle.py`, those of Clover-2 in `passes/heads/clover.py`.
`passes/heads/dialects.py` reads what others publish into the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, Self, get_args

from torch import Tensor

from graft.compiler.errors import CheckpointError
from graft.passes.heads.layer import DecoderLayer, Shapes

Kind = Literal["medusa", "hydra"]
Unembedding = Literal["own", "shared", "target"]
FORMAT = "graft draft heads"
"""What "format" says in the config.json of a folder in this layout."""


class Described(ABC):
    """What is common to the descriptions of all kinds of heads, which are frozen dataclasses."""

    kind: Any
    width: int
    """Of the heads' own hidden states and of the embeddings that they read."""
    vocabulary: int
    """Tokens that a head's logits are over."""
    unembedding: Unembedding
    """What makes logits: a matrix of each head, one of all heads, or the target's, of which a reduced draft vocabulary
    takes the rows of its tokens."""
    reduced: bool
    """Whether `draft_vocabulary` says which of the target's tokens the logits are over."""

    @property
    def target_width(self) -> int:
        """Of the target's hidden states."""
        return self.width

    @property
    def decoder_layer(self) -> DecoderLayer | None:
        """The kind of the heads' decoder layers; None where they have none."""
        return None

    @abstractmethod
    def shapes(self) -> Shapes:
        """Every tensor that the heads have, by name."""

    def vocabulary_shapes(self) -> Shapes:
        """Of what makes logits for all heads."""
        found: Shapes = {"unembedding.weight": (self.vocabulary, self.width)} if self.unembedding == "shared" else {}
        return found | ({"draft_vocabulary": (self.vocabulary,)} if self.reduced else {})

    def wrong(self, expected: str) -> CheckpointError:
        """The error for a description that contradicts itself."""
        return CheckpointError("the description of draft heads is not right", expected=expected, found=self)

    def check(self, tensors: Mapping[str, Tensor], where: object) -> None:
        """Raise CheckpointError, naming them, for tensors that are missing, surplus or of another shape."""
        expected = self.shapes()
        refuse("are missing", expected.keys() - tensors.keys(), where)
        refuse("are not among those of such heads", tensors.keys() - expected.keys(), where)
        wrong = {name for name, shape in expected.items() if tuple(tensors[name].shape) != shape}
        if wrong:
            name = min(wrong)
            raise CheckpointError(
                "a tensor of draft heads has the wrong shape",
                expected=list(expected[name]),
                found=list(tensors[name].shape),
                where=f"{name}, {where}",
            )

    def to_json(self) -> dict[str, Any]:
        """As it stands in config.json."""
        assert is_dataclass(self)
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: object) -> Self:
        """From a config.json in graft's own layout; what else stands there is left to those who read it."""
        assert is_dataclass(cls)
        given = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        try:
            for name in given.keys() & {"prefix", "layer"}:
                given[name] = None if given[name] is None else DecoderLayer(**given[name])
            return cls(**given)
        except TypeError as error:
            raise CheckpointError("the description of draft heads is not right", found=error, where=where) from error


@dataclass(frozen=True)
class HeadsConfig(Described):
    """Medusa, Hydra or Hydra++."""

    kind: Kind
    heads: int
    width: int
    vocabulary: int
    layers: int = 1
    """Residual blocks of each head."""
    unembedding: Unembedding = "own"
    reduced: bool = False
    biased: bool = False
    """Whether the heads' own unembeddings have a bias."""
    prefix: DecoderLayer | None = None
    """Hydra++: a layer and a norm over the hidden states, in front of the heads."""

    def __post_init__(self) -> None:
        numbers = (self.heads, self.width, self.vocabulary, self.layers)
        right = all(type(number) is int and number >= 1 for number in numbers)
        right &= self.kind in get_args(Kind) and self.unembedding in get_args(Unembedding)
        right &= self.prefix is None or self.kind == "hydra"
        if not right:
            raise self.wrong(
                f"kind {' or '.join(get_args(Kind))}, numbers of 1 or more, a prefix layer for hydra alone"
            )

    @property
    def decoder_layer(self) -> DecoderLayer | None:
        """See `Described.decoder_layer`."""
        return self.prefix

    def shapes(self) -> Shapes:
        """See `Described.shapes`."""
        width, found = self.width, Shapes()
        for head in range(self.heads):
            inputs = width * (head + 2) if self.kind == "hydra" else width
            found |= {f"{head}.input.weight": (width, inputs), f"{head}.input.bias": (width,)}
            if self.kind == "hydra":
                found |= {f"{head}.residual.weight": (width, inputs), f"{head}.residual.bias": (width,)}
            for block in range(1, self.layers):
                found |= {f"{head}.blocks.{block}.weight": (width, width), f"{head}.blocks.{block}.bias": (width,)}
            if self.unembedding == "own":
                found[f"{head}.unembedding.weight"] = (self.vocabulary, width)
                if self.biased:
                    found[f"{head}.unembedding.bias"] = (self.vocabulary,)
        if self.prefix is not None:
            found |= self.prefix.shapes("prefix", width) | {"prefix.norm.weight": (width,)}
        return found | self.vocabulary_shapes()


def refuse(what: str, names: set[str], where: object) -> None:
    """Raise CheckpointError for names, if there are any."""
    if names:
        shown = sorted(names)
        rest = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        raise CheckpointError(f"tensors of draft heads {what}", found=", ".join(shown[:8]) + rest, where=where)
