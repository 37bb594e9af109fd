"""What draft heads with a KV of their own keep of a text: rows over its hidden states, each with the token behind it.

Shared by Hydra++, whose prefix layer reads the final hidden states, by Clover-2's augmenting block and by EAGLE-3, both
of which read streams inside the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from graft.compiler.drafting import Candidates, Context, Outcome
from graft.compiler.shapes import attribute
from graft.runtime.decoder import Decoder, Rows

PROMPT_ROWS = 512
"""Hidden states in one call at most."""


class DraftTokens:
    """What the logits of heads say, in the target's tokens."""

    def __init__(self, decoder: Decoder, count: int, vocabulary: int) -> None:
        """`decoder` runs one of the functions, `count` tokens are named at most, `vocabulary` is the target's."""
        self.decoder, self.count = decoder, count
        weights, chosen = decoder.function.weights, decoder.function.draft_vocabulary
        self.ids = attribute(weights, chosen).cpu().numpy() if chosen else np.arange(vocabulary)
        """int64 [v]: the target's token for each draft id."""

    def best(self, logits: Tensor) -> list[Candidates]:
        """The best tokens of each row of [rows, v], with their probabilities."""
        chosen, shares = self.decoder.best(logits, self.count)
        ids = self.ids[chosen].tolist()
        return [list(zip(row, share, strict=True)) for row, share in zip(ids, shares.tolist(), strict=True)]


def read_width(decoder: Decoder) -> int:
    """How many of a row of the target's hidden states a function reads: the first ones, behind which later passes may
    have put others (passes/heads/taps.py)."""
    return int(decoder.function.row_inputs[0].sizes[1])


@dataclass
class HeldText:
    """Of one request."""

    slot: int
    waiting: list[Tensor] = field(default_factory=list)
    """Hidden states [tokens, width] that have not been read."""
    last: tuple[Tensor, Tensor] | None = None
    """[1, v] and [1, width]: logits and result of the row with the last token of the text."""

    @property
    def logits(self) -> Tensor:
        """What follows the text."""
        assert self.last is not None
        return self.last[0]

    @property
    def hidden(self) -> Tensor:
        """What the function made of the text."""
        assert self.last is not None
        return self.last[1]


class TextRows:
    """Runs a function over the hidden states of committed text, in slots of its own.

    The hidden state at a position is run with the token that follows it, so a text of L tokens has L - 1 rows.
    """

    def __init__(self, decoder: Decoder, key: str) -> None:
        """`key` is that of the requests' state."""
        self.decoder, self.key, self.width = decoder, key, read_width(decoder)
        decoder.keeps_hidden = True

    def begin(self, context: Context, prompt_hidden: Tensor | None) -> None:
        """A request whose prompt has these hidden states [prompt tokens, width or more] starts."""
        assert prompt_hidden is not None
        context.data[self.key] = HeldText(self.decoder.open(), [prompt_hidden[:, : self.width]])

    def observe(self, context: Context, outcome: Outcome) -> None:
        """Note the hidden states of what was accepted."""
        assert outcome.hidden is not None
        held = self.held(context)
        known = self.decoder.length(held.slot) + sum(map(len, held.waiting))
        lacking = len(context.tokens) - 1 - known  # none at first: the prompt's were given to begin
        if lacking:
            rows = outcome.hidden[[0, *(1 + node for node in outcome.path)][-lacking:]]
            held.waiting.append(rows[:, : self.width])

    def end(self, context: Context) -> None:
        """Give the slot back."""
        held = context.data.pop(self.key, None)
        if isinstance(held, HeldText):
            self.decoder.close(held.slot)

    def held(self, context: Context) -> HeldText:
        """The request's state."""
        held = context.data[self.key]
        assert isinstance(held, HeldText)
        return held

    def run(self, contexts: Sequence[Context]) -> list[HeldText]:
        """Run the hidden states that wait, `PROMPT_ROWS` at a time, and commit them; the state of each request."""
        texts = [self.held(context) for context in contexts]
        while True:
            rows, hidden, chunks = Rows(), list[Tensor](), list[tuple[HeldText, int]]()
            for context, one in zip(contexts, texts, strict=True):
                fed, left = self.decoder.length(one.slot), PROMPT_ROWS - len(rows)
                chunk = context.tokens[fed + 1 : fed + 1 + left]
                if chunk:
                    rows.add_chain(one.slot, chunk, fed)
                    waiting = torch.cat(one.waiting)
                    hidden.append(waiting[: len(chunk)])
                    one.waiting = [waiting[len(chunk) :]]
                    chunks.append((one, len(chunk)))
            if not chunks:
                return texts
            self.run_chunks(rows, torch.cat(hidden), chunks)

    def run_chunks(self, rows: Rows, hidden: Tensor, chunks: Sequence[tuple[HeldText, int]]) -> None:
        """Run and commit some rows of each request; keep what comes of the last one."""
        logits, end = self.decoder.forward(rows, hidden), 0
        result = self.decoder.hidden
        assert result is not None
        for place, (one, count) in enumerate(chunks):
            self.decoder.commit(one.slot, range(count))
            end += count
            one.last = logits[place : place + 1], result[end - 1 : end]
