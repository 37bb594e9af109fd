"""Acceptance rules for trees of drawn tokens: recursive rejection and k-sequential selection."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graft.compiler.drafting import ROOT, DraftKind, DraftTree, Rows, Uniforms, Verifier
from graft.compiler.errors import PlanError
from graft.runtime.random import sibling
from graft.runtime.verifiers import check_drawn, draw, residual


@dataclass(frozen=True)
class SiblingRule(Verifier):
    """A rule that decides about the children of one node at a time, in the order in which they were drawn."""

    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        """See `Verifier.verify`; takes the streams "accept", "accept siblings", "resample" and "sample".

        Raises PlanError for a tree of another kind than the rule is for, and GenerationError where a token was drafted
        that its own q rules out.
        """
        if len(tree) and tree.kind not in self.lossless_for:
            raise PlanError(
                f"{type(self).__name__} cannot verify this tree.",
                expected=f"drafts of kind {' or '.join(sorted(self.lossless_for))}",
                found=tree.kind,
                remedy="use a drafter that draws, or verifier SampleAndMatch",
            )
        children = tree.children()
        path: list[int] = []
        node = ROOT
        while node in children:
            place, siblings = position + len(path), children[node]
            p, q = rows.distribution(node + 1), tree.q[node]
            numbers = (decision(uniforms, place, rank) for rank in range(len(siblings)))
            tokens = [tree.tokens[child] for child in siblings]
            rank, left = self.choose(p, q, tokens, numbers, place, replacement=tree.kind == "independent")
            if rank is None:
                return path, draw(left, uniforms.uniform("resample", place))
            node = siblings[rank]
            path.append(node)
        return path, draw(rows.distribution(node + 1), uniforms.uniform("sample", position + len(path)))

    @abstractmethod
    def choose(
        self, p: np.ndarray, q: np.ndarray, tokens: Sequence[int], numbers: Iterator[float], place: int, *,
        replacement: bool,
    ) -> tuple[int | None, np.ndarray]:  # fmt: skip
        """The rank of the accepted token, or None and the weights float64 [vocabulary] that another is drawn from.

        p and q are float64 [vocabulary] and stay as they are; `numbers` gives a uniform number for each token.
        """


def decision(uniforms: Uniforms, place: int, rank: int) -> float:
    """The number that decides about a sibling; of an only child the one that decides about it in a chain."""
    return uniforms.uniform("accept siblings", sibling(place, rank)) if rank else uniforms.uniform("accept", place)


@dataclass(frozen=True)
class RecursiveRejection(SiblingRule):
    """Try the siblings in the order drawn, each against what the rejected ones left of p.

    Independent samples (multi-round speculative sampling, SpecInfer, 2305.09781): accept x with probability
    min(1, p(x) / q(x)), else go on with p = norm(max(p - q, 0)). Draws without replacement (RSD, 2402.14160): the same,
    and after a rejection q loses x and is normalised again. After the last one draw from what p has become. On a chain
    it is Leviathan's rule, number by number.
    """

    lossless_for: ClassVar[frozenset[DraftKind]] = frozenset({"independent", "without-replacement"})

    def choose(
        self, p: np.ndarray, q: np.ndarray, tokens: Sequence[int], numbers: Iterator[float], place: int, *,
        replacement: bool,
    ) -> tuple[int | None, np.ndarray]:  # fmt: skip
        """See `SiblingRule.choose`."""
        for rank, (token, number) in enumerate(zip(tokens, numbers, strict=True)):
            check_drawn(q, token, place)
            if number * q[token] < p[token]:
                return rank, p
            p = residual(p, q)
            if not replacement and rank + 1 < len(tokens):
                q = q.copy()
                q[token] = 0.0
                q /= max(q.sum(), np.finfo(np.float64).tiny)
        return None, p


@dataclass(frozen=True)
class KSeq(SiblingRule):
    """k-sequential selection among k independent samples (SpecTr, 2310.15141).

    Accept each with probability min(1, p(x) / (rho q(x))); one pass, at least 1 - 1/e of what the best rule accepts.
    With b = sum min(q, p / rho), k tries accept with probability 1 - (1 - b)^k, and give x with probability
    c min(q, p / rho)(x), c = (1 - (1 - b)^k) / b. That must not exceed p, so rho is the least number with c <= rho, in
    [1, k]; the rest is drawn from p - c min(q, p / rho).
    """

    lossless_for: ClassVar[frozenset[DraftKind]] = frozenset({"independent"})

    def choose(
        self, p: np.ndarray, q: np.ndarray, tokens: Sequence[int], numbers: Iterator[float], place: int, *,
        replacement: bool,
    ) -> tuple[int | None, np.ndarray]:  # fmt: skip
        """See `SiblingRule.choose`."""
        rho, scale = selection(p, q, len(tokens))
        for rank, (token, number) in enumerate(zip(tokens, numbers, strict=True)):
            check_drawn(q, token, place)
            if number * q[token] * rho < p[token]:
                return rank, p
        # What is left where everything is accepted but for rounding is noise, as in `residual`.
        return None, residual(p, np.minimum(q, p / rho) * scale)


def selection(p: np.ndarray, q: np.ndarray, count: int) -> tuple[float, float]:
    """(rho, c) of `KSeq` for `count` samples."""

    def scale(rho: float) -> float:
        once = min(float(np.minimum(q, p / rho).sum()), 1.0)
        # -expm1(k log1p(-b)) / b without cancellation; the limit at b = 0 is k.
        return -np.expm1(count * np.log1p(-once)) / once if 0.0 < once < 1.0 else 1.0 if once else float(count)

    low, high = 1.0, float(count)
    if scale(low) <= low:
        return low, scale(low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if scale(middle) <= middle else (middle, high)
    return high, scale(high)
