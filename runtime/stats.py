"""Where the time of a generate() call went, and what speculation gained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from graft.runtime.request import Request


class Stats:
    """Seconds by phase, for steps with prompt rows in them and for the others.

    Phases: "model" (the target with its argmax and top-k), "draft" (proposing and learning), "calibration" (measuring
    step times, once for each compiled model), "overhead" (the rest).
    """

    def __init__(self) -> None:
        self.seconds = {True: dict.fromkeys(PHASES, 0.0), False: dict.fromkeys(PHASES, 0.0)}
        self.prefilling = False
        self.steps = 0
        self.latest = time.perf_counter()

    def start_step(self, prefilling: bool) -> None:
        """A step begins; what is marked until the next one counts for prompts, or for decoding."""
        self.prefilling = prefilling
        self.latest = time.perf_counter()

    def mark(self, phase: str) -> float:
        """The time since the last mark was spent on `phase`; how many seconds that is."""
        now = time.perf_counter()
        spent = now - self.latest
        self.seconds[self.prefilling][phase] += spent
        self.latest = now
        return spent

    def move(self, source: str, target: str, seconds: float) -> None:
        """Some of what was marked as `source` was spent on `target`."""
        self.seconds[self.prefilling][source] -= seconds
        self.seconds[self.prefilling][target] += seconds

    def end_step(self) -> None:
        """The step is over."""
        self.mark("overhead")
        if not self.prefilling:
            self.steps += 1

    def summary(self, requests: Sequence[Request]) -> dict[str, Any]:
        """What `CompiledModel.stats` shows.

        `steps` are target calls without prompt tokens, `steps_per_request` the calls that each request took part in
        after its prompt; `tokens_per_step` is new tokens but the first, by those calls, mean over all requests.
        """
        decode = self.seconds[False]
        per_request = [(request.new_tokens - 1, request.steps) for request in requests]
        steps = sum(steps for _, steps in per_request)
        return {
            "prompt_tokens": sum(request.context.prompt_length for request in requests),
            "new_tokens": sum(request.new_tokens for request in requests),
            "new_tokens_per_request": [request.new_tokens for request in requests],
            "steps": self.steps,
            "steps_per_request": [request.steps for request in requests],
            "tokens_per_step": sum(tokens for tokens, _ in per_request) / steps if steps else 0.0,
            "tokens_per_step_per_request": [tokens / steps if steps else 0.0 for tokens, steps in per_request],
            "drafted": sum(request.drafted for request in requests),
            "accepted": sum(request.accepted for request in requests),
            "drafted_per_request": [request.drafted for request in requests],
            "accepted_per_request": [request.accepted for request in requests],
            "prefill_seconds": sum(self.seconds[True].values()),
            "decode_seconds": sum(decode.values()) - decode["calibration"],
            "draft_seconds": decode["draft"],
            "model_seconds": decode["model"],
            "overhead_seconds": decode["overhead"],
            "calibration_seconds": decode["calibration"],
        }


PHASES = ("model", "draft", "calibration", "overhead")
