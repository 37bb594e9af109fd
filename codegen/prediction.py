"""How long a function takes on this machine: the formulas of its kernels' costs, and rates that were measured.

A product takes as long as the slower of reading its weights and multiplying; attention reads keys and values, then
multiplies; everything row-wise moves its operands. Each kernel has a start besides, on which the threads agree.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import sympy
import torch
from torch import Tensor

from graft.compiler.cost import CONTEXT, SEQUENCES, ZERO
from graft.compiler.kv.codecs import PAGE
from graft.compiler.notation import size_symbol
from graft.compiler.program import KernelRecord, KVState

Profile = Callable[[int, int], np.ndarray]
"""(rows, context) -> seconds of every kernel in one step, a median over some."""
FEW, MANY = (1, 64), (32, 64)
FAR_FEW, FAR_MANY = (1, 1024), (16, 1024)
"""(rows, tokens of context) of the steps that are measured."""
OTHERS = "others"
"""All kernels that are neither products nor attention."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, as kernels of ours see it."""

    weights: float
    """Bytes of packed weights read."""
    products: float
    """Floating-point operations in products with weights."""
    cache: float
    """Bytes of keys and values read."""
    attention: float
    """Floating-point operations in attention."""
    activations: float
    """Bytes that row kernels move."""
    start: float
    """Seconds from one kernel to the next."""


class Prediction:
    """Seconds of a step by rows and context."""

    def __init__(self, kernels: Sequence[KernelRecord], rates: Rates) -> None:
        self.rates = rates
        self.formula = sympy.Add(*(kernel_seconds(kernel, rates) for kernel in kernels))
        symbols = (size_symbol("N"), size_symbol("R"), CONTEXT, SEQUENCES)
        self.evaluate = sympy.lambdify(symbols, self.formula, modules=[{"Max": max, "Min": min}])

    def seconds(self, rows: int, context: int) -> float:
        """Seconds of a step over `rows` rows of one sequence, all logits wanted, `context` tokens behind them."""
        return float(self.evaluate(rows, rows, context, 1))


def kernel_seconds(kernel: KernelRecord, rates: Rates) -> sympy.Expr:
    """Seconds of one kernel, in the sizes of a call."""
    cost = kernel.cost
    match kind_of(kernel):
        case "matmul":
            return rates.start + sympy.Max(cost.weights / rates.weights, cost.products / rates.products)
        case "attend":
            return rates.start + cost.kv / rates.cache + cost.products / rates.attention
    return rates.start + cost.activations / rates.activations


def kind_of(kernel: KernelRecord) -> str:
    """The kind of a kernel, from the name of its code; products with experts are products."""
    kind = kernel.name.rpartition("_")[0]
    return "matmul" if kind == "experts" else kind


def calibrate(kernels: Sequence[KernelRecord], profile: Profile) -> Rates:
    """Rates from a few measured steps."""
    few, many, far_few, far_many = (Measured(kernels, *at, profile(*at)) for at in (FEW, MANY, FAR_FEW, FAR_MANY))
    # The same keys and values are read for one row and for many, so the difference is arithmetic.
    work = far_many.amount("products", "attend") - far_few.amount("products", "attend")
    # A function without attention has done none, and nothing of it is predicted by these rates.
    attention = max(work / positive(far_many.seconds("attend") - far_few.seconds("attend")), 1.0)
    reading = far_few.seconds("attend") - far_few.amount("products", "attend") / attention
    moved = many.amount("activations", OTHERS) - few.amount("activations", OTHERS)
    return Rates(
        weights=few.amount("weights", "matmul") / positive(few.seconds("matmul")),
        products=many.amount("products", "matmul") / positive(many.seconds("matmul")),
        cache=far_few.amount("kv", "attend") / positive(max(reading, 0.05 * far_few.seconds("attend"))),
        attention=attention,
        activations=moved / positive(many.seconds(OTHERS) - few.seconds(OTHERS)),
        start=few.shortest(OTHERS),
    )


@dataclass(frozen=True)
class Measured:
    """One measured step, by kinds of kernels."""

    kernels: Sequence[KernelRecord]
    rows: int
    context: int
    each: np.ndarray
    """Seconds of every kernel."""

    def chosen(self, kind: str) -> list[bool]:
        """Which kernels are of a kind."""
        kinds = map(kind_of, self.kernels)
        return [one == kind or (kind == OTHERS and one not in ("matmul", "attend")) for one in kinds]

    def seconds(self, kind: str) -> float:
        """What kernels of a kind took together."""
        return float(self.each[self.chosen(kind)].sum())

    def shortest(self, kind: str) -> float:
        """What the quickest of a kind took."""
        return float(self.each[self.chosen(kind)].min(initial=1e-6))

    def amount(self, part: str, kind: str) -> float:
        """A part of the cost of kernels of a kind: FLOPs or bytes."""
        pairs = zip(self.kernels, self.chosen(kind), strict=True)
        formula = sympy.Add(ZERO, *(getattr(kernel.cost, part) for kernel, taken in pairs if taken))
        sizes = {size_symbol("N"): self.rows, size_symbol("R"): self.rows, CONTEXT: self.context, SEQUENCES: 1}
        return float(formula.subs(sizes))


def zero_states(states: Sequence[KVState], rows: int, context: int) -> tuple[list[Tensor], list[Tensor]]:
    """States of zeros for steps over `rows` rows behind `context` tokens of one sequence, and their far inputs.

    Pages are all different, so that reading them takes what it takes.
    """
    tensors: list[Tensor] = []
    given: list[Tensor] = []
    for state in states:
        far = kept = 0
        if state.pages is not None:
            far = state.pages.cut(context)
            kept = int(far * (state.pages.eviction.ratio if state.pages.eviction else 1))
        in_place = state.pages is None or state.pages.codec.in_place
        tail = context if in_place else context - far
        tensors.append(torch.zeros(state.layers, 1, state.heads, tail + rows, state.width, dtype=state.dtype))
        most = -(-kept // PAGE)
        sizes = {"S": 1, "P": most, "G": max(1, state.layers * state.heads * most)}
        zeros = {
            spec.name.removeprefix(f"{state.name}_"): torch.zeros(
                [sizes[size] if isinstance(size, str) else size for size in spec.sizes], dtype=spec.dtype
            )
            for spec in state.far_inputs
        }
        if zeros:
            zeros["lengths"] += tail
            zeros["starts"] += far if in_place else 0
            zeros["table"] += torch.arange(zeros["table"].numel(), dtype=torch.int32).view_as(zeros["table"])
            zeros["counts"] += kept
        given += zeros.values()
    return tensors, given


def positive(seconds: float) -> float:
    """Seconds to divide by."""
    return max(seconds, 1e-12)


def cached_rates(path: Path, key: str, measure: Callable[[], Rates]) -> Rates:
    """The rates kept in a JSON file under `key`, measured where there are none; a file that cannot be read counts as
    empty, and one that cannot be written is left."""
    known: dict[str, Mapping[str, float]] = {}
    try:
        known = json.loads(path.read_text())
        return Rates(**{field.name: float(known[key][field.name]) for field in fields(Rates)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        rates = measure()
    kept = {**(known if isinstance(known, dict) else {}), key: asdict(rates)}
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_text(json.dumps(dict(list(kept.items())[-16:]), indent=1))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
    return rates
