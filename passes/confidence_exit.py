"""Let tokens leave the model early where it is sure of the next one already.

before:
    h1 = add(h0, feed_forward(norm(h0)))
    h2 = add(h1, feed_forward(norm(h1)))
    return linear(final_norm(h2), table)
after (confidence-exit{layer=1,threshold=0.9}):
    h1 = add(h0, feed_forward(norm(h0)))
    early = _to_copy(linear(final_norm(h1), table), dtype=float32)
    total = sum(exp(sub(early, amax(early, [-1], True))), [-1], True)
    sure = ge(reciprocal(total), 0.9)
    h2 = add(h1, masked_fill(feed_forward(norm(h1)), sure, 0.0))
    return linear(final_norm(h2), table)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graft.compiler.canonical import aten
from graft.compiler.errors import PlanError
from graft.compiler.nodes import Value, new_node
from graft.compiler.passing import Contract, Pass, View, approximate
from graft.compiler.trunk import Trunk, between
from graft.passes.early_exit import check_exit
from graft.passes.skip_decode import skip_blocks


@dataclass(frozen=True)
class ConfidenceExit(Pass):
    """An early exit by confidence (CALM's softmax criterion, 2207.07061, at one layer): where the final norm and the
    unembedding, put behind the first `layer` layers, give a token at least the probability `threshold`, the row goes
    past the layers that are left, and its logits are those. Every row decides for itself.

    Keys and values of the layers gone past are projected from the stream at the exit, so that later tokens find them;
    the rest of a layer reads no weights where every row is past it. The test itself reads the unembedding, which is
    worth it only where what follows is much larger.
    """

    layer: int
    """How many layers always run."""
    threshold: float

    contract: ClassVar[Contract] = approximate
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "cache-free"})

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise PlanError(
                "the threshold of confidence-exit is out of range",
                expected="a probability above 0",
                found=self.threshold,
                where="ConfidenceExit.threshold",
            )

    def run(self, view: View) -> None:
        trunk = view.trunk
        check_exit(trunk, self.layer, view.by)
        later = trunk.layers[self.layer :]
        logits = early_logits(trunk, later[0][0].stream, view.by).apply(aten._to_copy.default, dtype=torch.float32)
        total = (logits - logits.apply(aten.amax.default, [-1], True)).apply(aten.exp.default)
        total = total.apply(aten.sum.dim_IntList, [-1], True)
        sure = total.apply(aten.reciprocal.default).apply(aten.ge.Scalar, self.threshold)
        for blocks in later:
            skip_blocks(blocks, sure)
            view.match()


def early_logits(trunk: Trunk, stream: fx.Node, by: str) -> Value:
    """The final norm and the unembedding of the stream as it is there."""
    known = {trunk.exit: stream}
    behind = stream
    for node in [*between(trunk.exit, trunk.hidden), trunk.unembedding]:
        with node.graph.inserting_after(behind):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: known.get(source, source))
            known[node] = behind = new_node(node.graph, node.target, args, kwargs, like=node, by=by)
    return Value(behind, by)
