"""Row kernels made from operators by hand, compiled and run, for tests of what they compute."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graft.codegen.cpp.isa import Isa, detect
from graft.codegen.cpp.library import Call, Code, load, print_code
from graft.codegen.kernel_ir import Array, RowKernel
from graft.codegen.row_builder import RowBuilder
from graft.codegen.row_form import ROW, Form, View, look_through, whole
from graft.compiler.canonical import VIEWS


@dataclass
class Rows:
    """Operators on values whose dim 0 is that of rows. A value is known by its node; `values` has what torch gives."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, Tensor] = field(default_factory=dict)
    views: dict[fx.Node, View] = field(default_factory=dict)
    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)

    def input(self, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"input_{len(self.inputs)}")
        self.inputs.append(node)
        return self.known(node, value)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        real_args, real_kwargs = fx.map_arg((args, kwargs), self.values.__getitem__)
        self.known(node, target(*real_args, **real_kwargs))
        if target in VIEWS:
            found = look_through(node, self.views[args[0]], form(self.values[node]))
            assert found is not None
            self.views[node] = found
        else:
            self.nodes.append(node)
        return node

    def known(self, node: fx.Node, value: Tensor) -> fx.Node:
        self.values[node] = node.meta["val"] = value
        self.views[node] = whole(node, form(value))
        return node

    def array(self, node: fx.Node) -> Array:
        dtype = torch.float32 if self.values[node].dtype == torch.bool else self.values[node].dtype
        return Array(node.name, dtype, form(self.values[node]).width, "N")

    def kernel(self, results: Sequence[fx.Node]) -> RowKernel:
        builder = RowBuilder("N", self.views, self.array)
        for node in self.nodes:
            builder.add(node)
        return builder.finish(results)


def form(value: Tensor) -> Form:
    return Form((ROW, *value.shape[1:]), "N", value.dtype)


class Library:
    """Kernels of several `Rows`, compiled as one; each is run over any number of rows."""

    def __init__(self, parts: Sequence[tuple[Rows, Sequence[fx.Node]]], isa: Isa | None = None) -> None:
        self.parts = parts
        self.code = print_code(tuple(rows.kernel(results) for rows, results in parts), frozenset(), {})
        self.library, _ = load(self.code.source, isa or detect())

    def run(self, part: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results of one part, in their order."""
        rows, results = self.parts[part]
        count = inputs[0].shape[0]
        tensors = {
            node.name: tensor.to(rows.array(node).dtype).contiguous()
            for node, tensor in zip(rows.inputs, inputs, strict=True)
        }
        for node in results:
            array = rows.array(node)
            tensors[node.name] = torch.full((count, array.width), 77, dtype=array.dtype)
        run_kernel(self.code, self.library, part, tensors, count)
        return [
            tensors[node.name].reshape(count, *rows.values[node].shape[1:]).to(rows.values[node].dtype)
            for node in results
        ]


def run_kernel(
    code: Code,
    library: Any,
    number: int,
    tensors: Mapping[str, Tensor],
    count: int,
    threads: int = 1,
    addresses: Mapping[str, int] | None = None,
) -> None:
    """Run one kernel over so many rows, on tensors by the names in its arguments, or on what lies at addresses."""
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()} | dict(addresses or {})
    numbers = np.zeros(len(code.places) + 1, np.int64)
    for name, place in places.items():
        if name in code.places:
            numbers[code.places[name]] = place
    schedule, arguments = (np.array(one, np.int32) for one in (code.schedule, code.arguments))
    zeros = torch.zeros(max(count, 1), dtype=torch.int64)
    parents = zeros - 1
    call = Call(
        count, count, 1,
        *(zeros.data_ptr(), parents.data_ptr(), zeros.data_ptr(), zeros.data_ptr(), None),
        *(one.ctypes.data for one in (numbers, schedule, arguments)),
        number, number + 1,
    )  # fmt: skip
    team = library.graft_open(threads)
    library.graft_run(team, ctypes.byref(call))
    library.graft_close(team)
