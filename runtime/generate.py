"""generate() of a compiled model: transformers' arguments in, transformers' results out, the host program between."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from graft.compiler.acceptance import check_lossless, kinds_of
from graft.compiler.drafting import Controller, Drafter, TreePolicy, Verifier
from graft.compiler.errors import PlanError
from graft.compiler.host import Host, exit_questions
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.drafters.head_levels import run_rows
from graft.runtime.drafters.text_rows import read_width
from graft.runtime.run import PRIMITIVES, Run
from graft.runtime.settings import ModelFace, Settings, resolve
from graft.runtime.split import split_of
from graft.runtime.step_times import StepTimes
from graft.runtime.verifiers import default_verifier


class Generator:
    """Runs a host program over a decoder. One call at a time; a second thread waits for the first."""

    def __init__(
        self,
        decoder: Decoder,
        face: ModelFace,
        host: Host,
        *,
        drafter: Drafter | None = None,
        policy: TreePolicy | None = None,
        controller: Controller | None = None,
        verifier: Verifier | None = None,
        nodes: int = 16,
    ) -> None:
        """`nodes` rows of a verification step at most, the root included. Without a `verifier`, greedy decoding walks
        along the best tokens and sampling samples and matches; a verifier for one of the two leaves the other so.
        Raises CheckError for a host program that calls what there is not, and PlanError for a verifier that would
        change the output.
        """
        if drafter is not None and (policy is None or controller is None):
            raise PlanError("a drafter needs a tree policy and a controller", found=f"{policy}, {controller}")
        self.decoder, self.face, self.host = decoder, face, host
        self.drafter, self.policy, self.controller, self.verifier = drafter, policy, controller, verifier
        self.nodes = nodes
        if drafter is not None and drafter.reads_hidden != "no":
            decoder.keeps_hidden = True
        self.step_times = StepTimes(decoder)
        self.stats: dict[str, Any] = {}
        """What the last finished call showed, see Stats.summary."""
        for sampling in (False, True):
            self.rule(sampling)
        functions = {decoder.function.name: decoder.forward}
        if exit_questions(decoder.functions):
            functions |= split_of(decoder).primitives()
        if host.scoring in decoder.functions:
            decoder.keeps_hidden = True
            functions[host.scoring] = partial(scores, decoder, decoder.functions[host.scoring])
        self.loop = host.load({**functions, **PRIMITIVES})
        self.lock = threading.RLock()

    def generate(self, inputs: Tensor | None = None, **arguments: Any) -> Tensor | GenerateDecoderOnlyOutput:
        """As GenerationMixin.generate of transformers, and `seed`: an int, or a list with one for each sequence.

        Returns int64 [batch, width + new tokens], shorter sequences padded on the right, or with
        return_dict_in_generate=True a GenerateDecoderOnlyOutput whose `scores` and `logits` are one float32 [batch,
        vocabulary] for each new token, 0 where a sequence had ended. Raises GenerationError for what docs/limits.md
        names; the model can be used on after any exception.
        """
        with self.lock, torch.no_grad():
            decoder = self.decoder
            settings = resolve(self.face, decoder.vocabulary, decoder.max_positions, {"inputs": inputs, **arguments})
            verifier = self.rule(settings.sample)
            with Run(decoder, settings, verifier, self.drafter) as run:
                if self.drafter is not None and self.policy is not None and self.controller is not None:
                    run.drafting = self.drafter.open(decoder, self.policy)
                    times = self.step_times
                    run.control = self.controller.open(self.nodes - 1, times.seconds, times.draft_seconds)
                    run.times = self.step_times
                if settings.streamer is not None:
                    settings.streamer.put(settings.input_ids.cpu())
                self.loop(run)
                if settings.streamer is not None:
                    settings.streamer.end()
            self.stats = run.stats.summary(run.requests)
            return output(run, settings)

    def rule(self, sampling: bool) -> Verifier:
        """The acceptance rule for sampling or for greedy decoding: the one given where it is made for that, or is
        lossy for both by name, else the default. Raises PlanError where it would change the output."""
        verifier = self.verifier
        if verifier is not None and kinds_of(verifier, not sampling) and not kinds_of(verifier, sampling):
            verifier = None
        chosen = verifier or default_verifier(sampling=sampling)
        if self.drafter is not None:
            check_lossless(chosen, [self.drafter], self.policy, sampling=sampling)
        return chosen


def scores(decoder: Decoder, head: Decoder, rows: Rows) -> Tensor:
    """[rows.wanted, 1]: what a head says of rows whose hidden states the target's latest call left."""
    assert decoder.hidden is not None
    hidden = decoder.hidden[:, : read_width(head)]
    if len(rows.wanted) < len(rows):
        hidden = hidden[torch.tensor(rows.wanted, device=decoder.device)]
    return run_rows(head, [[0]] * len(hidden), [hidden])[0]


def output(run: Run, settings: Settings) -> Tensor | GenerateDecoderOnlyOutput:
    """The texts as transformers returns them."""
    new = [request.context.tokens[request.context.prompt_length :] for request in run.requests]
    longest = max(map(len, new))
    rows = [tokens + [settings.pad] * (longest - len(tokens)) for tokens in new]
    ids = settings.input_ids
    sequences = torch.cat([ids, torch.tensor(rows, dtype=ids.dtype, device=ids.device)], dim=1)
    if not settings.as_dict:
        return sequences
    values: dict[str, Any] = {"sequences": sequences, "scores": None, "logits": None}
    if settings.scores:
        values["scores"] = by_step([request.scores for request in run.requests], longest)
    if settings.logits:
        values["logits"] = by_step([request.logits for request in run.requests], longest)
    return GenerateDecoderOnlyOutput(**values)


def by_step(rows: list[list[Tensor]], steps: int) -> tuple[Tensor, ...]:
    """[vocabulary] by sequence and step -> [batch, vocabulary] by step, zeros where a sequence had ended."""
    blank = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([row[step] if step < len(row) else blank for row in rows]) for step in range(steps))
