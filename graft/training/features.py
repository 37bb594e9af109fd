"""What heads are trained on: sequences with the target's hidden states and distributions, computed once, in shards.

The target's own text comes from batched generation by the compiled model, its hidden states and distributions from
one run of the compiled model over each sequence. A shard is one safetensors file of some thousand tokens, so that
memory is bounded by a shard whatever the length of the text; a shard that is there is not computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.compiled import CompiledModel
from graft.compiler.errors import CheckpointError
from graft.passes.heads.taps import tapped
from graft.runtime.decoder import Rows

SHARD = 8192
"""Tokens of a shard, about."""
ROWS = 256
"""Tokens of one call of the target at most; bounds the logits that are held."""
TOGETHER = 8
"""Prompts that are continued at once."""


@dataclass(frozen=True)
class Texts:
    """Token ids: documents as they are, prompts for the target to continue."""

    documents: tuple[tuple[int, ...], ...] = ()
    prompts: tuple[tuple[int, ...], ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(json.dumps([self.documents, self.prompts]).encode()).hexdigest()


@dataclass
class Sample:
    """One sequence of a shard."""

    tokens: Tensor
    """int64 [length]: the text; for a judge the tokens that are judged."""
    hidden: Tensor
    """[length, width]: the final hidden states, or the stream at an exit."""
    labels: Tensor
    """int64 [length, k]: the target's likeliest next tokens, best first; for a judge [length, 1], 1 or 0."""
    shares: Tensor
    """float32 [length, k]: their probabilities, of the whole vocabulary."""


def read_texts(files: Sequence[str | Path], tokenizer: Any) -> Texts:
    """Files as token ids: of a ".jsonl" each line's "prompt", or first of "turns", in the chat template where there is
    one; of any other file the text. Raises CheckpointError for a file that cannot be read."""
    documents, prompts = [], []
    for file in map(Path, files):
        try:
            text = file.read_text(encoding="utf-8")
            if file.suffix != ".jsonl":
                documents.append(tuple(tokenizer(text)["input_ids"]))
                continue
            for line in text.splitlines():
                data = json.loads(line)
                prompts.append(prompt_ids(data["prompt"] if "prompt" in data else data["turns"][0], tokenizer))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                "a file of training text cannot be read",
                expected='UTF-8 text, or in ".jsonl" an object with "prompt" or "turns" in each line',
                found=f"{type(error).__name__}: {error}",
                where=file,
            ) from error
    return Texts(tuple(documents), tuple(prompts))


def prompt_ids(text: str, tokenizer: Any) -> tuple[int, ...]:
    """A user's message as the model wants it."""
    if not tokenizer.chat_template:
        return tuple(tokenizer(text)["input_ids"])
    message = [{"role": "user", "content": text}]
    found = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return tuple(found["input_ids"])


def sequences(
    compiled: CompiledModel, texts: Texts, folder: Path, length: int, new_tokens: int
) -> Iterator[list[int]]:
    """Documents cut to `length`, then prompts with what the target writes behind them, cut likewise; that is kept in
    the folder, so that it is written once."""
    for document in texts.documents:
        yield from pieces(document, length)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(texts.prompts), TOGETHER):
        file = folder / f"text-{start:06}.json"
        if not file.is_file():
            written = continued(compiled, texts.prompts[start : start + TOGETHER], new_tokens)
            replace_text(file, json.dumps(written))
        for text in json.loads(file.read_text()):
            yield from pieces(text, length)


def continued(compiled: CompiledModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Each prompt and what the target likes best behind it, up to the end of its text."""
    width, room = max(map(len, prompts)), compiled.decoder.max_positions
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    count = new_tokens if room is None else max(1, min(new_tokens, room - width))
    out = compiled.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    assert isinstance(out, Tensor)
    ends, texts = end_tokens(compiled), []
    for row, prompt in zip(out.tolist(), prompts, strict=True):
        new = row[width:]
        stop = next((place + 1 for place, token in enumerate(new) if token in ends), len(new))
        texts.append([*prompt, *new[:stop]])
    return texts


def replace_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def end_tokens(compiled: CompiledModel) -> set[int]:
    """Tokens that end a text."""
    found = compiled.generator.face.generation_config.eos_token_id
    return set() if found is None else set(torch.as_tensor(found).flatten().tolist())


def pieces(tokens: Sequence[int], length: int) -> Iterator[list[int]]:
    """Consecutive pieces; one too short to learn from is left out."""
    for start in range(0, len(tokens), length):
        piece = list(tokens[start : start + length])
        if len(piece) >= 8:
            yield piece


def compute(
    compiled: CompiledModel,
    tokens: Sequence[int],
    count: int,
    stream: Callable[[Sequence[int]], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Hidden states and the `count` likeliest next tokens at every position of one sequence; `stream` gives other
    hidden states than the final ones."""
    decoder, final = compiled.decoder, tapped(compiled.decoder.function.output.args[0][1])[0]
    width = int(final.meta["val"].shape[-1])
    kept, decoder.keeps_hidden = decoder.keeps_hidden, True
    slot = decoder.open()
    hidden, labels, shares = [], [], []
    try:
        for start in range(0, len(tokens), ROWS):
            rows, chunk = Rows(), list(tokens[start : start + ROWS])
            rows.add_chain(slot, chunk, start, want_all=True)
            logits = decoder.forward(rows)
            assert decoder.hidden is not None
            best = logits.topk(count)
            hidden.append(decoder.hidden[:, :width])  # behind them may be streams that heads read
            labels.append(best.indices)
            shares.append((best.values - logits.logsumexp(-1, keepdim=True)).exp().float())
            decoder.commit(slot, range(len(chunk)))
    finally:
        decoder.close(slot)
        decoder.keeps_hidden = kept
    found = {"tokens": torch.tensor(tokens), "hidden": torch.cat(hidden) if stream is None else stream(tokens)}
    found |= {"labels": torch.cat(labels), "shares": torch.cat(shares)}
    return {name: tensor.cpu().clone() for name, tensor in found.items()}


class Shards:
    """Sequences with their features in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = folder / "index.json"
        """How many sequences each shard has; written when all are there."""

    @property
    def sizes(self) -> list[int] | None:
        """Sequences of each shard; None where the work is not finished."""
        found: list[int] | None = json.loads(self.index.read_text()) if self.index.is_file() else None
        return found

    def file(self, number: int) -> Path:
        """A shard's file."""
        return self.folder / f"features-{number:05}.safetensors"

    def build(self, found: Iterator[list[int]], run: Callable[[list[int]], dict[str, Tensor]], say: Callable) -> None:
        """Compute what is not there, shard by shard; `say` is called with the tokens that are done."""
        if self.sizes is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes, done, held = list[int](), 0, list[list[int]]()
        for tokens in found:
            held.append(tokens)
            done += len(tokens)
            if sum(map(len, held)) >= SHARD:
                self.write(len(sizes), held, run, say, done)
                sizes.append(len(held))
                held = []
        if held:
            self.write(len(sizes), held, run, say, done)
            sizes.append(len(held))
        replace_text(self.index, json.dumps(sizes))

    def write(self, number: int, held: list[list[int]], run: Callable, say: Callable, done: int) -> None:
        """One shard, whole or not at all."""
        file = self.file(number)
        if not file.is_file():
            parts = [run(tokens) for tokens in held]
            joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            joined["lengths"] = torch.tensor([len(part["tokens"]) for part in parts])
            temporary = file.with_suffix(".part")
            save_file(joined, temporary)
            temporary.replace(file)
        say(done)

    def read(self, number: int) -> list[Sample]:
        """The sequences of a shard."""
        data = load_file(self.file(number))
        lengths = data["lengths"].tolist()
        names = ("tokens", "hidden", "labels", "shares")
        return [Sample(*parts) for parts in zip(*(data[name].split(lengths) for name in names), strict=True)]

    def frequent(self, count: int, size: int) -> Tensor:
        """int64 [count]: the most frequent tokens of all sequences and of the target's own guesses, ascending; filled
        up with the lowest ids. `size` is the target's vocabulary."""
        counts: Counter[int] = Counter()
        for number in range(len(self.sizes or ())):
            for one in self.read(number):
                counts.update(one.tokens.tolist())
                counts.update(one.labels[:, 0].tolist())
        chosen = sorted(range(size), key=lambda token: (-counts[token], token))[:count]
        return torch.tensor(sorted(chosen))
