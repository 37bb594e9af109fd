"""Tiny models for tests of the runtime: captured, given a KV cache and run through ATen, without a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel

from graft.codegen.aten import AtenExecutable
from graft.compiler.capture import capture
from graft.compiler.drafting import (
    Context,
    Control,
    Controller,
    Drafter,
    Drafting,
    DraftTree,
    Outcome,
    Target,
    TreePolicy,
    Verifier,
)
from graft.compiler.host import plain_host, speculative_host
from graft.compiler.passing import View
from graft.compiler.program import DENSE, FLAT, Function, Program
from graft.passes.canonicalise import Canonicalise
from graft.passes.kv_cache import KVCache
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.drafters.draft_model import DraftModel
from graft.runtime.drafters.lookup import Lookup
from graft.runtime.drafters.merge import Merge
from graft.runtime.drafters.recycle import Recycle
from graft.runtime.generate import Generator
from graft.runtime.settings import ModelFace
from graft.runtime.tree_policies import BestFirst
from tests.families import build


@dataclass(frozen=True)
class Always(Controller):
    """Draft `nodes` nodes in every step."""

    nodes: int = 7

    def open(self, max_nodes: int, step_seconds: object, draft_seconds: object) -> Control:
        return Constant(min(self.nodes, max_nodes))


@dataclass
class Constant:
    nodes: int

    def budget(self, context: Context) -> int:
        return self.nodes

    def keep(self, context: Context, tree: DraftTree) -> DraftTree:
        return tree

    def observe(self, context: Context, outcome: Outcome) -> None:
        pass


def tiny(name: str = "llama", seed: int = 0, **overrides: Any) -> tuple[PreTrainedModel, Function]:
    """A random float64 model without eos token, and its flat function; shared, so its users leave both as they are."""
    return compiled(name, seed, tuple(sorted(overrides.items())))


@cache
def compiled(name: str, seed: int, options: tuple[tuple[str, Any], ...]) -> tuple[PreTrainedModel, Function]:
    overrides = {"eos_token_id": None} | dict(options)
    model = build(name, seed=seed, dtype=torch.float64, **overrides)
    captured = capture(model)
    program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
    for one in (Canonicalise(), KVCache()):
        one.run(View(program, one.pass_name()))
    return model, program["forward"]


def decoder(name: str = "llama", seed: int = 0, **overrides: Any) -> Decoder:
    """A decoder of its own for a tiny model."""
    model, function = tiny(name, seed, **overrides)
    config = model.config
    return Decoder(function, AtenExecutable(function), config.vocab_size, config.max_position_embeddings)


def generator(
    drafter: Drafter | None = None, *, name: str = "llama", verifier: Verifier | None = None, **options: Any
) -> Generator:
    """A generator for a tiny model, with options of Generator."""
    model, _ = tiny(name)
    host = plain_host() if drafter is None else speculative_host()
    options = {"policy": BestFirst(), "controller": Always(), "nodes": 8} | options
    return Generator(decoder(name), ModelFace.of(model), host, drafter=drafter, verifier=verifier, **options)


def same_cache_as_fresh_prefill(held: Decoder, slot: int, tokens: list[int]) -> bool:
    """Whether what the slot holds is what a prefill of the same tokens writes."""
    length = held.length(slot)
    fresh = held.open()
    rows = Rows()
    rows.add_chain(fresh, tokens[:length], 0)
    held.forward(rows)
    held.commit(fresh, range(length))
    same = same_rows(held, held.store.select(held.function.states), slot, fresh)
    held.close(fresh)
    return same


def same_rows(held: Decoder, tensors: Sequence[Tensor], slot: int, other: int) -> bool:
    """Whether two slots hold the same in these of the store's tensors."""
    length = held.length(slot)
    return all(torch.allclose(kv[:, slot, :, :length], kv[:, other, :, :length]) for kv in tensors)


def prompts(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Random prompts of these lengths without special tokens, padded on the left with 0, and their mask."""
    source = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, 20, (length,), generator=source)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class Oracle(Drafter):
    """Drafts what is known to come, as a chain, with a wrong sibling at the root."""

    texts: tuple[tuple[int, ...], ...]

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        return OracleDrafting(self.texts)


@dataclass
class OracleDrafting:
    texts: tuple[tuple[int, ...], ...]
    begun: int = 0
    ended: int = 0

    def begin(self, context: Context, prompt_best: object, prompt_hidden: object = None) -> None:
        self.begun += 1

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        return [self.chain(context.tokens, budget) for context, budget in zip(contexts, budgets, strict=True)]

    def chain(self, tokens: list[int], budget: int) -> DraftTree:
        tree = DraftTree()
        text = next((text for text in self.texts if list(text[: len(tokens)]) == tokens), ())
        known = text[len(tokens) :]
        parent = -1
        if budget > 1 and known:
            tree.add((known[0] + 1) % 100, -1, 0.1)
        for token in known[: budget - len(tree)]:
            parent = tree.add(token, parent, 0.9)
        return tree

    def observe(self, context: Context, outcome: Outcome) -> None:
        assert context.tokens[-1] == outcome.next_token

    def end(self, context: Context) -> None:
        self.ended += 1


class Bigram:
    """An executable whose logits depend on the last token alone, for exact distributions and planted NaN."""

    invariant, source = True, ""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, tokens: Tensor, positions: Tensor, sequences: Tensor, parents: Tensor, lengths: Tensor,
                 wanted: Tensor, *states: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        return self.table[tokens[wanted]], torch.zeros(len(tokens), 1)

    def share_threads(self, beside: object) -> None:
        """It has none."""

    def top(self, logits: Tensor, count: int) -> Tensor | None:
        return None


def bigram(table: Tensor) -> Decoder:
    """A decoder of a `Bigram`; it has no KV state."""
    function = Function("forward", fx.Graph(), nn.Linear(1, 1), FLAT)
    return Decoder(function, Bigram(table), table.shape[1], None)


def bigram_generator(table: Tensor, drafter: Drafter | None = None, **options: Any) -> Generator:
    """A generator for a `Bigram`."""
    config = LlamaConfig(vocab_size=table.shape[1])
    face = ModelFace(config, GenerationConfig(pad_token_id=0), torch.device("cpu"))
    host = plain_host() if drafter is None else speculative_host()
    return Generator(bigram(table), face, host, drafter=drafter, **options)


@dataclass(frozen=True)
class Fixture(Drafter):
    """A drafter whose state a test holds in its hands."""

    drafting: Any

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        opened: Drafting = self.drafting
        return opened


class Recorder:
    """A streamer that keeps what it is given, and can be made to interrupt the call."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.puts: list[Tensor] = []
        self.ended = 0
        self.fail_after = fail_after

    def put(self, value: Tensor) -> None:
        self.puts.append(value)
        if len(self.puts) == self.fail_after:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended += 1


LONG = {"max_new_tokens": 30}
DRAFTERS: dict[str, Callable[[], Drafter | None]] = {
    "plain": lambda: None,
    "lookup": Lookup,
    "recycle": Recycle,
    "recycle, prompt seeded": lambda: Recycle(seed_prompt=True),
    "merged": lambda: Merge((Lookup(), Recycle(), DraftModel(SimpleNamespace(decoder=decoder(seed=1))))),
    "another model": lambda: DraftModel(SimpleNamespace(decoder=decoder(seed=1))),
    "the same model": lambda: DraftModel(SimpleNamespace(decoder=decoder())),
}


def theirs(arguments: dict[str, Any], family: str = "llama") -> Any:
    """What transformers generates, greedily unless the arguments say otherwise."""
    model, _ = tiny(family)
    return model.generate(**{"do_sample": False, "pad_token_id": 0, **arguments})


def oracle(arguments: dict[str, Any]) -> Oracle:
    """A drafter that knows the greedy text of each (unpadded) prompt."""
    texts = theirs({"input_ids": arguments["input_ids"], "attention_mask": arguments["attention_mask"]} | LONG)
    masks = arguments["attention_mask"].tolist()
    return Oracle(tuple(tuple(row[mask.index(1) :]) for row, mask in zip(texts.tolist(), masks, strict=True)))


def all_slots_free(made: Generator) -> bool:
    """Whether no sequence is left in the KV store."""
    return len(made.decoder.store.free) == len(made.decoder.store.lengths)
