"""The layout of a KV state that is not one dense tensor: a dense tail, and far tokens in pages in front of it.

Tokens in front of a sequence's *cut* are far: they are read from pages, as a codec left them there and as far as
eviction kept them; those from the cut on are the tail. The cut moves at fixed positions of a text alone (`trigger`), so
what a row reads is a function of its place in the text, and a draft tree ends where the cut moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graft.compiler.errors import PlanError
from graft.compiler.kv.codecs import IN_PLACE, PAGE, Codec
from graft.compiler.kv.eviction import Eviction
from graft.compiler.kv.selection import Selection


@dataclass(frozen=True)
class Pages:
    """What happens to tokens that are far, and when they are."""

    codec: Codec = IN_PLACE
    eviction: Eviction | None = None
    selection: Selection | None = None
    recent: int = 64
    """Tokens in front of a trigger that stay in the tail."""
    every: int = 64
    """Tokens from trigger to trigger: no fewer than the largest tree has rows, so that trees have room."""
    prompt: Literal["streamed", "dense"] = "streamed"
    """Whether triggers come in the prompt, too, or first at its end: then a prompt attends to all of itself."""

    def __post_init__(self) -> None:
        if self.every < 2 or self.every % PAGE or self.recent < 0:
            raise PlanError(
                "pages have triggers that there are not",
                expected=f"every a multiple of {PAGE}, recent of 0 or more",
                found=f"every {self.every}, recent {self.recent}",
            )
        if self.codec.in_place and self.eviction is not None:
            raise PlanError(
                "what stays in place cannot be evicted",
                found=f"{type(self.codec).__name__} with {type(self.eviction).__name__}",
                remedy="codec=DensePages(), or one that makes pages smaller",
            )
        if self.eviction is not None and self.eviction.heads == "adaptive" and not self.codec.exact:
            raise PlanError(
                "heads that keep different numbers of tokens need pages that entries can be moved between",
                expected="codec=DensePages(), or heads=same",
                found=f"{type(self.codec).__name__} with heads=adaptive",
            )
        if self.codec.in_place and self.selection is None:
            raise PlanError(
                "pages without a codec, eviction or selection change nothing",
                expected="one of the three",
                found="none",
            )
        if self.eviction is not None and self.eviction.once and self.prompt == "streamed":
            raise PlanError(
                f"{type(self.eviction).__name__} looks at a whole prompt, once",
                expected='prompt="dense"',
                found='prompt="streamed"',
            )

    @property
    def reads_queries(self) -> bool:
        """Whether the cache keeps the queries of tokens beside their keys."""
        return self.codec.reads_queries or (self.eviction is not None and self.eviction.reads_queries)

    def trigger(self, length: int, prompt: int) -> int:
        """The first position behind `length` tokens at which the cut moves, of a text whose prompt has `prompt`."""
        if self.prompt == "dense" and length < prompt:
            return prompt
        return (length // self.every + 1) * self.every

    def cut(self, position: int) -> int:
        """Where the cut is put at a trigger: a multiple of 64."""
        return max(0, (position - self.recent) // PAGE * PAGE)
