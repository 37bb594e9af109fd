"""One generate() call: its requests, and the primitives that the host program is made of.

A step is one call of the target over the rows of all unfinished requests: prompt chunks of some, root and draft tree
of others. A request leaves as soon as it is finished.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft.compiler.drafting import Context, Control, Drafter, Drafting, DraftTree, HiddenRows, Outcome, Verifier
from graft.compiler.errors import GenerationError
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.request import SAMPLING, SLOT, Request, Sampling, TargetRows
from graft.runtime.settings import Settings
from graft.runtime.stats import Stats
from graft.runtime.step_times import StepTimes
from graft.runtime.top_tokens import argmax_rows

PROMPT_ROWS = 512
"""Prompt tokens in one call at most, all requests together; bounds what activations and attention masks take."""


@dataclass
class Span:
    """One request's rows in a call."""

    request: Request
    rows: int
    start: int
    """Its first row in the call."""
    first: int
    """Place of that row among those whose logits were asked for."""
    tree: DraftTree | None
    """None for a prompt chunk."""


@dataclass
class Decision:
    """What a step decided for one request; `outcome` is None where the prompt goes on."""

    span: Span
    view: TargetRows | None
    outcome: Outcome | None


class Run:
    """The requests of one generate() call; a context manager that gives back every slot, however the call ends."""

    def __init__(
        self, decoder: Decoder, settings: Settings, verifier: Verifier, drafter: Drafter | None = None
    ) -> None:
        self.decoder, self.settings, self.verifier = decoder, settings, verifier
        self.drafting: Drafting | None = None
        self.control: Control | None = None
        self.times: StepTimes | None = None
        self.observes = drafter.observes if drafter else 0
        self.observes_prompt = drafter.observes_prompt if drafter else False
        self.reads_hidden: HiddenRows = drafter.reads_hidden if drafter else "no"
        self.plain = not settings.sample
        self.requests: list[Request] = []
        self.live: list[Request] = []
        self.spans: list[Span] = []
        self.target_seconds = 0.0
        self.stats = Stats()

    def __enter__(self) -> Run:
        settings, positions = self.settings, self.decoder.max_positions
        try:
            for row, prompt in enumerate(settings.prompts):
                sampling = Sampling(row, len(prompt), settings.processors[row], settings.sample, settings.seeds[row])
                slot = self.decoder.open(len(prompt))
                context = Context(list(prompt), len(prompt), {SAMPLING: sampling, SLOT: slot})
                limit = len(prompt) + settings.new_tokens
                # The last token is never run, so a text may be one token longer than the positions.
                limit = limit if positions is None else min(limit, positions + 1)
                self.requests.append(Request(row, context, sampling, limit, slot))
        except BaseException:
            self.close()
            raise
        self.live = list(self.requests)
        self.plain = self.plain and not any(settings.processors)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what every request holds; a failure with one does not keep the others."""
        with ExitStack() as stack:
            for request in self.requests:
                stack.callback(self.release, request)

    def release(self, request: Request) -> None:
        """Give back the request's slot and let the drafter forget it; nothing if that was done."""
        if request.open:
            request.open = False
            self.decoder.close(request.slot)
        if request.begun and self.drafting is not None:
            request.begun = False
            self.drafting.end(request.context)


def active(run: Run) -> bool:
    """Whether a request is unfinished."""
    run.stats.start_step(any(request.in_prompt for request in run.live))
    return bool(run.live)


def draft(run: Run) -> dict[int, DraftTree]:
    """Draft trees by the request's row, for requests past their prompt where drafting can pay."""
    requests, budgets = [], []
    measuring = run.times.spent if run.times else 0.0
    drafting, control = run.drafting, run.control
    if drafting is None or control is None:
        return {}
    for request in run.live:
        # A tree never gets deeper than it has nodes, so no drafted token can stand behind the last one.
        room = request.limit - len(request.context.tokens) - 1
        ahead = None if request.in_prompt else run.decoder.room(request.slot)
        room = room if ahead is None else min(room, ahead - 1)
        budget = 0 if request.in_prompt or room <= 0 else min(control.budget(request.context), room)
        if budget > 0:
            requests.append(request)
            budgets.append(budget)
    trees: dict[int, DraftTree] = {}
    if requests:
        proposed = drafting.propose([request.context for request in requests], budgets)
        for request, budget, tree in zip(requests, budgets, proposed, strict=True):
            check_tree(tree, budget, run.decoder.vocabulary)
            tree = control.keep(request.context, tree)
            if tree.tokens:
                trees[request.row] = tree
    spent = run.stats.mark("draft")
    if run.times is not None:
        if (measured := run.times.spent - measuring) > 0:
            run.stats.move("draft", "calibration", measured)
        if requests:
            run.times.observe_drafting(len(requests), spent - measured)
    return trees


def check_tree(tree: DraftTree, budget: int, vocabulary: int) -> None:
    """Raise GenerationError for a tree that cannot be run; drafters may come from elsewhere."""
    if tree.tokens and (len(tree) > budget or min(tree.tokens) < 0 or max(tree.tokens) >= vocabulary):
        raise GenerationError(
            "a drafter proposed a tree that cannot be verified",
            expected=f"at most {budget} nodes with tokens below {vocabulary}",
            found=f"{len(tree)} nodes, tokens {min(tree.tokens)} to {max(tree.tokens)}",
        )


def lay_out(run: Run, trees: dict[int, DraftTree] | None = None) -> Rows:
    """The rows of one call: the next chunk of unfinished prompts, and root and tree of every other request."""
    rows, spans, left = Rows(), [], PROMPT_ROWS
    for request in run.live:
        tokens, first, before = request.context.tokens, len(rows.wanted), len(rows)
        if request.in_prompt:
            ahead = run.decoder.room(request.slot)
            chunk = tokens[request.fed : request.fed + (left if ahead is None else min(left, ahead))]
            if not chunk:
                continue
            rows.add_chain(request.slot, chunk, request.fed, want_all=run.observes_prompt)
            left -= len(chunk)
            tree = None
        else:
            tree = trees.get(request.row) if trees else None
            tree = DraftTree() if tree is None else tree
            rows.add_tree(request.slot, tokens[-1], tree.tokens, tree.parents, len(tokens) - 1)
        spans.append(Span(request, len(rows) - before, before, first, tree))
    run.spans = spans
    run.stats.mark("overhead")
    return rows


def verify(
    run: Run, logits: Tensor, trees: dict[int, DraftTree] | None = None, scores: Tensor | None = None
) -> list[Decision]:
    """Which drafted tokens stand and which token follows them, for every request in the call; `scores` [rows, 1] are
    what the verifier's own function says of each row of logits."""
    seconds = run.stats.mark("model")
    best = None
    top: np.ndarray | None = None
    if run.observes:
        top = run.decoder.top(logits, run.observes).cpu().numpy()
    logits = deciding_rows(run, logits).float()
    judged = None if scores is None else deciding_rows(run, scores)[:, 0].tolist()
    if run.plain:
        best = argmax_rows(logits)
    run.target_seconds = seconds + run.stats.mark("model")
    decisions = []
    place = 0
    hidden = run.decoder.hidden if run.reads_hidden != "no" else None
    for span in run.spans:
        request, tree = span.request, span.tree
        if tree is None:
            if hidden is not None and run.reads_hidden == "all":
                request.prompt_hidden.append(hidden[span.start : span.start + span.rows])
            if top is not None and run.observes_prompt:
                request.prompt_best.append(top[span.first : span.first + span.rows])
            place += 1
            if request.fed + span.rows < request.context.prompt_length:
                decisions.append(Decision(span, None, None))
                continue
        view = TargetRows(request, tree or DraftTree(), logits, place - (tree is None), best, judged)
        path, token = run.verifier.verify(view.tree, view, request.sampling.uniforms, len(request.context.tokens))
        seen = None
        if top is not None:
            last = span.first + (span.rows - 1 if run.observes_prompt else 0)
            seen = top[last : last + 1] if tree is None else top[span.first : span.first + span.rows]
        outcome = Outcome(view.tree, path, token, seen)
        if hidden is not None:
            end = span.start + span.rows
            outcome.hidden = hidden[end - 1 if tree is None else span.start : end]
        decisions.append(Decision(span, view, outcome))
        place += 0 if tree is None else span.rows
    return decisions


def deciding_rows(run: Run, logits: Tensor) -> Tensor:
    """The rows that a token may follow: of a prompt chunk the last one, of the others all."""
    if not run.observes_prompt or all(span.tree is not None for span in run.spans):
        return logits
    kept: list[int] = []
    for span in run.spans:
        end = span.first + span.rows
        kept += [end - 1] if span.tree is None else range(span.first, end)
    return logits[torch.tensor(kept, device=logits.device)]


def commit(run: Run, decisions: list[Decision]) -> None:
    """Keep what was accepted in the texts and the KV cache, tell the drafter, and let go of finished requests."""
    for decision in decisions:
        request, span = decision.span.request, decision.span
        if span.tree is None:
            run.decoder.commit(request.slot, range(span.rows))
            request.fed += span.rows
        if decision.outcome is None or decision.view is None:
            continue
        outcome = decision.outcome
        if span.tree is None and run.drafting is not None:
            begin(run, run.drafting, request)
        kept = extend(run, request, outcome, decision.view)
        if span.tree is not None:
            run.decoder.commit(request.slot, [0, *(node + 1 for node in outcome.path[: kept - 1])])
            request.steps += 1
            request.drafted += len(span.tree)
            request.accepted += min(kept, len(outcome.path))
        if request.finished:
            run.release(request)
        elif run.drafting is not None and run.control is not None:
            run.stats.mark("overhead")
            run.drafting.observe(request.context, outcome)
            if span.tree is not None:
                run.control.observe(request.context, outcome)
            run.stats.mark("draft")
    if any(decision.span.request.finished for decision in decisions):
        run.live = [request for request in run.live if not request.finished]
    run.stats.end_step()
    if run.times is not None and not run.stats.prefilling:
        run.times.observe(sum(span.rows for span in run.spans), run.target_seconds)


def begin(run: Run, drafting: Drafting, request: Request) -> None:
    """Tell the drafter of a request whose prompt has been run."""
    run.stats.mark("overhead")
    request.begun = True
    best = np.concatenate(request.prompt_best) if request.prompt_best else None
    if request.prompt_hidden:
        drafting.begin(request.context, best, torch.cat(request.prompt_hidden))
    else:
        drafting.begin(request.context, best)
    request.prompt_best.clear()
    request.prompt_hidden.clear()
    run.stats.mark("draft")


def extend(run: Run, request: Request, outcome: Outcome, view: TargetRows) -> int:
    """Append the decided tokens one by one until one of them ends the text; how many were appended."""
    settings, tokens = run.settings, request.context.tokens
    decided = [*(outcome.tree.tokens[node] for node in outcome.path), outcome.next_token]
    rows = [0, *(node + 1 for node in outcome.path)]
    # Processed rows are asked for before the text grows, since their prefix is the text as it was.
    if settings.scores:
        request.scores += [view.scores(row)[0] for row in rows]
    if settings.logits:
        request.logits += [view.raw(row)[0].clone() for row in rows]
    for kept, token in enumerate(decided, 1):
        tokens.append(token)
        request.finished = token in settings.eos or len(tokens) >= request.limit
        if settings.criteria:
            request.finished |= stopped(run, request)
        if settings.streamer is not None:
            settings.streamer.put(torch.tensor([token]))
        if request.finished:
            del request.scores[request.new_tokens :], request.logits[request.new_tokens :]
            return kept
    return len(decided)


def stopped(run: Run, request: Request) -> bool:
    """Ask the stopping criteria about the text so far."""
    ids = request.sampling.prefix(request.context.tokens, [], run.settings.input_ids.device)
    scores = tuple(row[None] for row in request.scores[: request.new_tokens]) if run.settings.scores else None
    answer: Any = run.settings.criteria(ids, scores)
    return bool(answer)


PRIMITIVES: dict[str, Callable[..., Any]] = {
    "active": active, "draft": draft, "lay_out": lay_out, "verify": verify, "commit": commit
}  # fmt: skip
"""compiler.host.PRIMITIVES, by name."""
