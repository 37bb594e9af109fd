"""What the runtime runs in the place of a function; passes and runtime see nothing more of codegen than this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from graft.codegen.prediction import Prediction
from graft.codegen.skips import SkipCount
from graft.compiler.program import Function, KernelRecord


class Executable(Protocol):
    """A lowered function on flat rows (compiler.program.FLAT). States are written in place and not returned.

    A program's functions are lowered one after the other, each with the `panels` of those before it, so that what
    several of them multiply with is packed once; what may be given up or stored packed is decided for all of them
    together (codegen.release).
    """

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The function's inputs in its order, then the states. Returns logits [R, vocabulary] float32 (float64 for a
        float64 model) and hidden [N, width] in the model's dtype."""

    def top(self, logits: Tensor, count: int) -> Tensor | None:
        """int64 [rows, count]: the ids of the best of float32 [rows, vocabulary], best first, of equals the lowest id;
        None where it has no code for them."""

    def share_threads(self, beside: Executable) -> None:
        """Work from now on with the threads of another function, which runs before or after this one and never at the
        same time. Nothing where the two have no threads of one number in common."""

    @property
    def invariant(self) -> bool:
        """Whether a row's result is the same, bit for bit, whatever other rows ride along."""

    @property
    def kernels(self) -> tuple[KernelRecord, ...]:
        """What it runs, in order; empty where ATen runs all of it."""

    @property
    def prediction(self) -> Prediction | None:
        """How long steps take on this machine; None where that cannot be predicted."""

    @property
    def skips(self) -> tuple[SkipCount, ...]:
        """How often what masks guard was skipped since `forget_skips`, in order of the guards. ATen computes all of it
        and counts what was not needed. Empty where nothing is guarded, and for Triton, whose kernels do not count."""

    def forget_skips(self) -> None:
        """Begin to count anew."""

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes by what they are for: "weights" of its own (packed copies), "arena"."""

    @property
    def backend(self) -> str:
        """Which of codegen.lowering.BACKENDS this is."""

    @property
    def function(self) -> Function:
        """What it runs."""

    @property
    def panels(self) -> Mapping[str, Tensor]:
        """Parameters that it reads packed, by name; what `lower` takes as `panels`."""

    def read_plain(self) -> set[int]:
        """Where the parameters lie (data_ptr) that it reads as the model holds them, or needs so to be built again."""

    @property
    def source(self) -> str:
        """The code that runs, for reading."""
