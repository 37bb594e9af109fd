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

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graft.compiler.building import Builder, add_parameters
from graft.compiler.canonical import aten
from graft.compiler.errors import CheckpointError
from graft.compiler.passing import Contract, Pass, View, lossless
from graft.compiler.program import Input

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
    where = Path(folder).expanduser()
    try:
        data = json.loads((where / "config.json").read_text())
        expected = acceptance_shapes(int(data["num_layers"]), width)
        made_for, found = int(data["layer"]), load_file(where / ACCEPTANCE_WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            "there is no acceptance head here",
            expected=f"config.json and {ACCEPTANCE_WEIGHTS}, as train-heads writes them",
            found=f"{type(error).__name__}: {error}",
            where=where,
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if made_for != layer or shapes != expected:
        missing, surplus = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
        wrong = sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name])
        raise CheckpointError(
            "the acceptance head does not fit",
            expected=f"one for layer {layer} and width {width}",
            found=f"layer {made_for}; missing: {missing}; surplus: {surplus}; of other sizes: {wrong}",
            where=where,
        )
    return found
