"""Add Judge Decoding's head as a function: how probably a drafted token may stand that the target would not choose.

before:
    hidden = norm(h)
    return linear(hidden, unembedding), hidden
after, beside the unchanged target:
    score = sigmoid(linear(index_select(hidden, 0, wanted), weight, bias))
    return score, hidden
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graft.compiler.building import Builder, add_parameters
from graft.compiler.canonical import aten
from graft.compiler.host import scored_host
from graft.compiler.passing import Contract, Pass, View, lossless
from graft.compiler.program import Input
from graft.passes.exit_classifier import line_shapes
from graft.passes.heads.trained import read_trained

JUDGE = "judge"
"""Name of the function, and of its parameters among the program's weights."""
JUDGE_FORMAT, JUDGE_WEIGHTS = "graft judge head", "judge.safetensors"
"""What "format" says in the folder's config.json, and the file of tensors: "weight" [1, width] and "bias" [1]."""


@dataclass(frozen=True)
class JudgeHead(Pass):
    """Judge Decoding's head (2501.19309): a line over what the unembedding reads at a drafted token's own row, where
    the target has seen that token. The host program runs it behind the target, and verification reads its scores."""

    folder: str
    """What `train-heads --kind judge` wrote."""

    contract: ClassVar[Contract] = lossless
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "kv-cache"})

    def run(self, view: View) -> None:
        """Probabilities float32 [R, 1] of hidden states [N, width]."""
        value, device = view.trunk.hidden.meta["val"], view.function.device
        width = int(value.shape[-1])
        tensors = read_trained(self.folder, "judge head", JUDGE_WEIGHTS, lambda _: line_shapes(width))
        add_parameters(view, JUDGE, {name: one.to(device, value.dtype) for name, one in tensors.items()})
        builder = Builder(view, JUDGE, [Input("hidden", ("N", width), value.dtype)])
        line = builder.linear(builder.wanted(builder["hidden"]), JUDGE)
        score = builder.wide(line).apply(aten.sigmoid.default)
        builder.finish(score, builder["hidden"])
        view.program.host = scored_host(view.program.host, JUDGE)
