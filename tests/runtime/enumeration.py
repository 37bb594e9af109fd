"""The exact law of a random procedure, by running it on every combination of its random numbers that matters.

Probabilities here are multiples of 1/D. A verifier looks at a uniform number only by comparing it with fractions whose
denominators are at most D, so it is constant between two neighbouring ones: running it once in each gap, weighted with
the gap's exact length, leaves nothing to chance.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import TypeVar

import numpy as np

from graft.compiler.drafting import ROOT, DraftTree, Uniforms, Verifier
from graft.runtime.verifiers import draw

Result = TypeVar("Result", bound=Hashable)
Text = tuple[int, ...]


def gaps(denominator: int) -> list[tuple[float, Fraction]]:
    """(a number inside, length) of every gap between neighbouring fractions of denominators up to this one."""
    cuts = sorted({Fraction(a, b) for b in range(1, denominator + 1) for a in range(b + 1)})
    return [(float((low + high) / 2), high - low) for low, high in pairwise(cuts)]


class Scripted:
    """`Uniforms` that take the gap a script says, by (stream, counter), and the first one beyond the script's end.

    Numbers for places from `horizon` on are all one: they must not matter for what stands before, whatever they are.
    """

    def __init__(
        self, script: list[int], cells: list[tuple[float, Fraction]], horizon: int, streams_apart: bool = True
    ) -> None:
        self.script, self.cells, self.horizon, self.streams_apart = script, cells, horizon, streams_apart
        self.taken: dict[tuple[str, int], int] = {}

    def uniform(self, stream: str, counter: int) -> float:
        if counter >= self.horizon:
            return 0.3
        key = (stream if self.streams_apart else "one", counter)
        if key not in self.taken:
            if len(self.taken) == len(self.script):
                self.script.append(0)
            self.taken[key] = self.script[len(self.taken)]
        return self.cells[self.taken[key]][0]

    @property
    def weight(self) -> Fraction:
        weight = Fraction(1)
        for cell in self.taken.values():
            weight *= self.cells[cell][1]
        return weight


def law(
    run: Callable[[Uniforms], Result], denominator: int, *, horizon: int = 10**9, streams_apart: bool = True
) -> dict[Result, Fraction]:
    """The distribution of what `run` returns; `streams_apart=False` plants the bug that all streams are one."""
    cells = gaps(denominator)
    found: dict[Result, Fraction] = {}
    script: list[int] = []
    while True:
        uniforms = Scripted(script, cells, horizon, streams_apart)
        result = run(uniforms)
        found[result] = found.get(result, Fraction(0)) + uniforms.weight
        del script[len(uniforms.taken) :]
        while script and script[-1] == len(cells) - 1:
            script.pop()
        if not script:
            return found
        script[-1] += 1


class Model:
    """A language model of `vocabulary` tokens: for every text a distribution in multiples of 1/denominator."""

    def __init__(self, seed: int, vocabulary: int, denominator: int) -> None:
        self.seed, self.vocabulary, self.denominator = seed, vocabulary, denominator
        self.known: dict[Text, list[int]] = {}

    def counts(self, text: Text) -> list[int]:
        """The probabilities after a text, times the denominator; some are 0."""
        if text not in self.known:
            generator = np.random.default_rng([self.seed, len(text), *text])
            shares = generator.dirichlet([1.0] * self.vocabulary)
            self.known[text] = generator.multinomial(self.denominator, shares).tolist()
        return self.known[text]

    def next(self, text: Text) -> np.ndarray:
        """float64 [vocabulary]."""
        return np.array(self.counts(text)) / self.denominator

    def law(self, length: int) -> dict[Text, Fraction]:
        """The distribution of the first `length` tokens."""
        found: dict[Text, Fraction] = {(): Fraction(1)}
        for _ in range(length):
            found = {
                (*text, token): weight * Fraction(count, self.denominator)
                for text, weight in found.items()
                for token, count in enumerate(self.counts(text))
                if count
            }
        return found


class ModelRows:
    """`Rows` of a model after a text; a row's array is made once, as a real step's logits are."""

    def __init__(self, model: Model, text: Text, tree: DraftTree) -> None:
        self.model, self.text, self.tree = model, text, tree
        self.known: dict[int, np.ndarray] = {}

    def distribution(self, row: int) -> np.ndarray:
        if row not in self.known:
            path = tuple(self.tree.tokens[node] for node in self.tree.path(row - 1))
            self.known[row] = self.model.next(self.text + path)
        return self.known[row]

    def argmax(self, row: int) -> int:
        return int(self.distribution(row).argmax())


Draft = Callable[[Text, Uniforms], DraftTree]


def generated(verifier: Verifier, draft: Draft, model: Model, length: int, uniforms: Uniforms) -> Text:
    """The first `length` tokens of speculative decoding."""
    text: Text = ()
    while len(text) < length:
        tree = draft(text, uniforms)
        path, token = verifier.verify(tree, ModelRows(model, text, tree), uniforms, len(text))
        assert tree.path(path[-1] if path else ROOT) == path
        text = (*text, *(tree.tokens[node] for node in path), token)
    return text[:length]


def chain_draft(q: Model, depth: int, *, handed: Callable[[np.ndarray], np.ndarray] | None = None,
                argmax: bool = False) -> Draft:  # fmt: skip
    """Independent samples from q in a chain. `handed` and `argmax` plant bugs: a q other than what was drawn from, and
    drafting q's best token while handing over all of q."""

    def draft(text: Text, uniforms: Uniforms) -> DraftTree:
        tree = DraftTree(kind="independent")
        node = ROOT
        for place in range(depth):
            distribution = q.next(text + tuple(tree.tokens))
            uniform = 0.0 if argmax else uniforms.uniform("draft", len(text) + place)
            token = int(distribution.argmax()) if argmax else draw(distribution, uniform)
            tree.q[node] = distribution if handed is None else handed(distribution)
            node = tree.add(token, node, float(distribution[token]))
        return tree

    return draft


def tree_draft(q: Model, widths: Sequence[int], kind: str) -> Draft:
    """A full tree with widths[d] children at depth d: the best tokens of q, samples, or samples without replacement."""

    def draft(text: Text, uniforms: Uniforms) -> DraftTree:
        tree = DraftTree(kind=kind)  # type: ignore[arg-type]
        level: list[tuple[int, Text]] = [(ROOT, ())]
        for width in widths:
            below = []
            for node, path in level:
                left = tree.q[node] = q.next(text + path)
                for rank in range(width):
                    if not left.any():
                        break
                    if kind == "deterministic":
                        token = int(np.argsort(-left, kind="stable")[rank])
                    else:
                        # A place's numbers in the draft are the stream's, those of siblings and cousins apart.
                        token = draw(left, uniforms.uniform(f"draft {rank} {path}", len(text) + len(path)))
                    if kind == "without-replacement":
                        left = left.copy()
                        left[token] = 0.0
                    below.append((tree.add(token, node, 0.5), (*path, token)))
            level = below
        return tree

    return draft
