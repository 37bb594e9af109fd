"""End the model after some of its layers: the final norm and the unembedding read the stream there.

before:
    h1 = add(h0, attention(norm(h0)))
    h2 = add(h1, feed_forward(norm(h1)))
    h3 = add(h2, attention(norm(h2)))
    h4 = add(h3, feed_forward(norm(h3)))
after (early-exit{layer=1}):
    h1 = add(h0, attention(norm(h0)))
    h2 = add(h1, feed_forward(norm(h1)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graft.compiler.errors import PassError
from graft.compiler.passing import Contract, Pass, View, approximate
from graft.compiler.trunk import Trunk


@dataclass(frozen=True)
class EarlyExit(Pass):
    """Run the first layers alone (LayerSkip, 2404.16710, without its training). The others keep no KV."""

    layer: int
    """How many layers run: those numbered 0 to layer - 1."""

    contract: ClassVar[Contract] = approximate
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "cache-free"})

    def run(self, view: View) -> None:
        for function in view.functions:
            trunk = view.trunk
            check_exit(trunk, self.layer, view.by)
            for block in reversed([block for layer in trunk.layers[self.layer :] for block in layer]):
                block.drop()
                view.match()
            function.graph.eliminate_dead_code()


def check_exit(trunk: Trunk, layer: int, by: str) -> None:
    """Raise PassError unless there are layers in front of the exit and behind it."""
    count = len(trunk.layers)
    if not 0 < layer < count:
        raise PassError(
            f"{by} cannot exit there",
            expected=f"1 to {count - 1} layers in front of the exit: the model has {count}",
            found=layer,
            where="layer",
        )
