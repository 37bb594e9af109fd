"""What kernels cost, for the report and for predictions."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from graft.codegen.kernel_ir import Array, AtenKernel, ExpertKernel, GatherKernel, Kernel, Kernels, MatmulKernel
from graft.codegen.skips import guard_text
from graft.compiler.cost import ZERO, Cost, CostModel
from graft.compiler.notation import size_symbol
from graft.compiler.program import KernelRecord


def record(kernels: Kernels, names: Sequence[str]) -> tuple[KernelRecord, ...]:
    """One record for each kernel; `names` are those of its code, in order."""
    model = CostModel(kernels.function)
    return tuple(
        KernelRecord(
            name,
            tuple(node.name for node in kernel.nodes),
            kernel_cost(kernel, model),
            kernel.reason if isinstance(kernel, AtenKernel) else "",
            guard_text(kernel.guard) if kernel.guard else "",
        )
        for kernel, name in zip(kernels.kernels, names, strict=True)
    )


def kernel_cost(kernel: Kernel, model: CostModel) -> Cost:
    """The cost of a kernel: its nodes' operations, its operands' bytes; what stays inside moves nothing."""
    costs = [model.node(node) for node in kernel.nodes]
    shared = sum(array.width * array.dtype.itemsize for array in kernel.arrays if not array.rows)
    reads_parameters = isinstance(kernel, (GatherKernel, MatmulKernel, ExpertKernel))
    weights = sum((cost.weights for cost in costs), ZERO) if reads_parameters else shared
    return Cost(
        products=sum((cost.products for cost in costs), ZERO),
        elementwise=sum((cost.elementwise for cost in costs), ZERO),
        weights=sympy.sympify(weights),
        activations=sum((array_bytes(array) for array in kernel.arrays), ZERO),
        kv=sum((cost.kv for cost in costs), ZERO),
    )


def array_bytes(array: Array) -> sympy.Expr:
    """Bytes of an array, by the number of its rows."""
    return size_symbol(array.rows) * array.width * array.dtype.itemsize if array.rows else ZERO
