"""The best tokens of rows of logits.

On the CPU by numpy, in the calling thread: torch would share the work out to its thread pool, whose threads go on
spinning when they are done and take a core from the next step. And numpy's argmax is a vectorised pass, where
torch.topk visits every logit with its index: a maximum over parts of the vocabulary says which few to look at.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PARTS = 64
"""The vocabulary as so many stretches, of which maxima are taken place by place."""


def argmax_rows(logits: Tensor) -> tuple[list[int], list[float]]:
    """The best token of each row of [rows, vocabulary] and its logit; ties go to the lowest id, NaN counts as best."""
    if logits.device.type != "cpu":
        best = logits.argmax(-1, keepdim=True)
        return best[:, 0].tolist(), logits.gather(1, best)[:, 0].tolist()
    values = logits.detach().numpy()
    tokens = values.argmax(1)
    return tokens.tolist(), values[np.arange(len(values)), tokens].tolist()


def top_rows(logits: Tensor, count: int) -> Tensor:
    """int64 [rows, count]: the ids of the best tokens of each row of [rows, vocabulary], best first."""
    rows, vocabulary = logits.shape
    places = vocabulary // PARTS
    if logits.device.type != "cpu" or places <= 2 * count:
        return logits.topk(min(count, vocabulary)).indices
    values, whole = logits.detach().numpy(), places * PARTS
    maxima = values[:, :whole].reshape(rows, PARTS, places).max(1)
    chosen = np.argpartition(maxima, places - count, axis=1)[:, places - count :]
    ids = (np.arange(PARTS)[None, :, None] * places + chosen[:, None, :]).reshape(rows, -1)
    if whole < vocabulary:
        tail = np.broadcast_to(np.arange(whole, vocabulary), (rows, vocabulary - whole))
        ids = np.concatenate([ids, tail], 1)
    candidates = np.take_along_axis(values, ids, 1)
    best = np.argpartition(-candidates, count - 1, axis=1)[:, :count]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(candidates, best, 1), axis=1, kind="stable"), 1)
    return torch.from_numpy(np.take_along_axis(ids, best, 1))


def shares_of(logits: Tensor, tokens: Tensor) -> np.ndarray:
    """[rows, count]: the probabilities of some tokens, the first of which is the best of its row."""
    values, ids = logits.detach().cpu().numpy(), tokens.cpu().numpy()
    chosen = values[np.arange(len(ids))[:, None], ids]
    apart = values - chosen[:, :1]
    np.exp(apart, out=apart)
    shares: np.ndarray = np.exp(chosen - chosen[:, :1]) / apart.sum(1, keepdims=True)
    return shares
