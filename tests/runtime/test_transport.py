"""The optimal-transport bound on acceptance: right on small cases, and no rule exceeds it."""

from __future__ import annotations

from itertools import chain, combinations, product

import numpy as np
import pytest

from graft.compiler.drafting import DraftKind, Uniforms, Verifier
from graft.compiler.errors import PlanError
from graft.runtime.rejection import KSeq, RecursiveRejection
from graft.runtime.transport import best_acceptance, flow_bound
from graft.runtime.tree_policies import Fixed
from graft.runtime.verifiers import SampleAndMatch
from tests.runtime.branching import law
from tests.runtime.test_drawn_trees import Language, LanguageRows, grown


def pair(seed: int, vocabulary: int = 4) -> tuple[np.ndarray, np.ndarray]:
    return Language(100 + 2 * seed, vocabulary).next(()), Language(101 + 2 * seed, vocabulary).next(())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_of_independent_samples_it_is_the_least_cut_over_all_sets_and_the_greatest_flow(count: int) -> None:
    for seed in range(15):
        p, q = pair(seed)
        subsets = chain.from_iterable(combinations(range(4), size) for size in range(5))
        least = min(p[list(held)].sum() + 1.0 - q[list(held)].sum() ** count for held in subsets)
        sets: dict[frozenset[int], float] = {}
        for drawn in product(range(4), repeat=count):
            sets[frozenset(drawn)] = sets.get(frozenset(drawn), 0.0) + float(np.prod(q[list(drawn)]))
        found = best_acceptance(p, q, count, "independent")
        assert found == pytest.approx(least, abs=1e-12)
        assert found == pytest.approx(flow_bound(p, sets), abs=1e-12)


@pytest.mark.parametrize("kind", ["independent", "without-replacement"])
def test_a_single_draft_is_accepted_as_often_as_p_and_q_overlap(kind: DraftKind) -> None:
    for seed in range(10):
        p, q = pair(seed)
        assert best_acceptance(p, q, 1, kind) == pytest.approx(np.minimum(p, q).sum(), abs=1e-12)


@pytest.mark.parametrize(
    ("verifier", "kind"),
    [
        (SampleAndMatch(), "independent"),
        (SampleAndMatch(), "without-replacement"),
        (RecursiveRejection(), "independent"),
        (RecursiveRejection(), "without-replacement"),
        (KSeq(), "independent"),
    ],
)
def test_no_rule_accepts_more_often_than_the_bound(verifier: Verifier, kind: DraftKind) -> None:
    for seed in range(12):
        target, q = Language(100 + 2 * seed, 4), Language(101 + 2 * seed, 4)

        def accepted(uniforms: Uniforms, target: Language = target, q: Language = q) -> int:
            tree = grown(q, Fixed.branching(2), kind, 2)((), uniforms)
            return len(verifier.verify(tree, LanguageRows(target, (), tree), uniforms, 0)[0])

        rate = law(accepted).get(1, 0.0)
        bound = best_acceptance(target.next(()), q.next(()), 2, kind)
        assert rate <= bound + 1e-12
        if isinstance(verifier, KSeq):
            assert rate >= (1.0 - np.exp(-1.0)) * bound


def test_drafts_that_cannot_be_listed_are_refused() -> None:
    many = np.full(400, 1 / 400)
    with pytest.raises(PlanError, match="no bound"):
        best_acceptance(many, many, 2, "without-replacement")
    with pytest.raises(PlanError, match="deterministic"):
        best_acceptance(many, many, 1, "deterministic")
