"""The loss of draft heads on sequences, and the figures of heads on sequences they were not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graft.training.features import Sample
from graft.training.networks import HeadsNetwork

Figures = dict[str, Any]


def batches(samples: Sequence[Sample], tokens: int) -> Iterator[list[Sample]]:
    """Consecutive sequences of about so many tokens."""
    held: list[Sample] = []
    for one in samples:
        held.append(one)
        if sum(len(other.tokens) for other in held) >= tokens:
            yield held
            held = []
    if held:
        yield held


class Places:
    """The rows of a batch on which all heads are asked: where the hidden state stands, and what follows it."""

    def __init__(self, network: HeadsNetwork, batch: Sequence[Sample], embedding: Tensor) -> None:
        heads, device = network.config.heads, embedding.device
        starts, place = list[int](), 0
        for one in batch:
            starts += range(place, place + len(one.tokens) - heads - 1)
            place += len(one.tokens)
        self.rows = torch.tensor(starts, dtype=torch.int64, device=device)
        self.tokens = torch.cat([one.tokens for one in batch]).to(device)
        self.labels = torch.cat([one.labels for one in batch]).to(device)
        self.shares = torch.cat([one.shares for one in batch]).to(device)
        self.states = network.read([one.hidden.to(device).float() for one in batch])[self.rows]
        self.embedding = embedding

    def logits(self, network: HeadsNetwork, head: int) -> Tensor:
        """[rows, v] of a head, the tokens behind the hidden state being those of the text."""
        embedded = []
        if network.config.kind == "hydra":
            embedded = [self.embedding[self.tokens[self.rows + 1 + back]] for back in range(head + 1)]
        return network.logits(head, self.states, embedded)


def losses(network: HeadsNetwork, batch: Sequence[Sample], embedding: Tensor, draft_id: Tensor) -> list[Tensor]:
    """Of each head the cross entropy with what the target says at its place, over the tokens that heads draft; what
    the target gives to other tokens counts for nothing."""
    places, found = Places(network, batch, embedding), []
    for head in range(network.config.heads):
        logits = places.logits(network, head)
        ids, shares = draft_id[places.labels[places.rows + 1 + head]], places.shares[places.rows + 1 + head]
        weights = shares * (ids >= 0)
        scores = logits.log_softmax(-1).gather(1, ids.clamp_min(0))
        found.append(-(weights * scores).sum() / weights.sum().clamp_min(1e-9))
    return found


@torch.no_grad()
def measure(
    network: HeadsNetwork, held: Iterable[Sequence[Sample]], embedding: Tensor, draft_id: Tensor, width: int = 4
) -> Figures:
    """Loss, top-1 and top-`width` of each head, and simulated tokens per step: one, and each head's as long as all
    before it had the target's best token first (`tokens_per_step`) or among their best (`with_tree`)."""
    heads, count = network.config.heads, 0
    loss, first, among = torch.zeros(heads), torch.zeros(heads), torch.zeros(heads)
    chain = tree = 0.0
    for batch in held:
        places = Places(network, batch, embedding)
        rows = len(places.rows)
        if not rows:
            continue
        alive, alive_among = torch.ones(rows, dtype=torch.bool), torch.ones(rows, dtype=torch.bool)
        for head, one in enumerate(losses(network, batch, embedding, draft_id)):
            best = places.logits(network, head).topk(min(width, network.config.vocabulary)).indices
            right = draft_id[places.labels[places.rows + 1 + head, 0]]
            hits = ((best == right[:, None]) & (right >= 0)[:, None]).cpu()
            loss[head] += float(one) * rows
            first[head] += hits[:, 0].sum()
            among[head] += hits.any(1).sum()
            alive, alive_among = alive & hits[:, 0], alive_among & hits.any(1)
            chain, tree = chain + float(alive.sum()), tree + float(alive_among.sum())
        count += rows
    count = max(count, 1)
    return {
        "places": count,
        "loss": float(loss.sum() / count),
        "top_1": [round(float(hits) / count, 4) for hits in first],
        f"top_{width}": [round(float(hits) / count, 4) for hits in among],
        "tokens_per_step": 1 + chain / count,
        "with_tree": 1 + tree / count,
    }
