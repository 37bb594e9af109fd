"""Random numbers that depend on their place alone: a function of (seed, stream, counter), in any order of asking.

A token's randomness is keyed by its position in the text, so neither the shape of the draft tree, nor how many tokens
a step happened to accept, nor the other requests of a batch can change what a seeded request samples.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from graft.compiler.errors import GenerationError

STREAMS: Final = {
    "draft": 0, "accept": 1, "resample": 2, "sample": 3, "accept siblings": 4, "draft siblings": 5, "beam": 6
}  # fmt: skip
"""Streams never overlap: what a drafter draws must be independent of what decides about it."""

RANKS: Final = 64
"""Siblings of one node that have random numbers of their own."""

_NODES: Final = 4096

_BLOCK: Final = 64
_WORDS_PER_COUNT: Final = 4  # one step of Philox4x64's counter gives four words
_MANTISSA: Final = 2.0**-53


class Streams:
    """The `Uniforms` of one request: Philox4x64-10 (Salmon et al., SC 2011) keyed by (seed, stream).

    The latest block of 64 numbers of each stream is kept, so that neighbouring positions cost a list look-up.
    """

    def __init__(self, seed: int) -> None:
        """`seed` is any int in [0, 2**64); raises GenerationError otherwise."""
        if not 0 <= seed < 2**64:
            raise GenerationError(
                "The seed is out of range.", expected="an int in [0, 2**64)", found=seed, where="generate(seed=...)"
            )
        self.seed = seed
        self._blocks: dict[str, tuple[int, list[float]]] = {}

    def uniform(self, stream: str, counter: int) -> float:
        """A float64 in [0, 1); `counter` is in [0, 2**63). Raises GenerationError for an unknown stream."""
        block, offset = divmod(counter, _BLOCK)
        held = self._blocks.get(stream)
        if held is None or held[0] != block:
            held = self._blocks[stream] = (block, self._draw(stream, block))
        return held[1][offset]

    def _draw(self, stream: str, block: int) -> list[float]:
        if stream not in STREAMS or block < 0:
            raise GenerationError(
                "No such random number.",
                expected=f"a stream of {', '.join(STREAMS)} and a counter that is not negative",
                found=f"stream {stream!r}, block {block}",
            )
        key = np.array([self.seed, STREAMS[stream]], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=block * (_BLOCK // _WORDS_PER_COUNT)).random_raw(_BLOCK)
        return ((words >> np.uint64(11)) * _MANTISSA).tolist()


def sibling(position: int, rank: int) -> int:
    """Counter of the number that decides about the sibling of that rank, for a token at `position` of the text."""
    return position * RANKS + rank


def drawn_node(root: int, node: int, rank: int) -> int:
    """Counter of a number that the child of that rank of tree node `node` is drawn by.

    `root` is the length of the text that the tree was drafted for, not the child's own position: which siblings a tree
    has may depend on what was drawn deeper, so a number that was drawn by once must not be used for the same position
    again when a later step drafts it anew.
    """
    return (root * _NODES + node + 1) * RANKS + rank


def row_seeds(seed: int, rows: int) -> list[int]:
    """Seeds for the rows of a batch. Row 0 uses `seed` itself, so that a request alone and first in a batch agree."""
    children = (np.random.SeedSequence(seed, spawn_key=(row,)) for row in range(1, rows))
    return [seed, *(int(child.generate_state(1, np.uint64)[0]) for child in children)][:rows]
