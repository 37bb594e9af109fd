"""Skip a token's feed-forwards behind one that hardly changed it.

before:
    h1 = add(h0, feed_forward(norm(h0)))
    h2 = add(h1, feed_forward(norm(h1)))
    h3 = add(h2, feed_forward(norm(h2)))
after (skip-ffn{similarity=0.9,skip=1,cold_first=0,cold_last=0,warmup=4}):
    h1 = add(h0, feed_forward(norm(h0)))
    early = lt(unsqueeze(positions, -1), 4)
    left_1 = masked_fill(mul(_to_copy(ge(cosine(h0, h1), 0.9), dtype=float32), 1), early, 0.0)
    skip_1 = gt(left_1, 0.0)
    h2 = add(h1, masked_fill(feed_forward(norm(h1)), skip_1, 0.0))
    fresh = masked_fill(mul(_to_copy(ge(cosine(h1, h2), 0.9), dtype=float32), 1), skip_1, 0.0)
    left_2 = masked_fill(add(fresh, relu(sub(left_1, 1.0))), early, 0.0)
    skip_2 = gt(left_2, 0.0)
    h3 = add(h2, masked_fill(feed_forward(norm(h2)), skip_2, 0.0))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graft.compiler.canonical import aten
from graft.compiler.errors import PassError, PlanError
from graft.compiler.nodes import Value
from graft.compiler.passing import Contract, Pass, View, approximate
from graft.compiler.trunk import Block


@dataclass(frozen=True)
class SkipFFN(Pass):
    """FFN-SkipLLM (2404.03865): where the stream before and behind a token's feed-forward is alike (their cosine is
    `similarity` or more), the token skips its next `skip` feed-forwards; attention always runs, so the KV cache is
    whole. The paper's constants are not published, so all of them are the user's, and two choices are ours: the paper
    skips while it decodes, here a token's place in the text alone decides (positions below `warmup` never skip), so
    that prefilled, decoded and drafted tokens are treated alike; and every token decides for itself. A feed-forward
    that every row of a call skips reads no weights.
    """

    similarity: float
    skip: int = 1
    """How many feed-forwards are skipped; the number of layers or more: all up to the last cold ones."""
    cold_first: int = 1
    """So many feed-forwards at the beginning never skip, and are not asked."""
    cold_last: int = 1
    warmup: int = 4

    contract: ClassVar[Contract] = approximate
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "cache-free"})

    def __post_init__(self) -> None:
        if self.skip < 1 or min(self.cold_first, self.cold_last, self.warmup) < 0:
            raise PlanError(
                "the options of skip-ffn are out of range",
                expected="skip of 1 or more, cold_first, cold_last and warmup of 0 or more",
                found=self,
                where="SkipFFN",
            )

    def run(self, view: View) -> None:
        for function in view.functions:
            blocks = view.trunk.feed_forward
            hot = blocks[self.cold_first : len(blocks) - self.cold_last]
            if len(hot) < 2:
                raise PassError(
                    "skip-ffn has no feed-forward that could be skipped",
                    expected=f"at least 2 that are not cold, of {len(blocks)}",
                    found=f"{self.cold_first} cold at the beginning, {self.cold_last} at the end",
                    where=f"function {function.name}",
                )
            position = Value(function.placeholder("positions"), view.by).apply(aten.unsqueeze.default, -1)
            early = position.apply(aten.lt.Scalar, self.warmup)
            left = self.saturated(hot[0]).apply(aten.masked_fill.Scalar, early, 0.0)
            for block in hot[1:]:
                skip = left.apply(aten.gt.Scalar, 0.0)
                block.output = block.output.apply(aten.masked_fill.Scalar, skip, 0.0)
                view.match()
                if block is not hot[-1]:
                    fresh = self.saturated(block).apply(aten.masked_fill.Scalar, skip, 0.0)
                    left = fresh + (left - 1.0).apply(aten.relu.default)
                    left = left.apply(aten.masked_fill.Scalar, early, 0.0)

    def saturated(self, block: Block) -> Value:
        """`skip` where the block hardly changed the stream, else 0: float32 [batch, length, 1]."""
        alike = cosine(Value(block.stream, block.by), Value(block.residual, block.by))
        enough = alike.apply(aten.ge.Scalar, self.similarity)
        return enough.apply(aten._to_copy.default, dtype=torch.float32) * self.skip


def cosine(x: Value, y: Value) -> Value:
    """The cosine of two vectors [..., width], in float32: [..., 1]."""
    x, y = (value.apply(aten._to_copy.default, dtype=torch.float32) for value in (x, y))
    dot, one, other = ((a * b).apply(aten.sum.dim_IntList, [-1], True) for a, b in ((x, y), (x, x), (y, y)))
    return dot / (one.apply(aten.sqrt.default) * other.apply(aten.sqrt.default))
