"""Progress for anything that takes more than a second or two: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.status import Status


class Progress:
    """Call it with what is being done now, such as "capturing LlamaForCausalLM"; use it as a context.

    On a terminal the current step is one live line with a spinner; elsewhere every step is a line of its own, with the
    seconds since the start, so that a log shows where the time went.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.quiet, self.start = quiet, time.perf_counter()
        self.status: Status | None = None
        self.live = not quiet and self.stream.isatty()

    def __call__(self, step: str) -> None:
        """What is being done from now on."""
        if self.quiet:
            return
        if not self.live:
            print(f"graft: {time.perf_counter() - self.start:6.1f} s  {step}", file=self.stream, flush=True)
        elif self.status is None:
            self.status = Status(step, console=Console(file=self.stream))
            self.status.start()
        else:
            self.status.update(step)

    def clear(self) -> None:
        """Take the live line away; the next step brings it back."""
        if self.status is not None:
            self.status.stop()
            self.status = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
