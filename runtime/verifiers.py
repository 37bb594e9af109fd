"""Acceptance rules: which drafted tokens stand, and which token follows them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np

from graft.compiler.drafting import ROOT, DraftKind, DraftTree, Rows, Uniforms, Verifier
from graft.compiler.errors import GenerationError, PlanError
from graft.compiler.passing import Pass
from graft.passes.judge_head import JudgeHead

ALL_KINDS: frozenset[DraftKind] = frozenset(get_args(DraftKind))


def draw(distribution: np.ndarray, uniform: float) -> int:
    """The token at `uniform` in [0, 1) of the cumulative distribution, token ids ascending.

    `distribution` is float64 [vocabulary] of weights that need not sum to 1; a token of weight 0 is never drawn.
    Raises GenerationError where the weights are not finite or all 0.
    """
    cumulative = np.cumsum(distribution)
    total = cumulative[-1]
    if not 0 < total < np.inf:
        raise GenerationError(
            "A token cannot be drawn.",
            expected="probabilities that are finite and not all 0",
            found=f"a sum of {total}",
            remedy="look at the logits processors, and at the logits for NaN",
        )
    # Rounding may carry uniform * total up to the total itself, which lies behind the last token.
    last = int(np.searchsorted(cumulative, total, side="left"))
    return min(bisect_right(cumulative, uniform * total), last)


NO_MASS = 1e-12


def residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """max(p - q, 0), normalised: what is left to draw from after a sample from q was rejected.

    Where p and q agree up to rounding there is no residual to speak of; normalising it would amplify noise, so it is p.
    """
    left = np.maximum(p - q, 0.0)
    mass = left.sum()
    return left / mass if mass > NO_MASS else p


def check_drawn(q: np.ndarray, token: int, position: int) -> None:
    """Raise GenerationError where a token was drafted that the distribution it is said to be drawn from rules out."""
    if q[token] <= 0:
        raise GenerationError(
            "A drafted token has probability 0 in the distribution it is said to be drawn from.",
            expected="q as it was sampled from, after temperature, top-k and top-p",
            found=f"q[{token}] = {q[token]} at position {position}",
        )


def _child(tree: DraftTree, node: int, token: int, first: int) -> int | None:
    """The first child of `node` that holds `token`, from index `first` on."""
    parents, tokens = tree.parents, tree.tokens
    for index in range(first, len(tokens)):
        if parents[index] == node and tokens[index] == token:
            return index
    return None


@dataclass(frozen=True)
class GreedyWalk(Verifier):
    """Follow the target's best token while the tree holds it. The output is plain greedy decoding's, for any draft."""

    lossless_for_greedy: ClassVar[frozenset[DraftKind]] = ALL_KINDS

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        """See `Verifier.verify`; `uniforms` is not used."""
        path: list[int] = []
        node = ROOT
        while True:
            token = rows.argmax(node + 1)
            child = _child(tree, node, token, node + 1)
            if child is None:
                return path, token
            path.append(child)
            node = child


@dataclass(frozen=True)
class SampleAndMatch(Verifier):
    """Sample from the target at every row and follow the sample while the tree holds it.

    Lossless for any draft, since what is committed is always the target's own sample; the rule of Lookahead
    (2312.12728) and of REST. The token at a place in the text is a function of (seed, position) and the target's
    distribution there, so plain sampling gives the same text: it is this rule on an empty tree.
    """

    lossless_for: ClassVar[frozenset[DraftKind]] = ALL_KINDS

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        """See `Verifier.verify`; takes the stream "sample"."""
        path: list[int] = []
        node = ROOT
        while True:
            token = draw(rows.distribution(node + 1), uniforms.uniform("sample", position + len(path)))
            child = _child(tree, node, token, node + 1)
            if child is None:
                return path, token
            path.append(child)
            node = child


@dataclass(frozen=True)
class Leviathan(Verifier):
    """Speculative sampling of a chain of samples from q (Leviathan et al., 2211.17192; Chen et al., 2302.01318).

    Accept x with probability min(1, p(x) / q(x)); on a rejection draw from the normalised max(p - q, 0); after a whole
    chain draw one more token from p.
    """

    lossless_for: ClassVar[frozenset[DraftKind]] = frozenset({"independent"})
    chains_only: ClassVar[bool] = True

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        """See `Verifier.verify`; takes the streams "accept", "resample" and "sample".

        Raises PlanError for a tree that is not a chain of independent samples, and GenerationError where a token was
        drafted that its own q rules out.
        """
        if len(tree) and (tree.kind != "independent" or tree.parents != list(range(-1, len(tree) - 1))):
            raise PlanError(
                "Leviathan cannot verify this tree.",
                expected="a chain of independent samples",
                found=f"{len(tree)} nodes of kind {tree.kind!r} with parents {tree.parents}",
                remedy="use tree policy Chain, or verifier SampleAndMatch",
            )
        for node, token in enumerate(tree.tokens):
            p, q = rows.distribution(node), tree.q[node - 1]
            check_drawn(q, token, position + node)
            if uniforms.uniform("accept", position + node) * q[token] < p[token]:
                continue
            return list(range(node)), draw(residual(p, q), uniforms.uniform("resample", position + node))
        last = rows.distribution(len(tree))
        return list(range(len(tree))), draw(last, uniforms.uniform("sample", position + len(tree)))


@dataclass(frozen=True)
class LossyTypical(Verifier):
    """LOSSY: Medusa's typical acceptance (2401.10774). The output does not keep the target's distribution.

    A drafted token x stands if p(x) > min(epsilon, delta exp(-H(p))), H the entropy of p in nats; the deepest path
    stands, of several the one with the highest log-probability, and the target's best token follows it.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 < self.epsilon <= 1.0 or not 0.0 < self.delta <= 1.0:
            raise PlanError(
                "The thresholds of typical acceptance are out of range.",
                expected="epsilon and delta above 0, at most 1",
                found=f"epsilon {self.epsilon}, delta {self.delta}",
                where="LossyTypical",
            )

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        """See `Verifier.verify`; `uniforms` is not used."""
        reached = {ROOT: (0, 0.0)}  # node -> depth, log-probability
        thresholds: dict[int, float] = {}
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            if parent not in reached:
                continue
            p = rows.distribution(parent + 1)
            if parent not in thresholds:
                kept = p[p > 0]
                thresholds[parent] = min(self.epsilon, self.delta * float(np.exp((kept * np.log(kept)).sum())))
            if p[token] > thresholds[parent]:
                depth, score = reached[parent]
                reached[node] = depth + 1, score + float(np.log(p[token]))
        last = max(reached, key=lambda node: reached[node])
        return tree.path(last), rows.argmax(last + 1)


@dataclass(frozen=True)
class LossyJudge(Verifier):
    """LOSSY: Judge Decoding (2501.19309). The output does not keep the target's distribution.

    A drafted token stands if plain decoding would choose it, or if a trained head on the target's hidden state at that
    token gives it more than `threshold`. The path follows plain decoding's choice while the tree holds it, else the
    child that the head likes best. Behind the last one stands plain decoding's choice, greedy or sampled.
    """

    folder: str
    """What `train-heads --kind judge` wrote."""
    threshold: float = 0.5
    """1 accepts what plain decoding chooses alone."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise PlanError(
                "the threshold of a judge is out of range",
                expected="a probability",
                found=self.threshold,
                where="LossyJudge.threshold",
            )

    @property
    def passes(self) -> tuple[Pass, ...]:
        """See `Verifier.passes`."""
        return (JudgeHead(self.folder),)

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        """See `Verifier.verify`; takes the stream "sample"."""
        children = tree.children()
        path: list[int] = []
        node = ROOT
        while True:
            token = rows.choice(node + 1, uniforms)
            below = children.get(node, [])
            matching = [child for child in below if tree.tokens[child] == token]
            liked = [child for child in below if rows.score(child + 1) > self.threshold] if not matching else []
            if not matching and not liked:
                return path, token
            node = matching[0] if matching else max(liked, key=lambda child: rows.score(child + 1))
            path.append(node)


def default_verifier(*, sampling: bool) -> Verifier:
    """The rule that is lossless for every draft: GreedyWalk for greedy decoding, SampleAndMatch for sampling."""
    return SampleAndMatch() if sampling else GreedyWalk()
