"""Trees of drawn tokens: every legal (kind, policy, verifier) keeps the target's law, and planted bugs show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from graft.compiler.acceptance import is_lossless
from graft.compiler.drafting import ROOT, Context, DraftKind, DraftTree, Growth, TreePolicy, Uniforms, Verifier
from graft.compiler.errors import GenerationError, PlanError
from graft.runtime.drafters.draft_model import DraftModel
from graft.runtime.drafters.with_function import draws
from graft.runtime.random import Streams, drawn_node
from graft.runtime.rejection import KSeq, RecursiveRejection, selection
from graft.runtime.request import SAMPLING, Sampling
from graft.runtime.tree_policies import BestFirst, Chain, ChainUntil, Fixed, StochasticBeam
from graft.runtime.verifiers import Leviathan, SampleAndMatch, residual
from tests.runtime.branching import distance, law
from tests.runtime.decoding import bigram
from tests.runtime.enumeration import Text

EXACT = 1e-12
NOISE: list[Callable[[int], float]] = [
    lambda counter: 0.5,
    lambda counter: 0.02 + 0.96 * ((counter * 0.6180339887) % 1.0),
    lambda counter: 0.02 + 0.96 * ((counter * 0.7548776662) % 1.0),
]
"""What perturbs a stochastic beam: its trees must be lossless for any numbers that do not know the tokens."""


class Language:
    """For every text a distribution over a few tokens; some probabilities are 0."""

    def __init__(self, seed: int, vocabulary: int = 3) -> None:
        self.seed, self.vocabulary = seed, vocabulary
        self.next = cache(self._next)

    def _next(self, text: Text) -> np.ndarray:
        source = np.random.default_rng([self.seed, len(text), *text])
        shares = source.dirichlet([0.7] * self.vocabulary)
        shares[source.random(self.vocabulary) < 0.15] = 0.0
        return shares / shares.sum() if shares.any() else np.full(self.vocabulary, 1.0 / self.vocabulary)

    def law(self, length: int) -> dict[Text, float]:
        found: dict[Text, float] = {(): 1.0}
        for _ in range(length):
            found = {
                (*text, token): weight * share
                for text, weight in found.items()
                for token, share in enumerate(self.next(text))
                if share
            }
        return found


@dataclass
class LanguageRows:
    target: Language
    text: Text
    tree: DraftTree

    def distribution(self, row: int) -> np.ndarray:
        return self.target.next(self.text + tuple(self.tree.tokens[node] for node in self.tree.path(row - 1)))

    def argmax(self, row: int) -> int:
        return int(self.distribution(row).argmax())


Draft = Callable[[Text, Uniforms], DraftTree]


def grown(q: Language, policy: TreePolicy, kind: DraftKind, budget: int, candidates: int = 2) -> Draft:
    """Drafting as `FunctionDrafting` does it; behind the first token a single node, which keeps the walks few."""

    def draft(text: Text, uniforms: Uniforms) -> DraftTree:
        def noise(node: int, rank: int) -> float:
            return uniforms.uniform("beam", drawn_node(len(text), node, rank))

        tree = DraftTree(kind=kind, noise=noise)
        growth = policy.grow(tree, 1 if text else budget, by_level=True)
        asked = next(growth)
        while True:
            answers = []
            for node in asked:
                path = text + tuple(tree.tokens[above] for above in tree.path(node))
                tree.q[node] = q.next(path)
                count = candidates if policy.branches(kind) and not text else 1
                numbers = (
                    uniforms.uniform("draft siblings", drawn_node(len(text), node, rank)) for rank in range(count)
                )
                answers.append(draws(tree.q[node], numbers, replacement=kind == "independent"))
            try:
                asked = growth.send(answers)
            except StopIteration as end:
                assert isinstance(end.value, DraftTree)
                return end.value

    return draft


def output_law(verifier: Verifier, draft: Draft, target: Language, length: int, noise: int = 0) -> dict[Text, float]:
    def run(uniforms: Uniforms) -> Text:
        text: Text = ()
        while len(text) < length:
            tree = draft(text, uniforms)
            path, token = verifier.verify(tree, LanguageRows(target, text, tree), uniforms, len(text))
            assert tree.path(path[-1] if path else ROOT) == path
            text = (*text, *(tree.tokens[node] for node in path), token)
        return text[:length]

    return law(run, {"beam": NOISE[noise]})


POLICIES: dict[str, tuple[TreePolicy, int]] = {
    "chain": (Chain(), 2),
    "chain until": (ChainUntil(0.5), 3),
    "branching 2": (Fixed.branching(2), 2),
    "branching 2, 1": (Fixed.branching(2, 1), 3),
    "ranks with gaps": (Fixed(((1,), (0,), (1, 1))), 3),
    "best first": (BestFirst(width=1, floor=0.15), 3),
    "stochastic beam": (StochasticBeam(2), 3),
}
VERIFIERS: tuple[Verifier, ...] = (SampleAndMatch(), Leviathan(), RecursiveRejection(), KSeq())
KINDS: tuple[DraftKind, ...] = ("independent", "without-replacement")
LEGAL = [
    (kind, name, verifier)
    for kind in KINDS
    for name, (policy, _) in POLICIES.items()
    for verifier in VERIFIERS
    if is_lossless(verifier, kind, branches=policy.branches(kind), sampling=True)
]


@pytest.mark.parametrize(("kind", "name", "verifier"), LEGAL, ids=lambda value: str(value).replace("()", ""))
def test_every_legal_combination_keeps_the_law_of_the_text(kind: DraftKind, name: str, verifier: Verifier) -> None:
    policy, budget = POLICIES[name]
    for pair in range(2):
        target, q = Language(2 * pair), Language(2 * pair + 1)
        found = output_law(verifier, grown(q, policy, kind, budget), target, 2, noise=pair)
        assert distance(found, target.law(2)) < EXACT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 3])
def test_recursive_rejection_keeps_the_law_of_one_token_for_many_pairs(kind: DraftKind, count: int) -> None:
    for pair in range(15):
        target, q = Language(100 + 2 * pair, 4), Language(101 + 2 * pair, 4)
        draft = grown(q, Fixed.branching(count), kind, count, candidates=count)
        assert distance(output_law(RecursiveRejection(), draft, target, 1), target.law(1)) < EXACT


@pytest.mark.parametrize("count", [2, 3])
def test_k_seq_keeps_the_law_of_one_token_for_many_pairs(count: int) -> None:
    for pair in range(15):
        target, q = Language(100 + 2 * pair, 4), Language(101 + 2 * pair, 4)
        draft = grown(q, Fixed.branching(count), "independent", count, candidates=count)
        assert distance(output_law(KSeq(), draft, target, 1), target.law(1)) < EXACT


def test_k_seqs_rho_is_the_least_that_gives_no_token_too_often() -> None:
    for seed in range(50):
        p, q = Language(seed, 6).next(()), Language(seed + 1000, 6).next(())
        for count in (1, 2, 5):
            rho, scale = selection(p, q, count)
            assert 1.0 <= rho <= count
            assert scale <= rho * (1 + EXACT)
            assert (np.minimum(q, p / rho) * scale <= p + 1e-15).all()
            once = float(np.minimum(q, p / rho).sum())
            assert 1.0 - (1.0 - once) ** count == pytest.approx(scale * once)
            if rho > 1.0:
                assert scale == pytest.approx(rho)


# What an implementation may get wrong, each a small change of the rule or of the tree.


@dataclass(frozen=True)
class Variant(RecursiveRejection):
    """Recursive rejection with one step left out."""

    forgets: str = ""

    def choose(self, p: np.ndarray, q: np.ndarray, tokens: Sequence[int], numbers: Iterator[float], place: int, *,
               replacement: bool) -> tuple[int | None, np.ndarray]:  # fmt: skip
        start = p
        for rank, (token, number) in enumerate(zip(tokens, numbers, strict=True)):
            if number * q[token] < p[token]:
                return rank, p
            p = np.maximum(p - q, 0.0) if self.forgets == "normalise p" else residual(p, q)
            if not replacement and self.forgets != "remove":
                q = q.copy()
                q[token] = 0.0
                if self.forgets != "normalise q":
                    q /= max(q.sum(), 1e-300)
        if self.forgets == "all but the last":
            p = residual(start, q)
        return None, p if p.any() else start


def one_level(kind: DraftKind, verifier: Verifier, draft: Callable[[Language], Draft] | None = None) -> float:
    """The largest distance to the target's law over some pairs."""
    found = []
    for pair in range(12):
        target, q = Language(100 + 2 * pair), Language(101 + 2 * pair)
        made = draft(q) if draft else grown(q, Fixed.branching(2), kind, 2)
        found.append(distance(output_law(verifier, made, target, 2), target.law(2)))
    return max(found)


@pytest.mark.parametrize("forgets", ["remove", "normalise q", "normalise p", "all but the last"])
def test_a_step_that_is_left_out_of_recursive_rejection_shows(forgets: str) -> None:
    assert one_level("without-replacement", Variant()) < EXACT
    assert one_level("without-replacement", Variant(forgets)) > 0.01


@dataclass(frozen=True)
class SingleResidual(KSeq):
    """k-SEQ that draws from max(p - q, 0) in the end, as a rule for one draft would."""

    def choose(self, p: np.ndarray, q: np.ndarray, tokens: Sequence[int], numbers: Iterator[float], place: int, *,
               replacement: bool) -> tuple[int | None, np.ndarray]:  # fmt: skip
        rank, _ = super().choose(p, q, tokens, numbers, place, replacement=replacement)
        return rank, residual(p, q)


def test_k_seq_with_the_residual_of_a_single_draft_shows() -> None:
    assert one_level("independent", SingleResidual()) > 1e-3


def test_draws_of_the_other_kind_show() -> None:
    """What the type check rules out is not lossless: independent draws tested as if without replacement, and so on."""

    def disguised(real: DraftKind, said: DraftKind) -> Callable[[Language], Draft]:
        def of(q: Language) -> Draft:
            inner = grown(q, Fixed.branching(2), real, 2)

            def draft(text: Text, uniforms: Uniforms) -> DraftTree:
                tree = inner(text, uniforms)
                tree.kind = said
                return tree

            return draft

        return of

    with pytest.raises(GenerationError, match="probability 0"):
        one_level("without-replacement", RecursiveRejection(), disguised("independent", "without-replacement"))
    assert one_level("independent", RecursiveRejection(), disguised("without-replacement", "independent")) > 0.01


@dataclass(frozen=True)
class DropsUnlikely(TreePolicy):
    """Two draws, of which the unlikely ones are dropped after the fact."""

    def branches(self, kind: DraftKind) -> bool:
        return True

    def grow(self, tree: DraftTree, budget: int, *, by_level: bool = False) -> Growth:
        (candidates,) = yield [ROOT]
        for token, probability in candidates:
            if probability > 0.3:
                tree.add(token, ROOT, probability)
        return tree


def test_dropping_unlikely_samples_after_the_fact_shows() -> None:
    for kind in KINDS:
        assert one_level(kind, RecursiveRejection(), lambda q, kind=kind: grown(q, DropsUnlikely(), kind, 2)) > 0.01


@dataclass(frozen=True)
class LeavesOutWhatFellShort(ChainUntil):
    """The stopping rule applied to the token that it reads."""

    def grow(self, tree: DraftTree, budget: int, *, by_level: bool = False) -> Growth:
        grown_tree = yield from super().grow(tree, budget, by_level=by_level)
        short = 1.0 - float(np.prod(grown_tree.probabilities)) > self.threshold
        return grown_tree.select(range(len(grown_tree) - short))


def test_stopping_before_the_token_that_fell_short_shows() -> None:
    def draft(q: Language) -> Draft:
        return grown(q, LeavesOutWhatFellShort(0.5), "independent", 2)

    assert one_level("independent", Leviathan(), draft) > 0.01
    assert one_level("independent", Leviathan(), lambda q: grown(q, ChainUntil(0.5), "independent", 2)) < EXACT


@dataclass(frozen=True)
class BestOfTwo(TreePolicy):
    """DySpec's heap with the value of a node in the place of its slot's: keeps the sample of highest probability."""

    def branches(self, kind: DraftKind) -> bool:
        return True

    def grow(self, tree: DraftTree, budget: int, *, by_level: bool = False) -> Growth:
        (candidates,) = yield [ROOT]
        token, probability = max(candidates, key=lambda candidate: candidate[1])
        tree.add(token, ROOT, probability)
        return tree


def test_choosing_among_samples_by_their_own_probability_shows() -> None:
    for kind in KINDS:
        assert one_level(kind, RecursiveRejection(), lambda q, kind=kind: grown(q, BestOfTwo(), kind, 2)) > 0.01


def test_best_first_keeps_a_draw_by_what_is_known_before_it_is_drawn() -> None:
    """The second sibling stands or falls with the first one's probability, whichever token it is itself."""
    shapes: dict[tuple[int, ...], set[int]] = {}
    shares = [0.6, 0.3, 0.06, 0.04]
    for first in range(4):
        for second in set(range(4)) - {first}:
            tree = DraftTree(kind="without-replacement")
            growth = BestFirst(floor=0.5).grow(tree, 8, by_level=True)
            answers = [[(first, shares[first]), (second, shares[second])]]
            asked, size = next(growth), 0
            while asked == [ROOT]:
                try:
                    asked = growth.send(answers)
                except StopIteration as end:
                    size = len(end.value)
                    break
            else:
                size = len(tree)
            shapes.setdefault((first,), set()).add(size)
    assert all(len(sizes) == 1 for sizes in shapes.values())
    assert shapes[0,] == {1} and shapes[2,] == {2}


def test_a_stochastic_beam_samples_sequences_without_replacement() -> None:
    """The leaves of a level are distinct, and each is a sequence's turn as often as sampling without replacement says:
    the first with its probability, the second with that of what is left."""
    q = Language(7, 3)
    first, second = {}, {}
    for text, weight in q.law(2).items():
        first[text] = weight
        for other, share in q.law(2).items():
            if other != text:
                second[text, other] = weight * share / (1.0 - weight)
    counts = dict.fromkeys(second, 0)
    runs = 3000
    for seed in range(runs):
        tree = grown(q, StochasticBeam(2), "without-replacement", 4, candidates=3)((), Streams(seed))
        leaves = [node for node in range(len(tree)) if len(tree.path(node)) == 2]
        texts = [tuple(tree.tokens[above] for above in tree.path(node)) for node in leaves]
        counts[texts[0], texts[1]] += 1
    expected = {pair: share * runs for pair, share in second.items()}
    statistic = sum((counts[pair] - hoped) ** 2 / hoped for pair, hoped in expected.items() if hoped > 0)
    # Normal approximation of the chi-square distribution's tail, five standard deviations out.
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_on_a_chain_recursive_rejection_and_k_seq_decide_as_leviathan() -> None:
    for seed in range(200):
        target, q = Language(seed % 7), Language(seed % 7 + 50)
        tree = grown(q, Chain(), "independent", 3)((), Streams(seed))
        rows = LanguageRows(target, (), tree)
        expected = Leviathan().verify(tree, rows, Streams(seed), 0)
        assert RecursiveRejection().verify(tree, rows, Streams(seed), 0) == expected
        assert KSeq().verify(tree, rows, Streams(seed), 0) == expected


def test_trees_of_another_kind_are_refused() -> None:
    tree = DraftTree(tokens=[1], parents=[ROOT], probabilities=[0.5])
    for verifier in (RecursiveRejection(), KSeq()):
        with pytest.raises(PlanError, match="cannot verify"):
            verifier.verify(tree, LanguageRows(Language(0), (), tree), Streams(0), 0)


def test_a_sibling_that_q_rules_out_is_an_error() -> None:
    tree = DraftTree([0, 0], [ROOT, ROOT], [0.5, 0.5], "without-replacement", {ROOT: np.array([0.5, 0.5])})
    rows = SimpleNamespace(distribution=lambda row: np.array([0.0, 1.0]))
    with pytest.raises(GenerationError, match="probability 0"):
        RecursiveRejection().verify(tree, rows, Streams(0), 0)


def context(*tokens: int, seed: int = 0) -> Context:
    return Context(list(tokens), len(tokens), {SAMPLING: Sampling(0, len(tokens), LogitsProcessorList(), True, seed)})


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("policy", [Fixed.branching(3, 2), BestFirst(), StochasticBeam(3)])
def test_a_draft_models_tree_is_the_same_in_any_company(policy: TreePolicy, replacement: bool) -> None:
    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    spec = DraftModel(SimpleNamespace(decoder=bigram(table)), sample=True, replacement=replacement)
    opened = spec.open(bigram(table), policy)
    contexts = [context(1, 2, seed=3), context(4, seed=8), context(1, 2, seed=4)]
    for one in contexts:
        opened.begin(one, None)
    together = opened.propose(contexts, [9, 9, 9])
    for one, tree in zip(contexts, together, strict=True):
        (alone,) = opened.propose([one], [9])
        assert (alone.tokens, alone.parents) == (tree.tokens, tree.parents)
        assert tree.kind == spec.kind
    assert together[0].tokens != together[2].tokens


@pytest.mark.parametrize("replacement", [True, False])
def test_the_trees_of_a_draft_model_keep_the_law(replacement: bool) -> None:
    source = torch.Generator().manual_seed(5)
    target, table = torch.randn(3, 3, generator=source), torch.randn(3, 3, generator=source)
    shares = target.double().softmax(-1).numpy()
    spec = DraftModel(SimpleNamespace(decoder=bigram(table)), sample=True, candidates=2, replacement=replacement)
    opened = spec.open(bigram(table), Fixed.branching(2))

    def run(uniforms: Uniforms) -> Text:
        one = context(0)
        one.data[SAMPLING].uniforms = uniforms  # type: ignore[attr-defined]
        opened.begin(one, None)
        while len(one.tokens) < 3:
            (tree,) = opened.propose([one], [2])
            lasts = [one.tokens[-1], *tree.tokens]
            rows = SimpleNamespace(distribution=lambda row, lasts=lasts: shares[lasts[row]])
            path, token = RecursiveRejection().verify(tree, rows, uniforms, len(one.tokens))
            one.tokens += [*(tree.tokens[node] for node in path), token]
        opened.end(one)
        return tuple(one.tokens[1:3])

    expected = {(a, b): shares[0][a] * shares[a][b] for a in range(3) for b in range(3)}
    assert distance(law(run), expected) < 1e-7  # the draft model's logits are float32
