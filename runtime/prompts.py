"""The prompts of a generate() call: rows of token ids, with padding on the left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.compiler.errors import GenerationError

WHERE = "generate()"


@dataclass(frozen=True)
class Prompts:
    """`input_ids` int64 [batch, width] as given; `tokens` the rows without padding."""

    input_ids: Tensor
    tokens: list[list[int]]


def read_prompts(arguments: dict[str, Any], config: Any, vocabulary: int, max_positions: int | None) -> Prompts:
    """Prompts from `inputs` or `input_ids` and `attention_mask`; `config` is the merged GenerationConfig.

    Without a mask, padding is inferred as transformers does: pad tokens, where pad is not an eos token. Raises
    GenerationError, naming the sequence, for an empty prompt, one longer than the model's positions, a token outside
    the vocabulary, and padding that is not on the left.
    """
    ids = prompt_ids(arguments, config)
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        expected = f"a tensor {list(ids.shape)}"
        raise GenerationError("attention_mask does not fit", expected=expected, found=found, where=WHERE)
    kept = (mask != 0) if mask is not None else inferred_mask(ids, config)
    rows = []
    for row, (line, keep) in enumerate(zip(ids.tolist(), kept.tolist(), strict=True)):
        tokens = line[keep.index(True) :] if True in keep else []
        if not all(keep[len(keep) - len(tokens) :]):
            raise GenerationError(
                "padding must stand on the left, in one piece",
                expected="attention_mask of zeros, then ones" if mask is not None else "pad tokens at the start alone",
                found="padding on the right" if not keep[-1] else "padding between tokens",
                where=f"sequence {row}",
                remedy="tokenizer.padding_side = 'left'" if mask is not None else "pass attention_mask",
            )
        check_prompt(row, tokens, vocabulary, max_positions)
        rows.append(tokens)
    if not rows:
        raise GenerationError("there is no prompt", expected="at least one sequence", found="a batch of 0", where=WHERE)
    return Prompts(ids, rows)


def prompt_ids(arguments: dict[str, Any], config: Any) -> Tensor:
    """int64 [batch, width]; a single bos token where no prompt is given."""
    if "inputs" in arguments and "input_ids" in arguments:
        raise GenerationError("inputs and input_ids are the same argument", where=WHERE, remedy="pass one")
    ids = arguments.get("inputs", arguments.get("input_ids"))
    if ids is None:
        if config.bos_token_id is None:
            raise GenerationError("there is no prompt, and no bos token", where=WHERE, remedy="pass input_ids")
        return torch.tensor([[int(config.bos_token_id)]])
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise GenerationError(
            "input_ids are not token ids",
            expected="an integer tensor [batch, length]",
            found=found,
            where=WHERE,
            remedy='generate(**tokenizer(text, return_tensors="pt"))',
        )
    return ids.long()


def inferred_mask(ids: Tensor, config: Any) -> Tensor:
    """bool [batch, width]: True where a token is no padding."""
    ends = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()
    if config.pad_token_id is None or int(config.pad_token_id) in ends:
        return torch.ones_like(ids, dtype=torch.bool)
    return ids != int(config.pad_token_id)


def check_prompt(row: int, tokens: list[int], vocabulary: int, max_positions: int | None) -> None:
    """Raise GenerationError for a prompt that the model cannot be run on."""
    where = f"sequence {row}"
    if not tokens:
        raise GenerationError("the prompt is empty", expected="at least one token", found="none", where=where)
    if max_positions is not None and len(tokens) > max_positions:
        raise GenerationError(
            "the prompt is longer than the model's positions",
            expected=f"at most {max_positions} tokens",
            found=f"{len(tokens)} tokens",
            where=where,
            remedy="shorten the prompt",
        )
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocabulary:
        raise GenerationError(
            "a token is not in the vocabulary",
            expected=f"ids from 0 to {vocabulary - 1}",
            found=low if low < 0 else high,
            where=where,
        )
