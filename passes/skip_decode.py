"""Run fewer layers the further a token stands in the text.

before:
    h1 = add(h0, feed_forward(norm(h0)))
    h2 = add(h1, feed_forward(norm(h1)))
    h3 = add(h2, feed_forward(norm(h2)))
after (skip-decode{fewest=2,most=3,length=10,first=1}):
    h1 = add(h0, feed_forward(norm(h0)))
    far = ge(unsqueeze(positions, -1), 5)
    h2 = add(h1, masked_fill(feed_forward(norm(h1)), far, 0.0))
    h3 = add(h2, feed_forward(norm(h2)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graft.compiler.canonical import aten
from graft.compiler.errors import PassError, PlanError
from graft.compiler.nodes import Value
from graft.compiler.passing import Contract, Pass, View, approximate
from graft.compiler.trunk import Block


@dataclass(frozen=True)
class SkipDecode(Pass):
    """SkipDecode's schedule (2307.02628): of all layers `most` run at the beginning of the text and, falling evenly,
    `fewest` from position `length` on: the `first` ones, and the last. A layer once skipped is skipped from there on,
    so no later token misses a key. The paper counts generated tokens, and trains for it; here a token's position
    decides, so that prefilled, decoded and drafted tokens are treated alike. Keys and values of a skipped layer are
    projected from the stream that goes past it; its attention and feed-forward read no weights where every row skips
    them.
    """

    fewest: int
    most: int | None = None
    """None: all layers."""
    length: int = 1024
    first: int = 1
    """Layers at the beginning that always run."""

    contract: ClassVar[Contract] = approximate
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "cache-free"})

    def __post_init__(self) -> None:
        if self.fewest < 1 or not 0 <= self.first <= self.fewest or self.length < 1:
            raise PlanError(
                "the options of skip-decode are out of range",
                expected="fewest of 1 or more, first of 0 to fewest, length of 1 or more",
                found=self,
                where="SkipDecode",
            )

    def run(self, view: View) -> None:
        for function in view.functions:
            layers = view.trunk.layers
            most = len(layers) if self.most is None else self.most
            if not self.fewest <= most <= len(layers):
                raise PassError(
                    "skip-decode cannot run so many layers",
                    expected=f"fewest <= most <= {len(layers)}, the model's layers",
                    found=f"fewest {self.fewest}, most {most}",
                    where=f"function {function.name}",
                )
            position = Value(function.placeholder("positions"), view.by).apply(aten.unsqueeze.default, -1)
            for number, blocks in enumerate(layers):
                start = self.skipped_from(number, len(layers), most)
                if start is not None:
                    skip_blocks(blocks, position.apply(aten.ge.Scalar, start))
                    view.match()

    def skipped_from(self, layer: int, layers: int, most: int) -> int | None:
        """The first position at which the layer does not run; None where it always does."""
        if layer < self.first:
            return None
        depths = (round(most - (most - self.fewest) * at / self.length) for at in range(self.length + 1))
        return next((at for at, depth in enumerate(depths) if layer < layers - (depth - self.first)), None)


def skip_blocks(blocks: list[Block], mask: Value) -> None:
    """Let rows whose mask [..., 1] holds go past the blocks."""
    for block in blocks:
        for part in block.parts or [block]:
            part.output = part.output.apply(aten.masked_fill.Scalar, mask, 0.0)
