"""One model under several compressions of its KV cache: captured once, lowered once for each layout of pages.

What is given up when a cut moves is the store's business alone: arms that differ only there share one function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from graft.compiler.capture import capture, check_model
from graft.compiler.errors import PlanError
from graft.compiler.kv.codecs import PAGE, Affine, DensePages
from graft.compiler.kv.eviction import RandomEviction, StreamingLLM
from graft.compiler.ordering import ordered
from graft.compiler.pipeline import PassWarning, run_passes
from graft.compiler.plan import FACTS, Plan
from graft.compiler.program import DENSE, Function, KVState, Program
from graft.compiler.spec import show
from graft.compiling import TARGET, decoder_of, pipeline
from graft.passes.compress_kv import CompressKV
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.kv_store import FIRST_CAPACITY, KVStore
from graft.runtime.run import PROMPT_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Say = Callable[[str], None]
CHECKED = ((0, 1),)
"""Token ids on which passes are checked, if the plan has none: the arms are measured anyway."""


@dataclass
class Candidate:
    """What is measured under a name: a compression, or None for the full cache."""

    name: str
    change: CompressKV | None
    kind: str = "given"
    """"given", or what it is there for: "full", "int8", "recency", "random"."""


@dataclass
class Arm:
    """A compression, ready to run. Every text gets a store of its own, so that what is allocated is the text's."""

    candidate: Candidate
    decoder: Decoder
    states: tuple[KVState, ...]

    @property
    def dense_prompt(self) -> bool:
        """Whether a prompt attends to all of itself, so that its keys and values are the full cache's."""
        return self.candidate.change is None or self.candidate.change.prompt == "dense"

    @property
    def reads_queries(self) -> bool:
        """Whether it wants the queries of the prompt."""
        return any(state.query_dim for state in self.states)

    @property
    def streams(self) -> bool:
        """Whether it can go on compressing, prompt or not."""
        change = self.candidate.change
        return change is None or change.eviction is None or not change.eviction.once

    def open(self, prompt: int) -> int:
        """A slot in a new store, for a text with such a prompt."""
        self.decoder.store = KVStore(self.states, self.decoder.device)
        return self.decoder.open(prompt)

    def reserve(self, slot: int, tokens: int) -> None:
        """Make room for so many tokens at once, so that hardly more is allocated."""
        store = self.decoder.store
        assert isinstance(store, KVStore)
        store.reserve({slot: tokens})

    def clear(self) -> None:
        """Give back the store's memory."""
        self.decoder.store = KVStore(self.states, self.decoder.device)

    def feed(self, slot: int, tokens: list[int], want_all: bool = False, most: int = PROMPT_ROWS) -> list[Tensor]:
        """Commit the tokens behind what the slot has, `most` in a call, and return each call's float32 logits: of all
        its tokens, or of the last."""
        found, done = [], 0
        while done < len(tokens):
            start, room = self.decoder.length(slot), self.decoder.room(slot)
            count = min(most, len(tokens) - done, *([] if room is None else [room]))
            rows = Rows()
            rows.add_chain(slot, tokens[done : done + count], start, want_all=want_all)
            found.append(self.decoder.forward(rows).float())
            self.decoder.commit(slot, range(count))
            done += count
        return found


@dataclass
class Snapshot:
    """A prompt's keys, values and perhaps queries, before anything was compressed, and the logits of its last token."""

    length: int
    rows: dict[str, Tensor]
    """By state: [layers, kv heads, length, width]."""
    last: Tensor

    @classmethod
    def of(cls, arm: Arm, slot: int, last: Tensor) -> Snapshot:
        """What the slot holds, which has no far tokens yet."""
        store, length = arm.decoder.store, arm.decoder.length(slot)
        assert isinstance(store, KVStore)
        tensors = zip(store.states, store.tensors, strict=True)
        return cls(length, {state.name: held[:, slot, :, :length].clone() for state, held in tensors}, last)

    def first(self, length: int) -> Snapshot:
        """The same of a shorter prompt, but for the logits, which nobody may ask for."""
        return Snapshot(length, {name: rows[:, :, :length] for name, rows in self.rows.items()}, self.last[:0])

    def put(self, arm: Arm) -> tuple[int, int]:
        """A slot of the arm that has this prompt, compressed, and the bytes that were allocated just before that."""
        slot, store = arm.open(self.length), arm.decoder.store
        assert isinstance(store, KVStore)
        store.append([slot] * self.length)
        peak = store.nbytes
        for state, held in zip(store.states, store.tensors, strict=True):
            held[:, slot, :, : self.length] = self.rows[state.name][..., : state.width]
        store.commit(slot, range(self.length))
        return slot, peak


def prefilled(arms: Iterable[Arm], ids: list[int]) -> Snapshot:
    """The prompt, run without compression for all arms, by one of those that leave a prompt as it is; by one that keeps
    queries, if any asks for them."""
    dense = [one for one in arms if one.dense_prompt]
    arm = max(dense, key=lambda one: (one.reads_queries, one.candidate.change is None))
    slot = arm.open(len(ids) + 1)  # the end of such a prompt is never reached
    arm.reserve(slot, len(ids))
    last = arm.feed(slot, ids)[-1][-1]
    found = Snapshot.of(arm, slot, last)
    arm.clear()
    return found


@dataclass
class Arms:
    """Makes arms of candidates, for one model and a plan's other passes."""

    model: PreTrainedModel
    plan: Plan = field(default_factory=Plan)
    """Its passes on the target but for `CompressKV`; drafts and what belongs to them do not count."""
    backend: str = "auto"
    say: Say = lambda _: None
    program: Program | None = None
    decoders: dict[tuple[str, ...], Decoder] = field(default_factory=dict)
    """By what generated code depends on."""

    def make(self, candidate: Candidate) -> Arm:
        """The arm. Raises what `graft.compile` raises."""
        layout = layout_of(candidate.change)
        if layout not in self.decoders:
            self.say(f"compiling {candidate.name}")
            self.decoders[layout] = self.compiled(candidate.change)
        decoder = self.decoders[layout]
        change = candidate.change
        states = tuple(
            state if state.pages is None or change is None else replace(state, pages=change.pages)
            for state in decoder.function.states
        )
        own = Decoder(decoder.function, decoder.executable, decoder.vocabulary, decoder.max_positions, decoder.store)
        return Arm(candidate, own, states)

    def compiled(self, change: CompressKV | None) -> Decoder:
        """The program with this compression, lowered. Parameters are packed once for all."""
        sample = self.plan.sample or CHECKED
        if self.program is None:
            check_model(self.model)
            captured = capture(self.model)
            self.program = Program({TARGET: Function(TARGET, captured.graph, captured.weights, DENSE)})
            passes = pipeline(replace(self.plan, draft=()))
            ordered(passes)
            run_passes(self.program, passes, sample=sample)
        program = self.program.copy()
        if change is not None:
            # Last of all, so that the others run once; what they do does not depend on it.
            with warnings.catch_warnings():
                # What giving tokens up costs is what is being measured.
                warnings.filterwarnings("ignore", message=".* gives tokens up", category=PassWarning)
                run_passes(program, [change], facts=FACTS - {"cache-free"}, sample=sample)
        panels = {name: one for held in self.decoders.values() for name, one in held.executable.panels.items()}
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
        return decoder_of(program, vocabulary, positions, self.backend, panels)


def layout_of(change: CompressKV | None) -> tuple[str, ...]:
    """What code for an arm depends on."""
    if change is None:
        return ("full",)
    selection = show(change.selection) if change.selection else ""
    return show(change.codec), selection, str(change.pages.reads_queries)


def split(plan: Plan) -> tuple[Plan, CompressKV]:
    """A plan without its compression, and that. Raises PlanError where there is none, or more than one."""
    found = [one for one in plan.target if isinstance(one, CompressKV)]
    if len(found) != 1:
        raise PlanError(
            "there is nothing to measure in a plan",
            expected="one compress-kv among the passes on the target",
            found=", ".join(show(one) for one in plan.target) or "no pass",
            remedy="for instance target=compress-kv{codec=affine}",
        )
    return replace(plan, target=tuple(one for one in plan.target if one is not found[0])), found[0]


def per_token_int8(prompt: CompressKV | None) -> CompressKV:
    """Eight bits, a group being 32 channels of one token: the codec that any other has to be worth more than."""
    return with_prompt(CompressKV(codec=Affine(8, 8, "token", 32, 32)), prompt)


def keeping(change: CompressKV, kind: str, ratio: float) -> CompressKV:
    """Recency alone, or chance, with that share of the tokens, triggers being those of the arm compared."""
    eviction = StreamingLLM(ratio=ratio) if kind == "recency" else RandomEviction(ratio=ratio)
    return replace(change, codec=DensePages(), eviction=eviction, selection=None)


def with_prompt(change: CompressKV, like: CompressKV | None) -> CompressKV:
    """The same with the triggers of another."""
    return change if like is None else replace(change, recent=like.recent, every=like.every, prompt=like.prompt)


def equal_ratio(arm: Arm, allocated: int, context: int) -> float:
    """Share of the tokens that recency or chance keep in so many bytes, the tail among them, as the arm's store just
    held them at the end of a prompt; 1 or more where dense pages of all tokens take no more."""
    store, change = arm.decoder.store, arm.candidate.change
    assert isinstance(store, KVStore) and change is not None
    behind = context - change.pages.cut(context)
    tail = max(FIRST_CAPACITY, 2 * behind)
    if change.prompt == "dense" and 2 * tail >= context:
        tail = max(FIRST_CAPACITY, context)  # a prompt so short leaves its room behind (KVStore.shrink)
    left, page = allocated, 0
    for state, held in zip(store.states, store.tensors, strict=True):
        token = dense_bytes(state)
        left -= held.nbytes if state.pages is None else tail * token
        page += 0 if state.pages is None else PAGE * token
    return (max(0, round(left / page)) * PAGE + behind + 0.5) / context


def dense_bytes(state: KVState) -> int:
    """Bytes of a token's keys and values as they are."""
    return state.layers * state.heads * (state.key_dim + state.value_dim) * state.dtype.itemsize


def read_bytes(arm: Arm, slot: int) -> int:
    """Bytes of keys, values and labels that one row behind the slot's tokens reads."""
    store, total = arm.decoder.store, 0
    assert isinstance(store, KVStore)
    for state in store.states:
        length = store.lengths[slot]
        if state.pages is None:
            total += length * dense_bytes(state)
            continue
        far, selection = store.far[state.name], state.pages.selection
        total += (length - far.cuts[slot]) * dense_bytes(state)
        dense = (state.key_dim + state.value_dim) * state.dtype.itemsize
        entry = dense if state.pages.codec.in_place else state.page_bytes / PAGE
        for layer, counts in enumerate(far.counts[:, slot].tolist()):
            for count in counts:
                if selection is None or layer < selection.dense_layers:
                    total += int(count * entry)
                else:
                    chosen = min(count, selection.units(count) * selection.size)
                    total += int(chosen * entry + -(-count // PAGE) * state.label_bytes)
    return total
