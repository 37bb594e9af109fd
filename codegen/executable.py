"""What the runtime runs in the place of a function; passes and runtime see nothing more of codegen than this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from graft.codegen.prediction import Prediction
from graft.compiler.program import KernelRecord


class Executable(Protocol):
    """A lowered function on flat rows (compiler.program.FLAT). States are written in place and not returned."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of FLAT in that order, then the states. Returns logits [R, vocabulary] float32 (float64 for a
        float64 model) and hidden [N, width] in the model's dtype."""

    def top(self, logits: Tensor, count: int) -> Tensor | None:
        """int64 [rows, count]: the ids of the best of float32 [rows, vocabulary], best first, of equals the lowest id;
        None where it has no code for them."""

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
    def memory(self) -> Mapping[str, int]:
        """Bytes by what they are for: "weights" of its own (packed copies), "arena"."""

    def release(self, modules: Sequence[nn.Module]) -> int:
        """Give up the modules' parameters that are held packed (codegen.release); returns the bytes given back."""

    @property
    def backend(self) -> str:
        """Which of codegen.lowering.BACKENDS this is."""

    def replaced(self) -> Mapping[str, Tensor]:
        """Parameters that it holds packed and needs in no other form, by name; what `lower` takes as `panels`."""

    @property
    def source(self) -> str:
        """The code that runs, for reading."""
