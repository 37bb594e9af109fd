"""The law of the output, computed exactly: every legal pair keeps the target's law, and every planted bug shows."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

from graft.compiler.drafting import DraftTree, Rows, Uniforms, Verifier
from graft.runtime.verifiers import Leviathan, SampleAndMatch, draw
from tests.runtime.enumeration import Draft, Model, ModelRows, Text, chain_draft, generated, law, tree_draft

PAIRS = 12
"""Random (target, draft) pairs; some bugs hardly show on one pair."""


def output_law(
    verifier: Verifier, draft: Draft, target: Model, length: int, streams_apart: bool = True
) -> dict[Text, Fraction]:
    def run(uniforms: Uniforms) -> Text:
        return generated(verifier, draft, target, length, uniforms)

    return law(run, target.denominator, horizon=length, streams_apart=streams_apart)


def distance(left: dict[Text, Fraction], right: dict[Text, Fraction]) -> Fraction:
    """Total variation."""
    return sum((abs(left.get(key, Fraction(0)) - right.get(key, Fraction(0))) for key in left | right), Fraction(0)) / 2


def models(pair: int, vocabulary: int = 3, denominator: int = 4) -> tuple[Model, Model]:
    return Model(2 * pair, vocabulary, denominator), Model(2 * pair + 1, vocabulary, denominator)


@pytest.mark.parametrize("pair", range(PAIRS))
def test_leviathan_keeps_the_law_of_one_token(pair: int) -> None:
    target, draft = models(pair)
    assert output_law(Leviathan(), chain_draft(draft, 1), target, 1) == target.law(1)


@pytest.mark.parametrize("pair", range(4))
@pytest.mark.parametrize("depth", [1, 2])
def test_leviathan_on_a_chain_of_samples_keeps_the_law_of_the_text(pair: int, depth: int) -> None:
    target, draft = models(pair, denominator=3)
    assert output_law(Leviathan(), chain_draft(draft, depth), target, 2) == target.law(2)


def test_leviathan_keeps_the_law_of_three_tokens() -> None:
    target, draft = Model(4, 3, 2), Model(5, 3, 2)
    assert output_law(Leviathan(), chain_draft(draft, 3), target, 3) == target.law(3)


@pytest.mark.parametrize("pair", range(3))
def test_leviathan_keeps_the_law_on_a_larger_vocabulary(pair: int) -> None:
    target, draft = models(pair, vocabulary=5, denominator=8)
    assert output_law(Leviathan(), chain_draft(draft, 1), target, 1) == target.law(1)


@pytest.mark.parametrize("kind", ["deterministic", "independent", "without-replacement"])
@pytest.mark.parametrize("widths", [(2,), (1, 1)])
def test_sample_and_match_keeps_the_law_of_the_text_for_every_kind_of_draft(kind: str, widths: tuple[int, ...]) -> None:
    for pair in range(2):
        target, draft = models(pair, denominator=3)
        assert output_law(SampleAndMatch(), tree_draft(draft, widths, kind), target, 2) == target.law(2)


def test_sample_and_match_keeps_the_law_of_three_tokens_when_the_tree_changes_from_step_to_step() -> None:
    target, q = models(5, vocabulary=4, denominator=6)

    def draft(text: Text, uniforms: Uniforms) -> DraftTree:
        widths: list[tuple[int, ...]] = [(3,), (1, 2), ()]
        return tree_draft(q, widths[(sum(text) + len(text)) % 3], "deterministic")(text, uniforms)

    assert output_law(SampleAndMatch(), draft, target, 3) == target.law(3)


def test_what_is_known_of_an_argmax_draft_with_the_whole_q_is_reproduced() -> None:
    """transformers 5.23 does this in one of its candidate generators: p = [.5, .3, .2] came out as [.83, 0, .17]."""
    target, q = Model(0, 3, 10), Model(0, 3, 10)
    target.known[()], q.known[()] = [5, 3, 2], [6, 3, 1]
    found = output_law(Leviathan(), chain_draft(q, 1, argmax=True), target, 1)
    assert found == {(0,): Fraction(5, 6), (2,): Fraction(1, 6)}


@dataclass(frozen=True)
class NotRenormalised(Leviathan):
    """Draws from the residual as if it summed to 1."""

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        for node, token in enumerate(tree.tokens):
            p, q = rows.distribution(node), tree.q[node - 1]
            if uniforms.uniform("accept", position + node) * q[token] >= p[token]:
                cumulative = np.cumsum(np.maximum(p - q, 0.0))
                place = int(np.searchsorted(cumulative, uniforms.uniform("resample", position + node), side="right"))
                return list(range(node)), min(place, len(p) - 1)
        last = rows.distribution(len(tree))
        return list(range(len(tree))), draw(last, uniforms.uniform("sample", position + len(tree)))


@dataclass(frozen=True)
class EditsInPlace(Leviathan):
    """Zeroes the rejected token in the target's probabilities and draws from what is left."""

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        for node, token in enumerate(tree.tokens):
            p = rows.distribution(node)
            if uniforms.uniform("accept", position + node) * tree.q[node - 1][token] >= p[token]:
                p[token] = 0.0
                return list(range(node)), draw(p, uniforms.uniform("resample", position + node))
        last = rows.distribution(len(tree))
        return list(range(len(tree))), draw(last, uniforms.uniform("sample", position + len(tree)))


@dataclass(frozen=True)
class DrawsAgain(SampleAndMatch):
    """On a mismatch draws another token in the place of the one that did not match."""

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        path, token = super().verify(tree, rows, uniforms, position)
        if len(tree) and not path:
            token = draw(rows.distribution(0), uniforms.uniform("resample", position))
        return path, token


class Sharper(Model):
    """Draws from a sharper distribution than the one that the model gives."""

    def next(self, text: Text) -> np.ndarray:
        counts = self.counts(text)
        best = max(counts)
        return np.array([count == best for count in counts]) / sum(count == best for count in counts)


def planted(name: str, pair: int) -> tuple[Verifier, Draft, Model, bool]:
    """(verifier, draft, target, whether streams are apart)."""
    target, q = models(pair)
    match name:
        case "an argmax draft with the whole q":
            return Leviathan(), chain_draft(q, 1, argmax=True), target, True
        case "q from before top-k":
            raw = Model(2 * pair + 1, 3, 4)
            sharp = Sharper(2 * pair + 1, 3, 4)
            return Leviathan(), chain_draft(sharp, 1, handed=lambda _: raw.next(())), target, True
        case "a residual that is not renormalised":
            return NotRenormalised(), chain_draft(q, 1), target, True
        case "an edit of p in place":
            return EditsInPlace(), chain_draft(q, 1), target, True
        case "one random number for drafting and deciding":
            return Leviathan(), chain_draft(q, 1), target, False
        case _:
            return DrawsAgain(), tree_draft(q, (1,), "deterministic"), target, True


@pytest.mark.parametrize(
    "bug",
    [
        "an argmax draft with the whole q",
        "q from before top-k",
        "a residual that is not renormalised",
        "an edit of p in place",
        "one random number for drafting and deciding",
        "another draw after a mismatch",
    ],
)
def test_the_enumeration_sees_a_planted_bug(bug: str) -> None:
    found = []
    for pair in range(PAIRS):
        verifier, draft, target, apart = planted(bug, pair)
        found.append(distance(output_law(verifier, draft, target, 1, apart), target.law(1)))
    assert max(found) > Fraction(1, 20)


@dataclass(frozen=True)
class DropsBonus(Leviathan):
    """Loses the token that follows a chain that was accepted as a whole."""

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        path, token = super().verify(tree, rows, uniforms, position)
        return (path[:-1], tree.tokens[path[-1]]) if path and len(path) == len(tree) else (path, token)


@pytest.mark.parametrize(("verifier", "complete"), [(Leviathan(), True), (DropsBonus(), False)])
def test_a_chain_that_is_accepted_as_a_whole_is_followed_by_a_bonus_token(verifier: Verifier, complete: bool) -> None:
    """Where q is p every sample is accepted, so a chain of two always gives three tokens."""
    target = Model(3, 3, 4)

    def tokens(uniforms: Uniforms) -> int:
        tree = chain_draft(target, 2)((), uniforms)
        path, _ = verifier.verify(tree, ModelRows(target, (), tree), uniforms, 0)
        return len(path) + 1

    assert (law(tokens, 4, horizon=2) == {3: Fraction(1)}) is complete


def test_leviathan_accepts_as_often_as_p_and_q_overlap() -> None:
    for pair in range(PAIRS):
        target, q = models(pair)

        def accepted(uniforms: Uniforms, target: Model = target, q: Model = q) -> int:
            tree = chain_draft(q, 1)((), uniforms)
            return len(Leviathan().verify(tree, ModelRows(target, (), tree), uniforms, 0)[0])

        overlap = sum(Fraction(min(a, b), 4) for a, b in zip(target.counts(()), q.counts(()), strict=True))
        assert law(accepted, 4, horizon=1).get(1, Fraction(0)) == overlap
