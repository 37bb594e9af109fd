"""What a printed kernel is, and how values of the IR's dtypes are written in Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from graft.codegen.kernel_ir import Heads
from graft.codegen.row_builder import computing
from graft.compiler.errors import LoweringError

TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "fp32",
}
"""Dtype of an array -> as Triton's signatures name it."""
NAMES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.float16: "tl.float16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int64",
}
"""Dtype -> what values of it are converted with; bfloat16 has to_bf16."""


@dataclass(frozen=True)
class Grid:
    """How many programs: one for `height` rows each, times `tiles`, times `parts`."""

    rows: str
    height: int = 1
    tiles: int = 1
    parts: int = 1

    def programs(self, count: int) -> tuple[int, int, int]:
        """For a call in which there are `count` of those rows."""
        return -(-count // self.height), self.tiles, self.parts


@dataclass(frozen=True)
class Printed:
    """A kernel's code, and how it is launched."""

    kind: str
    parameters: tuple[tuple[str, str], ...]
    """Name and type, as Triton's signatures have it, of each parameter."""
    body: tuple[str, ...]
    arguments: tuple[str, ...]
    """For each parameter the name of an array, "weight NAME", "state INDEX LAYER", "layout NAME", or a number's."""
    grid: Grid
    scratch: int = 0
    """Words of four bytes for each row that the kernel needs for itself."""
    warps: int = 4
    stages: int = 2
    barrier: bool = False
    """Whether its threads read what others of the same program have written to memory."""
    unaligned: tuple[str, ...] = ()
    """Parameters whose address is a multiple of 16 bytes in some calls only."""

    def text(self, name: str, comment: str) -> str:
        """The kernel as a function."""
        # A number that is 1, or a multiple of 16, would get code of its own, in which sums might be taken in another
        # order: rows would no longer be the same whatever their company.
        numbers = [name for name, kind in self.parameters if not kind.startswith("*")]
        options = [f"do_not_specialize={numbers}"] if numbers else []
        options += [f"do_not_specialize_on_alignment={[*self.unaligned]}"] if self.unaligned else []
        call = f"({', '.join(options)})" if options else ""
        names = ", ".join(name for name, _ in self.parameters)
        lines = [f"@triton.jit{call}", f"def {name}({names}):", *(f"    {line}" for line in self.body)]
        return f"# {comment}\n" + "\n".join(lines).replace("'", '"') + "\n"


def widened(value: str, dtype: torch.dtype) -> str:
    """A loaded element as a number of the computing dtype."""
    return value if computing(dtype) == dtype or dtype == torch.bool else f"{value}.to({NAMES[computing(dtype)]})"


def rounded(value: str, inside: torch.dtype, dtype: torch.dtype) -> str:
    """A number rounded to a dtype, as a number of the dtype that this is computed in."""
    if dtype in (inside, torch.bool):
        return value
    return widened(narrowed(value, dtype), dtype)


def narrowed(value: str, dtype: torch.dtype) -> str:
    """A number as an element of that dtype."""
    return f"to_bf16({value})" if dtype == torch.bfloat16 else f"({value}).to({NAMES[dtype]})"


def literal(value: float) -> str:
    """A number as Python writes it, with all its digits."""
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def heads_at(base: str, heads: Heads, head: str) -> str:
    """Where the vector of a head starts."""
    return f"{base} + {heads.offset} + {head} * {heads.stride}"


def supported(dtype: torch.dtype, what: str) -> None:
    """LoweringError for a dtype that the matrix unit is not used with."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise LoweringError(
            "there is no Triton kernel for this dtype",
            expected="float32, bfloat16 or float16",
            found=dtype,
            where=what,
            remedy="convert the model, or use the ATen backend",
        )
