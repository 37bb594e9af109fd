"""Add SpecDec++'s acceptance head as a function: how probably the target accepts what an exit drafts.

before:
    stream = add(h, feed_forward(norm(h)))
    return linear(norm(stream), unembedding)
after, beside the unchanged target, for one block:
    u = mul(hidden, rsqrt(add(mean(mul(hidden, hidden), [-1], True), 1e-06)))
    x = add(u, silu(linear(u, w, b)))
    return linear(index_select(x, 0, wanted), o, c), x
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graft.compiler.building import Builder, add_parameters
from graft.compiler.canonical import aten
from graft.compiler.passing import Contract, Pass, View, lossless
from graft.compiler.program import Input
from graft.passes.heads.trained import read_trained

ACCEPTANCE = "acceptance"
"""Name of the function, and of its parameters among the program's weights."""
ACCEPTANCE_FORMAT, ACCEPTANCE_WEIGHTS = "graft acceptance head", "acceptance.safetensors"
"""What "format" says in the folder's config.json, and the file of tensors."""
EPS = 1e-6


@dataclass(frozen=True)
class AcceptanceHead(Pass):
    """SpecDec++'s head (2405.19715) on the stream at an exit: residual blocks, and a line to two classes, of which the
    second is "accepted". The paper's reads a draft model's final hidden state and judges the token that was consumed;
    here it is the stream, divided by its root mean square, and the token that is drafted from it. Keys are the paper's:
    model.0.linear.weight, ..., model.1.weight, model.1.bias.
    """

    folder: str
    """What `train-heads --kind acceptance` wrote."""
    layer: int

    contract: ClassVar[Contract] = lossless
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "kv-cache"})

    def run(self, view: View) -> None:
        """Logits [R, 2] of the stream [N, width]."""
        value = view.trunk.hidden.meta["val"]
        width = int(value.shape[-1])
        tensors = read_acceptance(self.folder, self.layer, width)
        blocks = len(tensors) // 2 - 1
        device = view.function.device
        add_parameters(view, ACCEPTANCE, {name: one.to(device, value.dtype) for name, one in tensors.items()})
        builder = Builder(view, ACCEPTANCE, [Input("hidden", ("N", width), value.dtype)])
        x = builder["hidden"]
        wide = builder.wide(x)
        wide = wide * ((wide * wide).apply(aten.mean.dim, [-1], True) + EPS).apply(aten.rsqrt.default)
        x = wide if wide.dtype == x.dtype else wide.apply(aten._to_copy.default, dtype=x.dtype)
        for block in range(blocks):
            x = x + builder.linear(x, f"{ACCEPTANCE}.model.{block}.linear").apply(aten.silu.default)
        logits = builder.linear(builder.wanted(x), f"{ACCEPTANCE}.model.{blocks}")
        builder.finish(builder.wide(logits), x)


def acceptance_shapes(blocks: int, width: int) -> dict[str, tuple[int, ...]]:
    """Of the head's tensors."""
    found: dict[str, tuple[int, ...]] = {}
    for block in range(blocks):
        found |= {f"model.{block}.linear.weight": (width, width), f"model.{block}.linear.bias": (width,)}
    return found | {f"model.{blocks}.weight": (2, width), f"model.{blocks}.bias": (2,)}


def read_acceptance(folder: str, layer: int, width: int) -> dict[str, Tensor]:
    """The head's tensors. Raises CheckpointError, naming what is missing or surplus, where they do not fit."""
    shapes = lambda data: acceptance_shapes(int(data["num_layers"]), width)  # noqa: E731
    return read_trained(folder, "acceptance head", ACCEPTANCE_WEIGHTS, shapes, layer=layer)
