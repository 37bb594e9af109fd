"""The contracts between whatever drafts tokens, shapes them into a tree, verifies them, and decides how many.

A method is a tuple of these small objects (docs/how-it-works.md); which tuples keep the output's distribution is a
type check between `Drafter.kind` and `Verifier.lossless_for`, not a convention.

Every class here is a *spec*: a frozen dataclass that belongs to a plan and holds no state. `open` returns the object
that holds the state of one compiled model or one generate() call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from graft.compiler.passing import Pass

DraftKind = Literal["deterministic", "independent", "without-replacement", "mixed"]
"""How the children of a tree node were drawn: a function of the context alone (so q is one-hot), independent samples
from q, samples from q without replacement in the order kept, or by several drafters of which at least one draws."""

HiddenRows = Literal["no", "rows", "all"]
"""Which of the target's final hidden states a drafter reads: none, those of every verification step, or those of the
prompt too."""

ROOT = -1
"""The parent of a draft tree's first level: the last token of the context, which the target has not run yet."""


@dataclass
class Context:
    """One request as a drafter sees it. `tokens` is prompt and output, the root last; `prompt_length` counts tokens."""

    tokens: list[int]
    prompt_length: int
    data: dict[str, object] = field(default_factory=dict)
    """Per-request state of drafters and controllers, each under a key of its own; dropped with the request."""
    pace: float = 0.0
    """Tokens per second lately, as the controller sees it: what time is worth. 0 where that is not known."""


@dataclass
class DraftTree:
    """Drafted tokens, the root not among them.

    `parents[i] < i` indexes into the tree, or is ROOT. `probabilities[i]` estimates that node i is accepted given that
    its parent was. Siblings hold different tokens unless the kind is "independent". `q[p]` is the distribution
    (float64 [vocabulary]) that the children of node p were drawn from, for kinds that draw: the first one where they
    were drawn without replacement, in the order of their indices.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    kind: DraftKind = "deterministic"
    q: dict[int, np.ndarray] = field(default_factory=dict)
    noise: Callable[[int, int], float] | None = field(default=None, repr=False, compare=False)
    """(node, rank) -> a number in [0, 1) of its own for that child, where drafts are drawn: for policies that draw."""

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, probability: float) -> int:
        """Append a node and return its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.probabilities.append(probability)
        return len(self.tokens) - 1

    def path(self, node: int) -> list[int]:
        """Indices from the first level down to `node`; empty for ROOT."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def select(self, nodes: Sequence[int]) -> DraftTree:
        """The tree of these nodes alone, in this order; with every node its parent, and before it."""
        index = {ROOT: ROOT} | {node: i for i, node in enumerate(nodes)}
        return DraftTree(
            [self.tokens[node] for node in nodes],
            [index[self.parents[node]] for node in nodes],
            [self.probabilities[node] for node in nodes],
            self.kind,
            {index[node]: q for node, q in self.q.items() if node in index},
        )

    def children(self) -> dict[int, list[int]]:
        """Node index (ROOT included) -> indices of its children, in drafting order; leaves are absent."""
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            children.setdefault(parent, []).append(node)
        return children


@dataclass
class Outcome:
    """What one verification step showed.

    `path` is the accepted nodes from the root down; `next_token` follows them and is the next root. `best`, where a
    drafter asked for it by `observes`, is int64 [1 + len(tree), observes]: the target's best tokens at the root (row
    0) and at every node (row i + 1), best first. `hidden`, where a drafter asked for it by `reads_hidden`, is
    [1 + len(tree), width] in the model's dtype: what the unembedding reads at the root and at every node; of the first
    outcome of a request [1, width], at the last token of the prompt.
    """

    tree: DraftTree
    path: list[int]
    next_token: int
    best: np.ndarray | None = None
    hidden: Tensor | None = None


Candidates = list[tuple[int, float]]
"""Possible next tokens with estimated acceptance probability, most probable first, no token twice.

Where drafts are drawn: (token, q[token]) in the order drawn. A policy takes as many as it likes, from the first on; a
token may come again if the draws are independent.
"""

Growth = Generator[list[int], list[Candidates], DraftTree]
"""A tree being grown: yields the nodes whose candidates it wants next, is sent one list for each, returns the tree.

The nodes index into the tree that was handed to `TreePolicy.grow`, which holds every node by the time it is yielded.
The tree returned is that one or a selection of it.
"""


class Drafting(Protocol):
    """The state of a drafter during one generate() call, over any number of requests."""

    def begin(self, context: Context, prompt_best: np.ndarray | None, prompt_hidden: Tensor | None = None) -> None:
        """A request starts. `prompt_best` is int64 [prompt tokens, observes] where `observes_prompt`, else None;
        `prompt_hidden` [prompt tokens, width] where `reads_hidden` is "all", else None."""

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        """One tree for each context, with at most that many nodes; an empty tree where nothing is worth drafting."""
        ...

    def observe(self, context: Context, outcome: Outcome) -> None:
        """The step is decided and `context.tokens` already ends with `outcome.next_token`.

        The outcome's tree is the one that was verified, which may be larger or smaller than what this drafter proposed.
        The first call of a request has an empty tree: it shows the token that follows the prompt.
        """

    def end(self, context: Context) -> None:
        """The request is finished, or generate() was interrupted. Called once for every begin."""


@dataclass(frozen=True)
class Drafter(ABC):
    """Proposes tokens; never changes the output."""

    @property
    def kind(self) -> DraftKind:
        """How it draws what it proposes."""
        return "deterministic"

    @property
    def observes(self) -> int:
        """How many of the target's best tokens per row `observe` wants to see; 0 where none."""
        return 0

    @property
    def observes_prompt(self) -> bool:
        """Whether `begin` wants the target's best tokens at every prompt position; that costs prefill time."""
        return False

    @property
    def reads_hidden(self) -> HiddenRows:
        """Which of the target's hidden states it wants to see."""
        return "no"

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Its graph part: passes of contract lossless that add the functions it drafts with. compile() runs them with
        the target's own, where the facts that they require hold."""
        return ()

    @abstractmethod
    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        """State for one generate() call against `target`."""


class Target(Protocol):
    """What a drafter may know about the model it drafts for."""

    vocabulary: int
    """Number of tokens that logits are over."""
    max_positions: int | None

    shared: dict[str, object]
    """State that belongs to the compiled model and outlives a generate() call, keyed by the drafter's spec."""

    def best_after(self, tokens: Sequence[int], count: int) -> np.ndarray:
        """int64 [tokens, count]: the model's best next tokens, best first, after each of the tokens alone."""
        ...

    def own_text(self, tokens: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Texts that the model writes by itself, int64 [texts, length], of at least so many tokens in all, the same
        whenever it is asked; and its best next tokens at every place, best first, int64 [texts, length, count]."""
        ...

    @property
    def functions(self) -> Mapping[str, Any]:
        """What runs the program's other functions, by name: a graft.runtime.decoder.Decoder each."""


@dataclass(frozen=True)
class TreePolicy(ABC):
    """The shape of the draft tree."""

    @abstractmethod
    def branches(self, kind: DraftKind) -> bool:
        """Whether a node may get more than one child in a tree of this kind."""

    @abstractmethod
    def grow(self, tree: DraftTree, budget: int, *, by_level: bool = False) -> Growth:
        """Grow the empty `tree` to at most `budget` nodes, in the way that is right for `tree.kind`.

        Where drafts are drawn, whether to keep a node must depend neither on its own token, nor on siblings drawn after
        it, nor on anything below these: dropping unlikely samples after the fact would change q. It may depend on
        whatever else was drawn, and siblings keep the order in which they were drawn.

        `by_level` asks for the candidates of a whole level at once, for drafters that pay for every question with a run
        of a model; several requests can then be grown in lockstep.
        """


class Rows(Protocol):
    """The target's view of one verification step, row by row; row 0 is the root, row i + 1 is node i."""

    def argmax(self, row: int) -> int:
        """The best token after the logits processors; ties go to the lowest id."""
        ...

    def distribution(self, row: int) -> np.ndarray:
        """float64 [vocabulary], sums to 1: softmax of the processed logits."""
        ...

    def choice(self, row: int, uniforms: Uniforms) -> int:
        """The token that plain decoding puts behind the row: the best one, or the one sampled there."""
        ...

    def score(self, row: int) -> float:
        """What the function that the verifier's passes added says of the row (`Verifier.passes`)."""
        ...


class Uniforms(Protocol):
    """Counter-based random numbers of one request: a function of (seed, stream, counter) and nothing else."""

    def uniform(self, stream: str, counter: int) -> float:
        """A float64 in [0, 1)."""
        ...


@dataclass(frozen=True)
class Verifier(ABC):
    """The acceptance rule."""

    lossless_for: ClassVar[frozenset[DraftKind]] = frozenset()
    """Draft kinds for which a sampled output keeps the target's distribution exactly; empty for a lossy rule."""

    lossless_for_greedy: ClassVar[frozenset[DraftKind]] = frozenset()
    """Draft kinds for which a greedy output is exactly the target's best tokens."""

    chains_only: ClassVar[bool] = False
    """Whether the rule is for trees in which no node has two children."""

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Its graph part: passes of contract lossless that add a function of hidden states, which scores rows, and have
        the host program run it behind the target (host.scored_host). compile() runs them after the drafters', in a plan
        that drafts."""
        return ()

    @abstractmethod
    def verify(self, tree: DraftTree, rows: Rows, uniforms: Uniforms, position: int) -> tuple[list[int], int]:
        """The accepted path (node indices from the first level down) and the token that follows it.

        `position` is the index of the first undecided token in the sequence; the token at depth d of the path is
        decided by the random numbers of counter `position + d`, so that a token's randomness depends on its place in
        the text alone.
        """


class Control(Protocol):
    """The state of a controller during one generate() call."""

    def budget(self, context: Context) -> int:
        """How many nodes to draft for this request in the coming step; 0 for none."""
        ...

    def keep(self, context: Context, tree: DraftTree) -> DraftTree:
        """The part of a drafted tree that is verified. What is kept of drawn drafts must not depend on the tokens."""
        ...

    def observe(self, context: Context, outcome: Outcome) -> None:
        """Learn from a decided step."""


@dataclass(frozen=True)
class Controller(ABC):
    """How much to draft."""

    @abstractmethod
    def open(
        self, max_nodes: int, step_seconds: Callable[[int], float], draft_seconds: Callable[[], float]
    ) -> Control:
        """`step_seconds(T)` is the measured time of one target step over T rows, the root included,
        `draft_seconds()` what drafting has taken lately in a step with drafts."""
