"""Five digits in a long text, asked for at its end: raw prompts, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """One prompt, as token ids."""

    key: str
    depth: float
    """Where the key stands: 0 at the start of the text, 1 at its end."""
    context: tuple[int, ...]
    """Filler with the key in it."""
    question: tuple[int, ...]
    answer: tuple[int, ...]
    """What a model that has the key says next."""


def passkeys(texts: Sequence[Sequence[int]], tokenizer: Any, length: int, count: int, seed: int = 0) -> list[Passkey]:
    """`count` prompts of `length` tokens of context each, keys at evenly spaced depths; the texts are the filler, in
    turn."""
    generator, found = np.random.default_rng(seed), list[Passkey]()
    for number in range(count):
        key = str(generator.integers(10_000, 100_000))
        needle, question = ids(tokenizer, NEEDLE.format(key=key)), ids(tokenizer, QUESTION)
        whole = ids(tokenizer, f"{QUESTION} {key}")
        shared = next((at for at, pair in enumerate(zip(question, whole, strict=False)) if pair[0] != pair[1]), None)
        asked = len(question) if shared is None else shared
        depth = (number + 0.5) / count
        filler = list(texts[number % len(texts)][: length - len(needle)])
        at = round(depth * len(filler))
        context = (*filler[:at], *needle, *filler[at:])
        found.append(Passkey(key, depth, context, tuple(whole[:asked]), tuple(whole[asked:])))
    return found


def ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids, without what a text starts with."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
