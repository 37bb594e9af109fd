"""LayerSkip, Kangaroo and DEL: the target's first layers draft, and what they ran is not run again to verify it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from graft.compiler.drafting import (
    Candidates,
    Context,
    Drafter,
    Drafting,
    DraftKind,
    DraftTree,
    Outcome,
    Target,
    TreePolicy,
)
from graft.compiler.errors import PlanError
from graft.compiler.passing import Pass
from graft.passes.acceptance_head import ACCEPTANCE, AcceptanceHead
from graft.passes.split import Split
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.drafters.head_levels import run_rows
from graft.runtime.drafters.self_draft import SelfDrafting
from graft.runtime.drafters.with_function import Growing, drawn_kind
from graft.runtime.request import slot_of
from graft.runtime.split import SplitTarget, split_of
from graft.runtime.tree_policies import Chain, ChainUntil


@dataclass(frozen=True)
class LayerSkip(Drafter):
    """An early exit drafts (LayerSkip, 2404.16710): the first layers, then the model's own norm and unembedding.

    Drafts a chain. Layers below the exit run once for each token: those above go on from the stored hidden states, on
    the same KV. It pays for models that were trained to exit early (facebook/layerskip-*).
    """

    layer: int
    """How many layers draft."""
    eta: float = 0.0
    """Stop behind a token whose probability is below; 0 never stops."""
    sample: bool = False
    """Draw from the early distribution, for verifier Leviathan, rather than take the best token."""
    acceptance: str = ""
    """A folder of `train-heads --kind acceptance`: a head that says how probably each token is accepted (SpecDec++,
    2405.19715). It stands for the token's own probability, and the chain ends by `ChainUntil`'s rule."""
    threshold: float = 0.7
    """With `acceptance`: stop when the chance that one of the tokens is rejected exceeds this."""

    def __post_init__(self) -> None:
        check_eta(self.eta, type(self).__name__)
        if self.acceptance and (self.sample or self.eta):
            raise PlanError(
                "an acceptance head stops a chain of best tokens by itself",
                expected="acceptance with neither eta nor sample",
                found=self,
                where=type(self).__name__,
            )

    @property
    def kind(self) -> DraftKind:
        """See `Drafter.kind`."""
        return "independent" if self.sample else "deterministic"

    @property
    def passes(self) -> tuple[Pass, ...]:
        """See `Drafter.passes`."""
        head = (AcceptanceHead(self.acceptance, self.layer),) if self.acceptance else ()
        return (Split((self.layer,)), *head)

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        """See `Drafter.open`; the plan's tree policy has no say in a chain."""
        split = split_of(target)
        if self.acceptance:
            return JudgedExitDrafting(split, self.layer, target.functions[ACCEPTANCE], self.threshold)
        return ExitDrafting(split, self.layer, self.eta, sample=self.sample)


@dataclass(frozen=True)
class Kangaroo(Drafter):
    """The first layers and a small trained adapter draft (Kangaroo, 2404.18911), and stop where they are not sure.

    The adapter is one attention block without a feed-forward, with a KV cache of its own, and a norm; the unembedding
    is the model's (passes/exit_adapter.py). A token whose probability is below `eta` is drafted, those after it are
    not. The paper leaves the exit behind layer 2 or 3 and eta at 0.6.
    """

    adapter: str
    """A safetensors file with the paper's keys: layers.0.self_attn.q_proj.weight, ..., norm.weight; or the folder of
    `train-heads --kind kangaroo`."""
    layer: int = 2
    eta: float = 0.6

    def __post_init__(self) -> None:
        check_eta(self.eta, "Kangaroo")

    @property
    def passes(self) -> tuple[Pass, ...]:
        """See `Drafter.passes`."""
        return (Split((self.layer,), self.adapter),)

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        """See `Drafter.open`; the plan's tree policy has no say in a chain."""
        return ExitDrafting(split_of(target), self.layer, self.eta)


@dataclass(frozen=True)
class DEL(Drafter):
    """Exit layer and draft length chosen anew for every round (DEL, 2504.05598).

    With a the share of drafted tokens that were accepted at an exit, d tokens give (1 - a^(d+1)) / (1 - a) for d + 1
    runs of the layers below and one of those above over d + 1 rows; the exit and the length with the most tokens per
    second are taken. Two choices differ from the paper: the denominator holds measured seconds in the place of counted
    layers, since the unembedding of a small model outweighs its layers; and acceptance is learnt from what an exit
    drafted, each exit being tried now and then, in the place of an unembedding of every layer's states.
    """

    layers: tuple[int, ...]
    """The exits to choose from."""
    eta: float = 0.0
    """Stop behind a token whose probability is below; 0 never stops."""
    memory: float = 0.95
    """Weight of what was seen before at every new token."""
    explore: int = 16
    """Every so many rounds the exit that was not used for longest is tried."""

    def __post_init__(self) -> None:
        check_eta(self.eta, "DEL")
        if len(set(self.layers)) < max(2, len(self.layers)) or not 0.0 < self.memory < 1.0 or self.explore < 2:
            raise PlanError(
                "DEL cannot choose so",
                expected="two different layers or more, memory between 0 and 1, explore of 2 or more",
                found=self,
                where="DEL",
            )

    @property
    def passes(self) -> tuple[Pass, ...]:
        """See `Drafter.passes`."""
        return (Split(self.layers),)

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        """See `Drafter.open`; the plan's tree policy has no say in a chain."""
        return DELDrafting(self, split_of(target))


def check_eta(eta: float, where: str) -> None:
    """Raise PlanError unless it is a probability below 1."""
    if not 0.0 <= eta < 1.0:
        raise PlanError("eta is out of range", expected="0 or more, below 1", found=eta, where=where)


@dataclass(frozen=True)
class SureChain(Chain):
    """A chain that ends behind the first token whose probability is below `eta` (the second exit of Kangaroo)."""

    eta: float = 0.0

    def ends(self, probability: float, reach: float) -> bool:
        """See `Chain.ends`."""
        return probability < self.eta


class ExitDrafting(SelfDrafting):
    """The `Drafting` of one exit."""

    def __init__(self, split: SplitTarget, layer: int, eta: float, *, sample: bool = False) -> None:
        super().__init__(split.shallow[layer], SureChain(eta), candidates=1, kind=drawn_kind(sample, True))
        self.split, self.layer = split, layer

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        """See `Drafting.propose`."""
        self.split.layer, self.decoder = self.layer, self.split.shallow[self.layer]
        return super().propose(contexts, budgets)

    def run(self, rows: Rows) -> Tensor:
        """See `FunctionDrafting.run`."""
        return self.split.draft(self.layer, rows)

    def settle(self, context: Context) -> None:
        """What was drafted stays for the step that verifies it."""

    def end(self, context: Context) -> None:
        """See `Drafting.end`."""
        self.split.forget(slot_of(context))


class JudgedExitDrafting(ExitDrafting):
    """The `Drafting` of one exit whose tokens an acceptance head judges."""

    def __init__(self, split: SplitTarget, layer: int, head: Decoder, threshold: float) -> None:
        super().__init__(split, layer, 0.0)
        self.policy, self.head = ChainUntil(threshold), head
        self.chances: dict[tuple[int, int], float] = {}
        """(slot, position of a row) -> the chance of the token that is drafted behind it; of the latest call."""

    def run(self, rows: Rows) -> Tensor:
        """See `FunctionDrafting.run`; the head reads what the layers below left."""
        logits = super().run(rows)
        stream = self.decoder.hidden
        assert stream is not None
        found, _ = run_rows(self.head, [[0]] * len(rows), list(stream.split(1)))
        chances = found.softmax(-1)[:, 1].tolist()
        self.chances |= dict(zip(zip(rows.slots, rows.positions, strict=True), chances, strict=True))
        return logits

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        """See `Drafting.propose`."""
        self.chances.clear()
        return super().propose(contexts, budgets)

    def best(self, one: Growing, logits: Tensor) -> list[Candidates]:
        """See `FunctionDrafting.best`."""
        last, found = len(one.context.tokens) - 1, super().best(one, logits)
        chances = [self.chances[one.slot, last + len(one.tree.path(node))] for node in one.asked]
        return [[(row[0][0], chance)] for row, chance in zip(found, chances, strict=True)]


@dataclass
class Shown:
    """What an exit has shown: accepted and decided tokens, weighted, and when it drafted last."""

    accepted: float = 1.0
    decided: float = 2.0
    last: int = 0

    @property
    def rate(self) -> float:
        """Share of its tokens that are accepted."""
        return self.accepted / self.decided


class DELDrafting(ExitDrafting):
    """The `Drafting` of `DEL`."""

    def __init__(self, spec: DEL, split: SplitTarget) -> None:
        super().__init__(split, spec.layers[0], spec.eta)
        self.spec, self.rounds = spec, 0
        self.shown: dict[int, Shown] = {layer: Shown() for layer in spec.layers}
        self.proposed: dict[int, list[int]] = {}
        """Slot -> the chain proposed for it last."""

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        """See `Drafting.propose`; one exit for all requests of a step."""
        self.rounds += 1
        self.layer, length = self.choose(max(budgets), len(contexts))
        self.shown[self.layer].last = self.rounds
        trees = super().propose(contexts, [min(budget, length) for budget in budgets])
        self.proposed = {slot_of(one): tree.tokens for one, tree in zip(contexts, trees, strict=True)}
        return trees

    def choose(self, budget: int, requests: int) -> tuple[int, int]:
        """Exit and number of tokens with the most tokens per second; now and then the exit that is longest unused."""
        oldest = min(self.shown, key=lambda layer: self.shown[layer].last)
        waited = self.rounds - self.shown[oldest].last
        if not self.shown[oldest].last or waited > self.spec.explore * len(self.shown):
            return oldest, budget
        choices = [(layer, length) for layer in self.shown for length in range(1, budget + 1)]
        return max(choices, key=lambda choice: self.tokens_per_second(choice[0], choice[1], requests))

    def tokens_per_second(self, layer: int, length: int, requests: int) -> float:
        """Of drafting `length` tokens for each request at an exit."""
        rate = min(self.shown[layer].rate, 1.0 - 1e-6)
        tokens = (1.0 - rate ** (length + 1)) / (1.0 - rate)
        below, above = (self.split.seconds[f"{part}_{layer}"] for part in ("shallow", "deep"))
        return requests * tokens / ((length + 1) * below.at(requests) + above.at(requests * (length + 1)))

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Drafting.observe`."""
        drafted = self.proposed.pop(slot_of(context), [])
        decided = [*(outcome.tree.tokens[node] for node in outcome.path), outcome.next_token]
        shown = self.shown[self.layer]
        for guess, token in zip(drafted, decided, strict=False):
            shown.accepted = self.spec.memory * shown.accepted + (guess == token)
            shown.decided = self.spec.memory * shown.decided + 1.0
            if guess != token:
                break
