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

from collections.abc import Sequence
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
from graft.passes.exit_classifier import classified
from graft.passes.skip_decode import skip_blocks


@dataclass(frozen=True)
class ConfidenceExit(Pass):
    """An early exit by confidence (CALM's softmax criterion, 2207.07061, at one layer): where the final norm and the
    unembedding, put behind the first `layer` layers, give a token at least the probability `threshold`, the row goes
    past the layers that are left, and its logits are those. Every row decides for itself.

    Keys and values of the layers gone past are projected from the stream at the exit, so that later tokens find them;
    the rest of a layer reads no weights where every row is past it. The test itself reads the unembedding, which is
    worth it only where what follows is much larger; with a trained classifier (CALM's third criterion) it reads a line
    of weights.
    """

    layer: int
    """How many layers always run."""
    threshold: float
    classifier: str = ""
    """A folder of `train-heads --kind exit-classifier`, whose probability counts in the place of the token's: a line
    over the norm is all that it reads."""

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
        stream, norm = later[0][0].stream, between(trunk.exit, trunk.hidden)
        if self.classifier:
            hidden = early(trunk, stream, norm, view.by)
            share = classified(view, hidden, self.classifier, self.layer)
        else:
            logits = early(trunk, stream, [*norm, trunk.unembedding], view.by)
            share = best_share(logits.apply(aten._to_copy.default, dtype=torch.float32))
        sure = share.apply(aten.ge.Scalar, self.threshold)
        for blocks in later:
            skip_blocks(blocks, sure)
            view.match()


def best_share(logits: Value) -> Value:
    """The probability of the best token of each row."""
    total = (logits - logits.apply(aten.amax.default, [-1], True)).apply(aten.exp.default)
    return total.apply(aten.sum.dim_IntList, [-1], True).apply(aten.reciprocal.default)


def early(trunk: Trunk, stream: fx.Node, nodes: Sequence[fx.Node], by: str) -> Value:
    """What the nodes behind the trunk's exit make of the stream as it is earlier."""
    known, behind = {trunk.exit: stream}, stream
    for node in nodes:
        with node.graph.inserting_after(behind):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: known.get(source, source))
            known[node] = behind = new_node(node.graph, node.target, args, kwargs, like=node, by=by)
    return Value(behind, by)
