"""Drop attention or feed-forward blocks by index: the smallest approximate pass.

before:
    h1 = add(h0, attention(norm(h0)))
    h2 = add(h1, feed_forward(norm(h1)))
after (drop-block{kind=feed-forward,index=0}):
    h1 = add(h0, attention(norm(h0)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from graft.compiler.errors import PassError
from graft.compiler.passing import Contract, Pass, View, approximate


@dataclass(frozen=True)
class DropBlock(Pass):
    """Take blocks out of the residual stream. Dropped weights are not read, a dropped attention keeps no KV."""

    index: tuple[int, ...] = ()
    """Which blocks of the kind, counted from 0; negative counts from the end."""
    kind: Literal["attention", "feed-forward"] = "feed-forward"

    contract: ClassVar[Contract] = approximate
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "cache-free"})

    def run(self, view: View) -> None:
        for function in view.functions:
            blocks = view.trunk.of_kind(self.kind)
            wrong = [index for index in self.index if not -len(blocks) <= index < len(blocks)]
            if wrong:
                raise PassError(
                    f"{view.by}: no such {self.kind} block",
                    expected=f"an index from {-len(blocks)} to {len(blocks) - 1}",
                    found=wrong,
                    where=f"function {function.name}",
                )
            for index in sorted({index % len(blocks) for index in self.index}, reverse=True):
                view.trunk.of_kind(self.kind)[index].drop()
                function.graph.eliminate_dead_code()
                view.match()
        if not self.index:
            view.miss("index", "no block is named")
