"""Running a function on sequences with its operators' reference meaning, whatever its signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.compiler.ops import NO_PARENT
from graft.compiler.program import Function, Input

Sequences = tuple[tuple[int, ...], ...]
"""Token ids of sequences of any lengths, none empty."""


@dataclass(frozen=True)
class Sample:
    """The text on which contracts are checked."""

    sequences: Sequences
    origin: str
    """Where it comes from, as reports say it: "the plan's sample", "text sampled by the model itself, seed 0"."""

    @property
    def description(self) -> str:
        """E.g. "13 tokens of text sampled by the model itself, seed 0"."""
        return f"{sum(map(len, self.sequences))} tokens of {self.origin}"


def logits_of(function: Function, sequences: Sequences, module: Callable[..., Any] | None = None) -> list[Tensor]:
    """Logits [length, vocabulary] after every token of each sequence, float32 (float64 for a float64 model).

    A dense function gets all sequences as one padded batch. A flat one gets all tokens but each sequence's last in one
    call on an empty state; the last ones follow in a second call, each behind a sibling with another token, so that
    reading the cache and keeping the branches of a tree apart count too. `module` is what runs in its place.
    """
    with torch.no_grad():
        return (flat_logits if function.flat else dense_logits)(function, module or function.run, sequences)


def dense_logits(function: Function, module: Callable[..., Any], sequences: Sequences) -> list[Tensor]:
    """One padded batch; attention is causal, so what stands behind a sequence does not reach it."""
    device = function.device
    longest = max(map(len, sequences))
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    positions = torch.arange(longest).expand(len(sequences), -1).contiguous()
    logits, *_ = module(tokens.to(device), positions.to(device))
    return [wide(logits[row, : len(sequence)]) for row, sequence in enumerate(sequences)]


def flat_logits(function: Function, module: Callable[..., Any], sequences: Sequences) -> list[Tensor]:
    """Two calls on slots in reverse order, so that a slot is not by chance its sequence's number."""
    device = function.device
    slots = list(reversed(range(len(sequences))))
    capacity = max(map(len, sequences)) + 1
    sizes = {"S": len(slots), "C": capacity, "G": 1, "P": 1}
    states = [zeros(state.input, sizes, device) for state in function.states]
    lengths = [0] * len(slots)
    found: list[list[Tensor]] = [[] for _ in sequences]
    for first in (True, False):
        rows: list[tuple[int, int, int, int]] = []
        wanted: list[tuple[int, int]] = []
        for index, (slot, sequence) in enumerate(zip(slots, sequences, strict=True)):
            last = len(sequence) - 1
            if first:
                wanted += [(index, len(rows) + place) for place in range(last)]
                start = len(rows)
                rows += [(sequence[p], p, slot, start + p - 1 if p else NO_PARENT) for p in range(last)]
            else:
                rows += [(sequence[0], last, slot, NO_PARENT), (sequence[last], last, slot, NO_PARENT)]
                wanted.append((index, len(rows) - 1))
                lengths[slot] = last
        if not rows:
            continue
        columns = [*zip(*rows, strict=True), lengths, [row for _, row in wanted]]
        tokens, positions, owners, parents, committed, results = (
            torch.tensor(column, dtype=torch.int64, device=device) for column in columns
        )
        # Nothing is far: the tail has all of a text.
        far = [
            committed if spec.name == f"{state.name}_lengths" else zeros(spec, sizes, device)
            for state in function.states
            for spec in state.far_inputs
        ]
        logits, _, *states = module(tokens, positions, owners, parents, committed, results, *states, *far)
        for (index, _), row in zip(wanted, logits, strict=True):
            found[index].append(wide(row))
    return [torch.stack(rows) for rows in found]


def zeros(spec: Input, sizes: Mapping[str, int], device: torch.device) -> Tensor:
    """An input full of zeros."""
    shape = [sizes[size] if isinstance(size, str) else size for size in spec.sizes]
    return torch.zeros(shape, dtype=spec.dtype, device=device)


def wide(logits: Tensor) -> Tensor:
    """The logits in float32, or float64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def vocabulary(function: Function) -> int:
    """Number of tokens that the function's logits are over."""
    return int(function.output.args[0][0].meta["val"].shape[-1])


def divergence(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean over all tokens of KL(before || after) in nats, from logits [length, vocabulary] of each sequence."""
    total = [
        torch.nn.functional.kl_div(new.log_softmax(-1), old.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        for old, new in zip(before, after, strict=True)
    ]
    return max(0.0, torch.cat(total).mean().item())


def agreement(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Share of all tokens behind which both have the same best token, from logits [length, vocabulary] of each
    sequence."""
    same = [old.argmax(-1) == new.argmax(-1) for old, new in zip(before, after, strict=True)]
    return torch.cat(same).double().mean().item()


def own_sample(function: Function, lengths: Sequence[int] = (8, 5), seed: int = 0) -> Sample:
    """Text that the function itself samples, at temperature 1: sequences of these lengths, each from a first token
    drawn uniformly. The same function and seed always give the same text."""
    generator = torch.Generator().manual_seed(seed)
    size = vocabulary(function)
    sequences = [[int(torch.randint(size, (1,), generator=generator))] for _ in lengths]
    for step in range(1, max(lengths)):
        growing = [sequence for sequence, length in zip(sequences, lengths, strict=True) if length > step]
        for sequence, logits in zip(growing, logits_of(function, tuple(map(tuple, growing))), strict=True):
            probabilities = logits[-1].double().softmax(-1).cpu()
            # A model whose logits are not finite samples nothing; any token shows that as well as another.
            usable = bool(probabilities.isfinite().all())
            sequence.append(int(torch.multinomial(probabilities, 1, generator=generator)) if usable else 0)
    return Sample(tuple(map(tuple, sequences)), f"text sampled by the model itself, seed {seed}")
