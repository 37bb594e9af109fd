"""What a folder of trained draft heads holds: a description, and tensors under graft's own names.

    0.input.weight, 0.input.bias            W of head 0's first block (Hydra: over the hidden state and the embeddings)
    0.residual.weight, 0.residual.bias      R of it (Hydra)
    0.blocks.1.weight, 0.blocks.1.bias      the further blocks
    0.unembedding.weight                    where each head has its own
    unembedding.weight                      where they share one that is not the target's
    draft_vocabulary                        int64 [v]: the target's token for each draft id; absent: all tokens
    prefix.q_proj.weight, ...               the prefix layer (Hydra++)

`passes/heads/dialects.py` reads what others publish into the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from torch import Tensor

from graft.compiler.errors import CheckpointError

Kind = Literal["medusa", "hydra"]
Unembedding = Literal["own", "shared", "target"]
FORMAT = "graft draft heads"
"""What "format" says in the config.json of a folder in this layout."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Prefix:
    """The prefix layer of Hydra++: one Llama decoder layer and a norm over the hidden states, with its own KV."""

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rope_theta: float = 10000.0
    eps: float = 1e-6

    def shapes(self, width: int) -> Shapes:
        """Of its tensors."""
        inside, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "prefix.input_norm.weight": (width,),
            "prefix.q_proj.weight": (inside, width),
            "prefix.k_proj.weight": (kv, width),
            "prefix.v_proj.weight": (kv, width),
            "prefix.o_proj.weight": (width, inside),
            "prefix.post_norm.weight": (width,),
            "prefix.gate_proj.weight": (self.intermediate, width),
            "prefix.up_proj.weight": (self.intermediate, width),
            "prefix.down_proj.weight": (width, self.intermediate),
            "prefix.norm.weight": (width,),
        }


@dataclass(frozen=True)
class HeadsConfig:
    """Which heads these are."""

    kind: Kind
    heads: int
    width: int
    """Of the target's hidden states and embeddings."""
    vocabulary: int
    """Tokens that a head's logits are over."""
    layers: int = 1
    """Residual blocks of each head."""
    unembedding: Unembedding = "own"
    """What makes logits: a matrix of each head, one of all heads, or the target's, of which a reduced draft vocabulary
    takes the rows of its tokens."""
    reduced: bool = False
    """Whether `draft_vocabulary` says which of the target's tokens the logits are over."""
    biased: bool = False
    """Whether the heads' own unembeddings have a bias."""
    prefix: Prefix | None = None

    def __post_init__(self) -> None:
        numbers = (self.heads, self.width, self.vocabulary, self.layers)
        right = all(type(number) is int and number >= 1 for number in numbers)
        right &= self.kind in get_args(Kind) and self.unembedding in get_args(Unembedding)
        right &= self.prefix is None or self.kind == "hydra"
        if not right:
            raise CheckpointError(
                "the description of draft heads is not right",
                expected=f"kind {' or '.join(get_args(Kind))}, numbers of 1 or more, a prefix layer for hydra alone",
                found=self,
            )

    def shapes(self) -> Shapes:
        """Every tensor that the heads have, by name."""
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
        if self.unembedding == "shared":
            found["unembedding.weight"] = (self.vocabulary, width)
        if self.reduced:
            found["draft_vocabulary"] = (self.vocabulary,)
        return found | (self.prefix.shapes(width) if self.prefix else {})

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
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: object) -> HeadsConfig:
        """From a config.json in graft's own layout; what else stands there is left to those who read it."""
        given = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        try:
            if given.get("prefix") is not None:
                given["prefix"] = Prefix(**given["prefix"])
            return cls(**given)
        except TypeError as error:
            raise CheckpointError("the description of draft heads is not right", found=error, where=where) from error


def refuse(what: str, names: set[str], where: object) -> None:
    """Raise CheckpointError for names, if there are any."""
    if names:
        shown = sorted(names)
        rest = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        raise CheckpointError(f"tensors of draft heads {what}", found=", ".join(shown[:8]) + rest, where=where)
