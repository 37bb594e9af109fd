"""The errors graft raises. Each says what was expected, what was found, where, and what to do about it."""

from __future__ import annotations


class GraftError(Exception):
    """Base of every error that graft raises on purpose.

    The message is built from parts, so that none of them is forgotten: `problem` is one sentence; `expected`,
    `found`, `where` and `remedy` are each a short phrase or None.
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: object = None,
        found: object = None,
        where: object = None,
        remedy: str | None = None,
    ) -> None:
        self.problem, self.expected, self.found, self.where, self.remedy = problem, expected, found, where, remedy
        parts = [("expected", expected), ("found", found), ("where", where), ("what to do", remedy)]
        super().__init__("\n".join([problem, *(f"  {name}: {value}" for name, value in parts if value is not None)]))


class CaptureError(GraftError):
    """The model cannot be captured; names the module and the reason."""


class CheckError(GraftError):
    """A program is not well formed; names the function, the node and the rule."""


class PassError(GraftError):
    """A pass failed or matched nothing; the program is as it was before the pass."""


class PlanError(GraftError):
    """A plan cannot be read, or its parts do not go together."""


class CheckpointError(GraftError):
    """Trained parts of a drafter cannot be read: names the file and the tensors that are missing, surplus or wrong."""


class LoweringError(GraftError):
    """A function cannot be turned into something that runs."""


class StateError(GraftError):
    """A transaction rule of the KV store was broken, or its memory is exhausted."""


class GenerationError(GraftError):
    """generate() was asked for something impossible or unsupported, or the model returned no usable logits."""


class SaveError(GraftError):
    """A compiled model cannot be saved, or what was saved cannot be loaded: damaged, or made by something else."""
