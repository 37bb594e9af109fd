"""Classifiers that are one line over a row: whether it may leave the model early, whether a drafted token may stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from graft.compiled import CompiledModel
from graft.passes.judge_head import JUDGE_FORMAT, JUDGE_WEIGHTS
from graft.runtime.decoder import Rows
from graft.training.features import Sample
from graft.training.options import RUN, TrainOptions
from graft.training.steps import Figures
from graft.training.trainees import tables


class OwnParameters(nn.Module):
    """Parameters by the names of a folder."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        held = {name.replace(".", "/"): tensor.detach().float().clone() for name, tensor in tensors.items()}
        self.tensors = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in held.items()})

    def __getitem__(self, name: str) -> Tensor:
        """One of them."""
        return self.tensors[name.replace(".", "/")]

    def named(self) -> dict[str, Tensor]:
        """Parameters by their names in a folder."""
        return {name.replace("/", "."): parameter.detach() for name, parameter in self.tensors.items()}


class TrainedLine:
    """A line over rows and its binary cross entropy; what the rows are and what is right, a subclass says."""

    file: str
    names: tuple[str, str]
    """What figures call the part of the rows that is right, and the part that the line says is."""

    def __init__(self, compiled: CompiledModel, options: TrainOptions) -> None:
        self.options, matrix = options, tables(compiled)[1]
        self.dtype, self.device = matrix.dtype, matrix.device
        self.network = OwnParameters({"weight": torch.zeros(1, matrix.shape[1]), "bias": torch.zeros(1)})
        self.network.to(matrix.device)

    def rows(self, batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """float32 [rows, width] that the line reads, and bool [rows]."""
        raise NotImplementedError

    def answers(self, batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """[rows] each: the line's logit, and what is right."""
        rows, right = self.rows(batch)
        return linear(rows, self.network["weight"], self.network["bias"])[:, 0], right

    def losses(self, batch: Sequence[Sample]) -> list[Tensor]:
        """See `Trainee.losses`."""
        found, right = self.answers(batch)
        return [binary_cross_entropy_with_logits(found, right.float())]

    @torch.no_grad()
    def measure(self, held: Iterable[Sequence[Sample]]) -> Figures:
        """See `Trainee.measure`; "precision" is how often a probability above one half is right."""
        loss, found, right = 0.0, [torch.zeros(0, dtype=torch.bool)], [torch.zeros(0, dtype=torch.bool)]
        for batch in held:
            scores, truth = self.answers(batch)
            loss += float(binary_cross_entropy_with_logits(scores, truth.float(), reduction="sum"))
            found.append(scores.cpu() > 0)
            right.append(truth.cpu())
        said, truth = torch.cat(found), torch.cat(right)
        count = max(len(truth), 1)
        return {
            "places": count,
            "loss": loss / count,
            self.names[0]: round(float(truth.sum()) / count, 4),
            self.names[1]: round(float(said.sum()) / count, 4),
            "precision": round(float((said & truth).sum()) / max(float(said.sum()), 1.0), 4),
            "tokens_per_step": self.tokens_per_step(said),
        }

    def tokens_per_step(self, said: Tensor) -> float:
        """What these answers, bool [rows], promise."""
        raise NotImplementedError

    def tensors(self, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they are written."""
        return {name: tensor.to("cpu", self.dtype).contiguous() for name, tensor in best.items()}


class TrainedJudge(TrainedLine):
    """A judge head (2501.19309): whether a token may stand that the text does not have in its place.

    The paper's labels are people's: answers right and wrong, the wrong tokens marked. The label here costs nothing and
    is our own: a token in the text's place may stand if the target, going on greedily behind it, comes back to the
    text (`places`). It says that wording may differ, and nothing about truth.
    """

    file = JUDGE_WEIGHTS
    names = ("rejoined", "accepted")

    def rows(self, batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """See `TrainedLine.rows`: the final hidden states of judged tokens."""
        hidden = torch.cat([one.hidden for one in batch]).to(self.device).float()
        return hidden, torch.cat([one.labels[:, 0] for one in batch]).to(self.device) > 0

    def tokens_per_step(self, said: Tensor) -> float:
        """Of drafts of one token that plain decoding would all reject."""
        return 1 + float(said.sum()) / max(len(said), 1)

    def finished(self, best: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Trainee.finished`."""
        return {"format": JUDGE_FORMAT}, self.tensors(best)


EVERY = 4
"""Tokens from one judged place to the next."""


def places(compiled: CompiledModel, tokens: Sequence[int], options: TrainOptions) -> dict[str, Tensor]:
    """Judged tokens of one text, as features: at every `EVERY`th place another token than the text's, drawn from the
    target's `options.labels` likeliest ones, which stands for a draft's. Its hidden state, and as label 1 where the
    `options.ahead` tokens that the target likes best behind it share `RUN` in a row with the text that they replace."""
    decoder, ahead, width = compiled.decoder, options.ahead, tables(compiled)[1].shape[1]
    draws = np.random.default_rng([options.seed, *tokens])
    kept, decoder.keeps_hidden = decoder.keeps_hidden, True
    slot, done = decoder.open(), 0
    found: list[tuple[int, Tensor, int, float]] = []
    try:
        for place in range(EVERY, len(tokens) - ahead - RUN, EVERY):
            logits = step(compiled, slot, tokens[done:place], done)
            done = place
            token, share = another(logits, tokens[place], options.labels, draws)
            branch, text = [int(step(compiled, slot, [token], place).argmax())], tokens[place : place + ahead + RUN]
            assert decoder.hidden is not None
            hidden = decoder.hidden[:, :width].clone()
            while len(branch) < ahead and not rejoins(branch, text):
                branch.append(int(step(compiled, slot, branch[-1:], place + len(branch)).argmax()))
            decoder.truncate(slot, place)
            found.append((token, hidden, int(rejoins(branch, text)), share))
    finally:
        decoder.close(slot)
        decoder.keeps_hidden = kept
    states = [hidden for _, hidden, _, _ in found] or [torch.zeros(0, width)]
    columns = {"tokens": 0, "labels": 2, "shares": 3}
    data = {name: torch.tensor([one[at] for one in found]) for name, at in columns.items()}
    labels, shares = data["labels"].long()[:, None], data["shares"].float()[:, None]
    return {"tokens": data["tokens"].long(), "hidden": torch.cat(states).cpu(), "labels": labels, "shares": shares}


def step(compiled: CompiledModel, slot: int, tokens: Sequence[int], position: int) -> Tensor:
    """Logits [vocabulary] behind tokens that the slot takes."""
    rows = Rows()
    rows.add_chain(slot, list(tokens), position)
    logits = compiled.decoder.forward(rows)
    compiled.decoder.commit(slot, range(len(tokens)))
    return logits[-1]


def another(logits: Tensor, token: int, count: int, draws: np.random.Generator) -> tuple[int, float]:
    """A token drawn from the `count` likeliest ones but this one, and its probability among all."""
    best = logits.float().softmax(-1).topk(min(count + 1, len(logits)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    others = [(one, share) for one, share in pairs if one != token][:count]
    weights = np.array([share for _, share in others])
    chosen = int(draws.choice(len(others), p=weights / weights.sum())) if weights.sum() > 0 else 0
    return others[chosen]


def rejoins(branch: Sequence[int], text: Sequence[int]) -> bool:
    """Whether `RUN` tokens in a row of one stand in the other."""
    own = {tuple(text[at : at + RUN]) for at in range(len(text) - RUN + 1)}
    return any(tuple(branch[at : at + RUN]) in own for at in range(len(branch) - RUN + 1))
