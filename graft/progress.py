"""Progress for anything that takes more than a second or two: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.status import Status


class Progress:
    """Call it with what is being done now, such as "capturing LlamaForCausalLM"; use it as a context.

    On a terminal the current step is one live line with a spinner, and a bar where it is known how much of the work is
    done; elsewhere every step is a line of its own, with the seconds since the start, for logs.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.quiet, self.start = quiet, time.perf_counter()
        self.status: Status | None = None
        self.bar: Bar | None = None
        self.live = not quiet and self.stream.isatty()

    def __call__(self, step: str, done: float | None = None) -> None:
        """What is being done from now on; `done` is the part of the work that is behind, from 0 to 1."""
        if self.quiet:
            return
        if not self.live:
            print(f"graft: {time.perf_counter() - self.start:6.1f} s  {step}", file=self.stream, flush=True)
            return
        if (self.bar if done is None else self.status) is not None:
            self.clear()
        if done is not None:
            if self.bar is None:
                text = TextColumn("{task.description}", markup=False)
                columns = (SpinnerColumn(), text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
                self.bar = Bar(*columns, console=Console(file=self.stream), transient=True)
                self.bar.add_task(step, total=1.0)
                self.bar.start()
            self.bar.update(self.bar.task_ids[0], description=step, completed=done)
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
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
