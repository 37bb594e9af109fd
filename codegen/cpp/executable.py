"""A function as one library call per step: weights packed, arrays in an arena, threads that stay."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from graft.codegen.arena import place_arrays, row_bytes
from graft.codegen.aten_pages import attend_pages
from graft.codegen.aten_rows import Loose, run_rows
from graft.codegen.cpp.isa import Isa, choose, processor_name
from graft.codegen.cpp.library import Call, load, print_code
from graft.codegen.cpp.memory import check_panels, pack_all
from graft.codegen.cpp.team import Team
from graft.codegen.kernel_ir import Array, AtenKernel, GatherKernel, Kernels, multiplied, parameters_behind
from graft.codegen.prediction import Prediction, cached_rates, calibrate, zero_states
from graft.codegen.records import record
from graft.codegen.regions import cut
from graft.codegen.skips import SkipCount, guarded_regions
from graft.compiler.program import Function, KernelRecord
from graft.compiler.shapes import attribute

PROFILED_STEPS = 6
"""Steps that are run for one measurement, the first of which does not count."""
MOST_BEST = 64
"""As in include/top.h."""
FIRST_ROWS = 32
"""Rows that the arena has room for at first."""


class CppExecutable:
    """A function as fused C++ on the CPU."""

    invariant = True
    """Every row's result is the same bits whatever other rows there are."""

    backend = "cpp"

    def __init__(
        self,
        function: Function,
        isa: Isa | None = None,
        threads: int | None = None,
        panels: Mapping[str, Tensor] | None = None,
        team: Team | None = None,
    ) -> None:
        """`panels` are parameters that are packed already, by name; the function's weights need not hold those. `team`
        is that of another function, which never runs at the same time; None for threads of its own.

        Raises LoweringError (build.NoCompiler where there is no compiler) if the library cannot be built.
        """
        self.function, self.isa = function, isa or choose(None)
        self.cut: Kernels = cut(function)
        products = [name for kernel in self.cut.kernels for name in multiplied(kernel)]
        gathers = [kernel.weight for kernel in self.cut.kernels if isinstance(kernel, GatherKernel)]
        # A table that another function multiplies with is there in panels already, and perhaps in no other form.
        self.packed = frozenset((*products, *(panels or {}).keys() & gathers))
        self.guarded = guarded_regions(self.cut.kernels)
        counters = {one.counter: number for number, one in enumerate(self.guarded)}
        self.code = print_code(self.cut.kernels, self.packed, counters)
        self.library, self.path = load(self.code.source, self.isa)
        self.threads = threads or min(torch.get_num_threads(), os.cpu_count() or 1)
        self.team = Team(self.library, self.threads) if team is None or team.wanted != self.threads else team
        self.panels: dict[str, Tensor] = {}
        """Packed parameters by name: tied ones are packed once."""
        self.keep: list[Tensor] = []
        """What the addresses point to."""
        self.addresses = np.zeros(len(self.code.places) + 1, np.int64)
        self.schedule, self.arguments = np.array(self.code.schedule, np.int32), np.array(self.code.arguments, np.int32)
        self.place_weights(panels or {})
        self.inputs = tuple(spec.name for spec in function.inputs)
        far = (spec.name for state in function.states for spec in state.far_inputs)
        self.given = (*self.inputs, *(f"state {index}" for index in range(len(function.states))), *far)
        self.external = frozenset((*self.inputs, *(array.name for array in self.cut.outputs)))
        self.offsets, self.bytes_per_row = place_arrays(self.cut.kernels, self.external)
        self.arrays = {array.name: array for kernel in self.cut.kernels for array in kernel.reads}
        self.seconds: np.ndarray | None = None
        """Where to add up what each compiled kernel takes, in their order; None, as a rule, measures nothing."""
        self.skipped = np.zeros((len(self.guarded), 4), np.int64)
        """Of every guard what `tally` of include/step.h adds up."""
        self.capacity = 0
        self.arena = torch.empty(0, dtype=torch.uint8)
        self.segments = [
            (is_aten, list(group))
            for is_aten, group in groupby(self.cut.kernels, lambda kernel: isinstance(kernel, AtenKernel))
        ]
        self.grow(FIRST_ROWS)

    @cached_property
    def kernels(self) -> tuple[KernelRecord, ...]:
        """What it runs, in order."""
        return record(self.cut, self.code.names)

    @cached_property
    def prediction(self) -> Prediction | None:
        """How long steps take here; measured once per machine and kept beside the library. None where ATen takes part,
        whose time is not predicted."""
        if any(isinstance(kernel, AtenKernel) for kernel in self.cut.kernels):
            return None
        key = f"{processor_name()}, {self.threads} threads"
        rates = cached_rates(self.path.with_name("rates.json"), key, lambda: calibrate(self.kernels, self.profile))
        return Prediction(self.kernels, rates)

    @property
    def skips(self) -> tuple[SkipCount, ...]:
        """See codegen.executable.Executable."""
        return tuple(one.count(*counts) for one, counts in zip(self.guarded, self.skipped.tolist(), strict=True))

    def forget_skips(self) -> None:
        """See codegen.executable.Executable."""
        self.skipped[:] = 0

    def profile(self, rows: int, context: int) -> np.ndarray:
        """Seconds of every kernel in a step of one sequence, the median of some steps over zeros."""
        states, far = zero_states(self.function.states, rows, context)
        count = torch.arange(rows)
        inputs = [count * 0 + 1, context + count, count * 0, count - 1, torch.tensor([context]), count]
        widths = ([size for size in spec.sizes if isinstance(size, int)] for spec in self.function.row_inputs)
        own = [
            torch.zeros(rows, *width, dtype=spec.dtype)
            for spec, width in zip(self.function.row_inputs, widths, strict=True)
        ]
        measured = []
        with self.at_work(), torch.inference_mode():
            try:
                for _ in range(PROFILED_STEPS):
                    self.seconds = np.zeros(len(self.schedule) // 2)
                    self.run((*inputs, *own, *states, *far))
                    measured.append(self.seconds)
            finally:
                self.seconds = None
        return np.median(measured[1:], axis=0)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of packed weights, and of the arena for what kernels hand to each other."""
        size = {id(tensor): tensor.nbytes for tensor in self.panels.values()}
        return {"packed weights": sum(size.values()), "arena": self.arena.nbytes}

    @property
    def source(self) -> str:
        """The generated C++."""
        return self.code.source

    def place_weights(self, given: Mapping[str, Tensor]) -> None:
        """Pack every parameter that is multiplied with and not among those given packed, once, and note where
        everything constant lies."""
        held = ((attribute(self.function.weights, name), panels) for name, panels in given.items())
        packed = {parameter.data_ptr(): panels for parameter, panels in held if not parameter.is_meta}
        self.pack_others(given, packed)
        for name, number in self.code.places.items():
            kind, _, path = name.partition(" ")
            if kind in ("weight", "bias", "table"):
                parameter: Tensor = attribute(self.function.weights, path).detach()
                if kind != "weight":
                    self.point(number, parameter.contiguous())
                    continue
                self.panels[path] = given[path] if path in given else packed[parameter.data_ptr()]
                check_panels(self.panels[path], parameter, path)
                self.point(number, self.panels[path])
            elif kind == "wide":
                constant = self.cut.constants[path]
                wide = torch.float64 if constant.dtype == torch.float64 else torch.float32
                self.point(number, constant.to(wide).contiguous())
            elif name in self.cut.constants:
                constant = self.cut.constants[name]
                self.point(number, constant.float() if constant.dtype == torch.bool else constant)

    def pack_others(self, given: Mapping[str, Tensor], packed: dict[int, Tensor]) -> None:
        """Add the panels of what is multiplied with and neither given nor packed, by where the parameter lies."""
        names = (name.removeprefix("weight ") for name in self.code.places if name.startswith("weight "))
        wanted = (attribute(self.function.weights, name).detach() for name in names if name not in given)
        todo = {parameter.data_ptr(): parameter for parameter in wanted}
        todo = {place: parameter for place, parameter in todo.items() if place not in packed}
        packed |= zip(todo, pack_all(list(todo.values())), strict=True)

    def read_plain(self) -> set[int]:
        """See codegen.executable.Executable."""
        aten = [kernel for kernel in self.cut.kernels if isinstance(kernel, AtenKernel)]
        read = [name for kernel in aten for name in parameters_behind(kernel.nodes, kernel.operands)]
        others = {attribute(self.function.weights, name).data_ptr() for name in read}
        constants = [node for node in self.cut.function.graph.nodes if node.name in self.cut.constants]
        others |= {attribute(self.function.weights, name).data_ptr() for name in parameters_behind(constants)}
        return others | {tensor.data_ptr() for tensor in self.keep}

    def point(self, number: int, tensor: Tensor) -> None:
        """Let an address be that of a tensor that stays."""
        self.keep.append(tensor)
        self.addresses[number] = tensor.data_ptr()

    def grow(self, rows: int) -> None:
        """Make room for so many rows in the arena."""
        self.capacity = rows
        self.arena = torch.empty(self.bytes_per_row * rows + 64, dtype=torch.uint8)
        start = -(-self.arena.data_ptr() // 64) * 64
        for name, offset in self.offsets.items():
            if name in self.code.places:
                self.addresses[self.code.places[name]] = start + offset * rows

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See codegen.executable.Executable."""
        with self.at_work():
            count = len(self.inputs)
            return self.run((*(one.contiguous() for one in inputs[:count]), *inputs[count:]))

    def share_threads(self, beside: object) -> None:
        """See codegen.executable.Executable."""
        if isinstance(beside, CppExecutable) and beside.team.wanted == self.threads and beside.team is not self.team:
            with self.at_work():
                self.team = beside.team

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Hold the threads: those that are this function's once they are free."""
        while True:
            team = self.team
            team.check()
            with team.lock:
                if team is self.team:
                    yield
                    return

    def top(self, logits: Tensor, count: int) -> Tensor | None:
        """See codegen.executable.Executable."""
        rows, width = logits.shape
        if logits.dtype != torch.float32 or not logits.is_contiguous() or not 0 < count <= min(width, MOST_BEST):
            return None
        ids = torch.empty(rows, count, dtype=torch.int64)
        with self.at_work():
            self.library.graft_top(self.team.handle, logits.data_ptr(), rows, width, count, ids.data_ptr())
        return ids

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """One step."""
        rows, results = inputs[0].shape[0], inputs[5].shape[0]
        if max(rows, results) > self.capacity:
            self.grow(max(rows, results, 2 * self.capacity))
        outputs = [
            torch.empty(results if array.rows == "R" else rows, array.width, dtype=array.dtype)
            for array in self.cut.outputs
        ]
        given = dict(zip(self.given, inputs, strict=True)) | {
            array.name: tensor for array, tensor in zip(self.cut.outputs, outputs, strict=True)
        }
        sizes = self.sizes(given)
        for name, tensor in given.items():
            if name in self.code.places:
                self.addresses[self.code.places[name]] = tensor.data_ptr()
        call = Call(
            rows,
            results,
            inputs[4].shape[0],
            *(given[name].data_ptr() for name in ("sequences", "parents", "lengths", "wanted")),
            sizes.ctypes.data,
            self.addresses.ctypes.data,
            self.schedule.ctypes.data,
            self.arguments.ctypes.data,
            seconds=self.seconds.ctypes.data if self.seconds is not None else None,
            # A measured step is none of the user's.
            skips=self.skipped.ctypes.data if self.seconds is None else None,
        )
        self.run_segments(call, given)
        return outputs[0], outputs[1]

    def sizes(self, given: dict[str, Tensor]) -> np.ndarray:
        """int64 [states, 2]: capacity, and how many pages a kv head may have."""
        found = np.zeros((len(self.function.states), 2), np.int64)
        for index, state in enumerate(self.function.states):
            found[index, 0] = given[f"state {index}"].shape[3]
            if state.pages is not None:
                found[index, 1] = given[f"{state.name}_table"].shape[3]
        return found

    def run_segments(self, call: Call, given: dict[str, Tensor]) -> None:
        """What is compiled in one call each, what ATen runs between."""
        loose: Loose = {}
        for is_aten, kernels in self.segments:
            if not is_aten:
                call.first, call.last = call.last, call.last + len(kernels)
                self.library.graft_run(self.team.handle, ctypes.byref(call))
                continue
            for kernel in kernels:
                assert isinstance(kernel, AtenKernel)
                if kernel.state >= 0:
                    attend_pages(kernel, given, call.rows, lambda name: self.array(name, given))
                    continue
                count = call.results if kernel.rows == "R" else call.rows
                run_rows(kernel, self.function.weights, count, lambda name: self.array(name, given), loose)

    def array(self, name: str, given: dict[str, Tensor]) -> Tensor:
        """An array as a tensor [rows, width]."""
        if name in given:
            return given[name].view(given[name].shape[0], -1)
        if name in self.cut.constants:
            return self.cut.constants[name].reshape(1, -1)
        array: Array = self.arrays[name]
        start = -self.arena.data_ptr() % 64 + self.offsets[name] * self.capacity
        size = array.width * array.dtype.itemsize * self.capacity
        assert size <= row_bytes(array) * self.capacity
        return self.arena[start : start + size].view(array.dtype).view(self.capacity, array.width)
