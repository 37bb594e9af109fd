"""Runs arms over held text: a continuation after the context, whole texts with compression on the way, and passkeys.

A prompt is run once, uncompressed, for all arms that compress at its end; each of them gets a copy of its keys, values
and queries, and compresses that. Arms that compress on the way run it themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from graft.compiler.errors import PlanError
from graft.compiler.plan import Plan
from graft.compiler.spec import show
from graft.passes.compress_kv import CompressKV
from graft.quality.arms import (
    Arm,
    Arms,
    Candidate,
    Say,
    Snapshot,
    dense_bytes,
    equal_ratio,
    keeping,
    per_token_int8,
    prefilled,
    read_bytes,
    split,
)
from graft.quality.metrics import Bootstrap, PerToken, compared, joined
from graft.quality.passkeys import Passkey, passkeys
from graft.quality.report import Equal, Quality, Result
from graft.runtime.kv_store import KVStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CALL = 64
"""Tokens of a continuation in one call; bounds the logits that are held."""
EQUAL = ("recency", "random")
"""The kinds of arms that are measured at another's bytes."""
SAME = 0.02
"""Two references whose shares of tokens differ by less than this, in parts, are one."""


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    context: int = 4096
    """Tokens in front of what is compared."""
    tokens: int = 256
    """Tokens compared behind it."""
    streamed: int = 2048
    """Tokens of a text that are run from its start with compression on the way; 0: none."""
    streamed_texts: int = 1
    """Of so many texts."""
    passkeys: int = 8
    """Passkey prompts, each asked for in two ways; 0: none."""
    passkey_context: int = 1536
    """Tokens of their context."""
    references: Literal["all", "continuation", "none"] = "all"
    """Whether recency and chance are measured at every arm's bytes, and int8 beside them: in everything, or in what is
    compared behind a context alone."""
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.context, self.tokens, self.resamples, self.passkey_context) < 1:
            raise PlanError("nothing to measure", expected="context, tokens and resamples of 1 or more", found=self)
        if min(self.streamed, self.passkeys) < 0:
            raise PlanError("less than nothing to measure", expected="0 or more", found=self)

    @property
    def length(self) -> int:
        """Tokens that a document has to have."""
        return max(self.context + self.tokens + 1, self.streamed, self.passkey_context if self.passkeys else 0)


def measure(
    model: PreTrainedModel,
    plans: Mapping[str, Plan | CompressKV],
    texts: Sequence[Sequence[int]],
    options: Options = Options(),
    *,
    tokenizer: Any = None,
    backend: str = "auto",
    progress: Say | None = None,
) -> Quality:
    """Measure plans, by name, on token ids of texts, beside the full cache and the references at equal bytes.

    Plans may differ in their compress-kv alone; what they draft with does not count. Texts have at least
    `options.length` tokens. The tokenizer is needed for passkeys. Arms run through `backend` as in `graft.compile`.

    Raises PlanError for a plan without compression, plans that do not go together, and texts that are too short.
    """
    *_, last = measured(model, plans, texts, options, tokenizer=tokenizer, backend=backend, progress=progress)
    return last


def measured(
    model: PreTrainedModel,
    plans: Mapping[str, Plan | CompressKV],
    texts: Sequence[Sequence[int]],
    options: Options = Options(),
    *,
    tokenizer: Any = None,
    backend: str = "auto",
    progress: Say | None = None,
) -> Iterator[Quality]:
    """As `measure`, but all that is known so far, after every text and every passkey."""
    plan, candidates = given(plans)
    check(model, texts, options, tokenizer)
    run = Measurement(Arms(model, plan, backend, progress or (lambda _: None)), options)
    run.add(Candidate("full", None, "full"))
    for candidate in candidates:
        run.add(candidate)
    changes = [candidate.change for candidate in candidates if candidate.change is not None]
    if options.references != "none":
        for prompt in {change.prompt: change for change in changes}.values():
            change = per_token_int8(prompt)
            if change not in changes:
                apart = f", {change.prompt} prompt" if len({one.prompt for one in changes}) > 1 else ""
                run.add(Candidate(f"int8 per token{apart}", change, "int8"))
    for number, text in enumerate(texts):
        run.continue_text(number, list(text))
        yield run.results()
    prompts = passkeys(texts, tokenizer, options.passkey_context, options.passkeys, options.seed)
    for number, passkey in enumerate(prompts):
        run.ask(number, passkey)
        yield run.results()
    for number, text in enumerate(texts[: options.streamed_texts] if options.streamed else ()):
        run.stream_text(number, list(text[: options.streamed]))
        yield run.results()


def given(plans: Mapping[str, Plan | CompressKV]) -> tuple[Plan, list[Candidate]]:
    """The passes that all plans share, and what each compresses."""
    if not plans:
        raise PlanError("there is no plan to measure", expected="one or more")
    parts = {name: split(Plan(target=(one,)) if isinstance(one, CompressKV) else one) for name, one in plans.items()}
    first = next(iter(parts.values()))[0]
    for name, (plan, _) in parts.items():
        if plan.target != first.target:
            raise PlanError(
                "plans that are measured together differ in more than their compression",
                expected=", ".join(show(one) for one in first.target) or "no other pass",
                found=", ".join(show(one) for one in plan.target) or "no other pass",
                where=name,
                remedy="measure them one by one",
            )
        if name == "full":
            raise PlanError("a plan takes the name of the full cache", found=name, remedy="another name")
    return first, [Candidate(name, change) for name, (_, change) in parts.items()]


def check(model: PreTrainedModel, texts: Sequence[Sequence[int]], options: Options, tokenizer: Any) -> None:
    """Raise PlanError for what cannot be measured."""
    lengths = [len(text) for text in texts]
    if not texts or min(lengths) < options.length:
        raise PlanError(
            "texts are too short to be measured on",
            expected=f"one text or more, of {options.length} tokens or more",
            found=f"{min(lengths)} tokens" if texts else "none",
            remedy="longer texts, or a shorter context",
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < options.length:
        raise PlanError(
            "the model has too few positions", expected=f"{options.length} or more", found=positions,
            remedy="a shorter context",
        )  # fmt: skip
    if options.passkeys and tokenizer is None:
        raise PlanError("passkeys need a tokenizer", remedy="give one, or passkeys=0")


@dataclass
class Measured:
    """What is known of an arm so far."""

    arm: Arm
    tokens: dict[int, PerToken] = field(default_factory=dict)
    """By document."""
    streamed: dict[int, np.ndarray] = field(default_factory=dict)
    """-log p of every token of a document but its first."""
    passkeys: dict[str, list[bool]] = field(default_factory=lambda: {"question aware": [], "question agnostic": []})
    bytes: dict[str, int] = field(default_factory=dict)
    """Allocated at the end of the first context."""
    peak: int = 0
    read: int = 0
    equal: Equal | None = None


class Measurement:
    """Arms, and what was measured of them."""

    def __init__(self, arms: Arms, options: Options) -> None:
        self.arms, self.options = arms, options
        self.measured: dict[str, Measured] = {}

    def add(self, candidate: Candidate) -> Measured:
        """Compile an arm, unless there is one of that name."""
        if candidate.name not in self.measured:
            self.measured[candidate.name] = Measured(self.arms.make(candidate))
        return self.measured[candidate.name]

    @property
    def further(self) -> dict[str, Measured]:
        """Arms of which more is measured than what they say behind a context."""
        every = self.options.references == "all"
        return {name: one for name, one in self.measured.items() if every or one.arm.candidate.kind not in EQUAL}

    @property
    def full(self) -> Measured:
        """The reference of all others."""
        return self.measured["full"]

    def snapshot(self, ids: list[int]) -> Snapshot:
        """The prompt, run without compression."""
        return prefilled((one.arm for one in self.measured.values()), ids)

    def begin(self, one: Measured, ids: list[int], shared: Snapshot) -> tuple[int, Tensor, int]:
        """A slot that has the prompt, the logits of its last token, and the most bytes that were allocated."""
        if one.arm.dense_prompt:
            slot, peak = shared.put(one.arm)
            return slot, shared.last, peak
        slot = one.arm.open(len(ids))
        last = one.arm.feed(slot, ids)[-1][-1]
        assert isinstance(one.arm.decoder.store, KVStore)
        return slot, last, one.arm.decoder.store.nbytes

    def continue_text(self, number: int, text: list[int]) -> None:
        """Compare what arms say of the tokens behind a context; the references come into being at the first one."""
        options = self.options
        prompt, rest = text[: options.context], text[options.context : options.context + options.tokens]
        targets = torch.tensor(text[options.context + 1 : options.context + options.tokens + 1])
        self.arms.say(f"text {number + 1}: a prompt of {len(prompt)} tokens for all arms")
        shared = self.snapshot(prompt)
        full: list[Tensor] = []
        names = list(self.measured)
        for name in names:  # grows
            one = self.measured[name]
            self.arms.say(f"text {number + 1}: {name}")
            slot, _, peak = self.begin(one, prompt, shared)
            if not number:
                names += self.look(one, slot, peak)
            logits = one.arm.feed(slot, rest, want_all=True, most=CALL)
            if not full:
                full = logits
            targets = targets.to(logits[0].device)
            one.tokens[number] = compare(full, logits, targets)
            one.arm.clear()

    def look(self, one: Measured, slot: int, peak: int) -> list[str]:
        """Note what a context takes in memory, and add what else has to be measured at those bytes."""
        store, change = one.arm.decoder.store, one.arm.candidate.change
        assert isinstance(store, KVStore)
        one.bytes, one.peak, one.read = store.bytes, max(peak, store.nbytes), read_bytes(one.arm, slot)
        if change is None or one.arm.candidate.kind in EQUAL or self.options.references == "none":
            return []
        ratio, what = equal_ratio(one.arm, store.nbytes, self.options.context), "allocated"
        if ratio >= 1:
            dense = sum(dense_bytes(state) for state in store.states)
            ratio, what = one.read / (dense * self.options.context), "read"
        if ratio >= 1:
            one.equal = Equal(what, 1.0, {"recency": "full", "random": "full"})
            return []
        one.equal = Equal(what, ratio, {})
        added = []
        for kind in EQUAL:
            one.equal.names[kind] = name = self.reference(change, kind, ratio)
            if name not in self.measured:
                added.append(name)
                self.add(Candidate(name, keeping(change, kind, ratio), kind))
        return added

    def reference(self, change: CompressKV, kind: str, ratio: float) -> str:
        """The name of the reference that keeps so much, one that is there already where it is close enough."""
        for name, one in self.measured.items():
            held = one.arm.candidate.change
            if one.arm.candidate.kind == kind and held is not None and held.eviction is not None:
                like = keeping(change, kind, held.eviction.ratio)
                if like == held and abs(held.eviction.ratio / ratio - 1) < SAME:
                    return name
        apart = "" if change.prompt == "dense" else ", streamed prompt"
        other = "" if change.recent == 64 and change.every == 64 else f", recent {change.recent}, every {change.every}"
        return f"{kind} {100 * ratio:.1f}%{apart}{other}"

    def stream_text(self, number: int, text: list[int]) -> None:
        """What arms say of every token of a text, compressing as they go."""
        targets = torch.tensor(text[1:])
        for name, one in self.further.items():
            if one.arm.streams:
                self.arms.say(f"text {number + 1}, compressed on the way: {name}")
                slot, found, done = one.arm.open(0), [], 0
                one.arm.reserve(slot, len(text) if one.arm.candidate.change is None else 0)
                for start in range(0, len(text) - 1, CALL):
                    for logits in one.arm.feed(slot, text[start : min(start + CALL, len(text) - 1)], want_all=True):
                        wanted = targets[done : done + len(logits)].to(logits.device)
                        found.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").cpu())
                        done += len(logits)
                one.streamed[number] = torch.cat(found).double().numpy()
                one.arm.clear()

    def ask(self, number: int, prompt: Passkey) -> None:
        """Whether arms say the key: asked before they compress, and asked after."""
        context, whole = list(prompt.context), [*prompt.context, *prompt.question]
        self.arms.say(f"passkey {number + 1}, depth {prompt.depth:.2f}")
        asked_before = self.snapshot(whole)
        shared = {"question agnostic": asked_before.first(len(context)), "question aware": asked_before}
        for one in self.further.values():
            for protocol, found in one.passkeys.items():
                if protocol == "question agnostic" and not one.arm.dense_prompt:
                    # Cuts move at the same places whatever the prompt's length: the two are one.
                    found.append(one.passkeys["question aware"][-1])
                    continue
                asked = context if protocol == "question agnostic" else whole
                slot, last, _ = self.begin(one, asked, shared[protocol])
                found.append(answers(one.arm, slot, last, whole[len(asked) :], prompt))
                one.arm.clear()

    def results(self) -> Quality:
        """Everything so far, with intervals."""
        documents = len(self.full.tokens)
        resamples = Bootstrap(documents, self.options.tokens, self.options.resamples, self.options.seed)
        results = []
        for one in self.measured.values():
            tokens = [one.tokens[number] for number in range(documents)]
            results.append(
                Result(
                    one.arm.candidate,
                    one.bytes,
                    one.peak,
                    one.read,
                    np.stack([each.kl for each in tokens]),
                    np.stack([each.same for each in tokens]),
                    np.stack([each.nll for each in tokens]),
                    np.stack(list(one.streamed.values())) if one.streamed else None,
                    one.passkeys,
                    one.equal,
                )
            )
        return Quality(tuple(results), self.options.context, resamples)


def compare(full: list[Tensor], logits: list[Tensor], targets: Tensor) -> PerToken:
    """Of calls that may have been cut at different places."""
    if [len(one) for one in full] != [len(one) for one in logits]:
        full, logits = [torch.cat(full)], [torch.cat(logits)]
    sizes = [len(one) for one in full]
    triples = zip(full, logits, targets.split(sizes), strict=True)
    return joined([compared(before, after, wanted) for before, after, wanted in triples])


def answers(arm: Arm, slot: int, last: Tensor, question: list[int], prompt: Passkey) -> bool:
    """Whether greedy decoding behind the question says the key: each of its tokens is the likeliest behind those
    before."""
    rows = [] if question else [last[None]]
    rows += arm.feed(slot, [*question, *prompt.answer[:-1]], want_all=True, most=CALL)
    best = torch.cat(rows)[-len(prompt.answer) :].argmax(-1)
    return tuple(best.tolist()) == prompt.answer
