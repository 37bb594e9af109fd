"""Growing trees by a drafter that feeds its own features back: EAGLE-3."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graft.compiler.drafting import ROOT, Candidates, Context, Outcome, TreePolicy
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.drafters.text_rows import DraftTokens, TextRows
from graft.runtime.drafters.with_function import FunctionDrafting, Growing


class FeatureHeads(FunctionDrafting):
    """The first function reads the target's streams over the text, the second what was made of the row before; both
    keep their rows in one KV, whose rows of drafted tokens are cut off when the tree is grown."""

    def __init__(self, key: str, says: DraftTokens, levels: Sequence[Decoder], policy: TreePolicy) -> None:
        """`levels` are the two functions, `key` is that of the requests' state."""
        text, deeper = levels
        super().__init__(deeper, policy, candidates=says.count, kind="deterministic")
        deeper.keeps_hidden = True
        self.text, self.says = TextRows(text, key), says
        self.features: dict[int, dict[int, Tensor]] = {}
        """Of the trees that grow, by slot: [1, width] for each node that was run."""

    def begin(self, context: Context, prompt_best: np.ndarray | None, prompt_hidden: Tensor | None = None) -> None:
        """See `Drafting.begin`; the prompt's hidden states are run with the first proposal."""
        self.text.begin(context, prompt_hidden)

    def observe(self, context: Context, outcome: Outcome) -> None:
        """See `Drafting.observe`; what was accepted is run with the next proposal."""
        self.text.observe(context, outcome)

    def end(self, context: Context) -> None:
        """See `Drafting.end`."""
        self.text.end(context)

    def slot(self, context: Context) -> int:
        """See `FunctionDrafting.slot`."""
        return self.text.held(context).slot

    def catch_up(self, contexts: Sequence[Context]) -> list[Tensor]:
        """See `FunctionDrafting.catch_up`."""
        texts = self.text.run(contexts)
        self.features = {text.slot: {ROOT: text.hidden} for text in texts}
        return [text.logits for text in texts]

    def text_rows(self, context: Context) -> int:
        """The last token of the text stands in the row of the hidden state before it."""
        return len(context.tokens) - 1

    def settle(self, context: Context) -> None:
        """Only the rows that read the target's streams stay."""
        self.decoder.truncate(self.slot(context), self.text_rows(context))
        self.features.pop(self.slot(context), None)

    def run_nodes(self, rows: Rows, nodes: Sequence[tuple[Growing, int]]) -> Tensor:
        """Each row reads the feature of the node above its own, and leaves one."""
        above = [self.features[one.slot][one.tree.parents[node]] for one, node in nodes]
        logits, features = self.decoder.forward(rows, torch.cat(above)), self.decoder.hidden
        assert features is not None
        for row, (one, node) in enumerate(nodes):
            self.features[one.slot][node] = features[row : row + 1]
        return logits

    def best(self, one: Growing, logits: Tensor) -> list[Candidates]:
        """See `FunctionDrafting.best`."""
        return self.says.best(logits)
