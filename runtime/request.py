"""One sequence being generated, and the target's answer about it in one step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from graft.compiler.drafting import Context, DraftTree, Uniforms
from graft.compiler.errors import GenerationError
from graft.runtime.random import Streams
from graft.runtime.verifiers import draw

SAMPLING = "sampling"
"""Key of `Context.data` under which the request's `Sampling` stands, for drafters that draw as the target does."""

SLOT = "slot"
"""Key of `Context.data` under which the request's slot in the target's KV store stands, for drafters that share it."""


def slot_of(context: Context) -> int:
    """The request's slot in the target's KV store."""
    slot = context.data[SLOT]
    assert isinstance(slot, int)
    return slot


class Sampling:
    """How a request chooses tokens: logits processors, whether it samples, and its random numbers."""

    def __init__(self, row: int, prompt_length: int, processors: LogitsProcessorList, sample: bool, seed: int) -> None:
        self.row, self.prompt_length, self.processors, self.sample = row, prompt_length, processors, sample
        self.uniforms: Uniforms = Streams(seed)
        self._ids = torch.zeros(1, 0, dtype=torch.int64)
        self._known = 0

    def scores(self, logits: Tensor, tokens: list[int], path: list[int]) -> Tensor:
        """Logits [1, vocabulary] after `tokens` and `path`, processed; float32, and not the tensor passed in.

        `tokens` is what the request has committed and only ever grows.
        """
        scores = logits.to(torch.float32, copy=True)
        if not self.processors:
            return scores
        processors: Callable[[Tensor, Tensor], Tensor] = cast(Any, self.processors)
        return processors(self.prefix(tokens, path, logits.device), scores)

    def prefix(self, tokens: list[int], path: list[int], device: torch.device) -> Tensor:
        """int64 [1, length], a fresh tensor; what is committed is kept as a tensor between calls."""
        if self._ids.device != device:
            self._ids = self._ids.to(device)
        if len(tokens) > self._ids.shape[1]:
            grown = torch.zeros(1, 2 * len(tokens), dtype=torch.int64, device=device)
            grown[:, : self._known] = self._ids[:, : self._known]
            self._ids = grown
        if len(tokens) > self._known:
            self._ids[0, self._known : len(tokens)] = torch.tensor(tokens[self._known :], device=device)
            self._known = len(tokens)
        return torch.cat([self._ids[:, : self._known], torch.tensor([path], dtype=torch.int64, device=device)], dim=1)

    def best(self, scores: Tensor, position: int) -> int:
        """The best token of processed scores [1, vocabulary]; `position` is where it would stand in the text."""
        best = int(scores.argmax(-1))
        self.check(float(scores[0, best]), position)
        return best

    def distribution(self, scores: Tensor, position: int) -> np.ndarray:
        """float64 [vocabulary] that a token at `position` is drawn from; greedy decoding puts it all on the best."""
        if not self.sample:
            one_hot = np.zeros(scores.shape[-1])
            one_hot[self.best(scores, position)] = 1.0
            return one_hot
        row = scores[0].cpu().numpy()
        # Top-k and top-p leave few tokens; exp over the others would be most of the time. NaN is not ruled out here.
        kept = np.flatnonzero(row != -np.inf)
        weights = row[kept].astype(np.float64)
        peak = weights.max() if len(weights) else -math.inf
        self.check(float(peak), position)
        np.exp(weights - peak, out=weights)
        distribution = np.zeros(len(row))
        distribution[kept] = weights / weights.sum()
        return distribution

    def check(self, value: float, position: int) -> None:
        """Raise GenerationError if the best logit says that there is no token to choose."""
        if not math.isnan(value) and (value != math.inf or not self.sample) and value != -math.inf:
            return
        raise GenerationError(
            "the model returned no usable logits" if not self.processors else "no token can be chosen",
            expected="at least one finite logit, and none that is NaN",
            found="NaN" if math.isnan(value) else "only -inf" if value < 0 else "+inf",
            where=f"sequence {self.row}, new token {position - self.prompt_length + 1}, position {position}",
            remedy="look at the model's weights and dtype" + (", and the logits processors" if self.processors else ""),
        )


@dataclass
class Request:
    """The state of one sequence; `context.tokens` is its text."""

    row: int
    """Its place in the batch."""
    context: Context
    sampling: Sampling
    limit: int
    """Length of the text at which it ends."""
    slot: int
    fed: int = 0
    """Prompt tokens that the KV cache holds."""
    finished: bool = False
    begun: bool = False
    """Whether the drafter knows it."""
    open: bool = True
    """Whether it holds its slot."""
    prompt_best: list[np.ndarray] = field(default_factory=list)
    prompt_hidden: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    """Processed logits [vocabulary] of every new token, where the call asked for them."""
    logits: list[Tensor] = field(default_factory=list)
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def in_prompt(self) -> bool:
        """Whether part of the prompt is still to be run."""
        return self.fed < self.context.prompt_length

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.context.tokens) - self.context.prompt_length


class TargetRows:
    """compiler.drafting.Rows of one request in one step; processors run for the rows that are asked for, once each."""

    def __init__(
        self,
        request: Request,
        tree: DraftTree,
        logits: Tensor,
        first: int,
        best: tuple[list[int], list[float]] | None,
        judged: list[float] | None = None,
    ) -> None:
        """`logits` float32 [rows of the call, vocabulary], of which `first` is the root's; `best` argmax and maximum of
        all of them, where there are no processors and tokens are not sampled; `judged` what the verifier's function
        says of all of them."""
        self.request, self.tree, self.logits, self.first, self.best_tokens = request, tree, logits, first, best
        self.judged = judged
        self.processed: dict[int, Tensor] = {}
        self.distributions: dict[int, np.ndarray] = {}

    def argmax(self, row: int) -> int:
        """See compiler.drafting.Rows."""
        if self.best_tokens is None:
            return self.request.sampling.best(self.scores(row), self.position(row))
        tokens, peaks = self.best_tokens
        peak = peaks[self.first + row]
        if not peak > -math.inf:
            self.request.sampling.check(peak, self.position(row))
        return tokens[self.first + row]

    def distribution(self, row: int) -> np.ndarray:
        """See compiler.drafting.Rows."""
        found = self.distributions.get(row)
        if found is None:
            found = self.request.sampling.distribution(self.scores(row), self.position(row))
            self.distributions[row] = found
        return found

    def choice(self, row: int, uniforms: Uniforms) -> int:
        """See compiler.drafting.Rows; takes the stream "sample"."""
        if not self.request.sampling.sample:
            return self.argmax(row)
        return draw(self.distribution(row), uniforms.uniform("sample", self.position(row)))

    def score(self, row: int) -> float:
        """See compiler.drafting.Rows."""
        assert self.judged is not None
        return self.judged[self.first + row]

    def raw(self, row: int) -> Tensor:
        """Logits [1, vocabulary] as the model gave them."""
        return self.logits[self.first + row : self.first + row + 1]

    def scores(self, row: int) -> Tensor:
        """Processed logits [1, vocabulary]."""
        found = self.processed.get(row)
        if found is None:
            path = [self.tree.tokens[node] for node in self.tree.path(row - 1)]
            found = self.request.sampling.scores(self.raw(row), self.request.context.tokens, path)
            self.processed[row] = found
        return found

    def position(self, row: int) -> int:
        """Index in the text of the token that follows the row."""
        return len(self.request.context.tokens) + len(self.tree.path(row - 1))
