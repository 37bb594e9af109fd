"""A function as Triton kernels: arrays in an arena, weights where they are, CUDA graphs for steps of few rows."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from graft.codegen.arena import place_arrays
from graft.codegen.aten_pages import attend_pages
from graft.codegen.aten_rows import Loose, run_rows
from graft.codegen.kernel_ir import Array, AtenKernel, Kernels
from graft.codegen.prediction import Prediction
from graft.codegen.records import record
from graft.codegen.regions import cut
from graft.codegen.skips import SkipCount
from graft.codegen.triton.layout import lay_out, levels_of
from graft.codegen.triton.library import Launch, load, print_code
from graft.codegen.triton.pages import views_of
from graft.compiler.errors import LoweringError
from graft.compiler.kv.codecs import PAGE
from graft.compiler.program import Function, KernelRecord, KVState
from graft.compiler.shapes import attribute

ABSENT = {"sequences": -1, "parents": -1}
"""What the rows are filled up with, where not with 0, that a bucket has beyond those of the call."""
MOST_ROWS = 64
"""Steps of at most so many rows run in buckets, as CUDA graphs; larger ones are bound by their work, not launches."""
MOST_GRAPHS = 16
"""Buckets that are kept; the one not used for longest goes first."""
Step = Callable[[], None]


@dataclass
class Bucket:
    """Everything that a call with so many rows and results, on states at these addresses, is run with."""

    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    layout: dict[str, Tensor]
    room: list[Tensor]
    """What kernels need for themselves beside the arena."""
    segments: list[tuple[bool, list[Step]]]
    """Steps in order; true for those that launch kernels and so can be a CUDA graph."""
    loose: Loose = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)
    """Rows and results of the call that runs now: "N" and "R"."""
    graphs: list[torch.cuda.CUDAGraph | None] = field(default_factory=list)
    """For each segment its graph; empty before the first call."""


class TritonExecutable:
    """A function as Triton kernels on a GPU; on the CPU under TRITON_INTERPRET=1, for tests."""

    backend = "triton"
    invariant = True
    """Every row's result is the same bits whatever other rows there are."""

    def __init__(self, function: Function) -> None:
        """Raises LoweringError where the function's parameters are on a device that Triton does not run on, or are of a
        dtype without kernels, and where a KV state has pages that there are none for."""
        self.function = function
        self.device = function.device
        check_device(self.device)
        with torch.no_grad():
            self.cut: Kernels = cut(function)
        self.code = print_code(self.cut.kernels)
        self.module = load(self.code.source)
        self.mixed = any(isinstance(step, AtenKernel) for step in self.code.steps)
        self.parameters: dict[str, Tensor] = {}
        self.lock = threading.Lock()
        self.constants = {name: self.constant(value) for name, value in self.cut.constants.items()}
        self.given = [spec.name for spec in function.signature]
        small = (spec for state in function.states for spec in state.far_inputs if spec.sizes == ("S",))
        self.inputs = {spec.name: spec for spec in (*function.inputs, *small)}
        external = frozenset((*self.inputs, *(array.name for array in self.cut.outputs)))
        self.offsets, self.bytes_per_row = place_arrays(self.cut.kernels, external)
        scratch = max((launch.printed.scratch for launch in self.code.launches), default=0)
        self.scratch_at, self.bytes_per_row = self.bytes_per_row, self.bytes_per_row + -(-scratch // 16) * 64
        self.arrays = {array.name: array for kernel in self.cut.kernels for array in kernel.reads}
        self.arena = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.buckets: OrderedDict[object, Bucket] = OrderedDict()

    @cached_property
    def kernels(self) -> tuple[KernelRecord, ...]:
        """What it runs, in order."""
        return record(self.cut, self.code.names)

    @property
    def prediction(self) -> Prediction | None:
        """None: GPUs are not measured for it."""
        return None

    skips: tuple[SkipCount, ...] = ()

    def share_threads(self, beside: object) -> None:
        """See codegen.executable.Executable: there are none."""

    def forget_skips(self) -> None:
        """See codegen.executable.Executable."""

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the arena for what kernels hand to each other; parameters are read where they are."""
        return {"arena": self.arena.nbytes}

    def top(self, logits: Tensor, count: int) -> Tensor | None:
        """See codegen.executable.Executable."""
        return None

    panels: Mapping[str, Tensor] = MappingProxyType({})

    def read_plain(self) -> set[int]:
        """See codegen.executable.Executable: no parameter is held in another form."""
        names = [node.target for node in self.function.graph.nodes if node.op == "get_attr"]
        return {attribute(self.function.weights, name).data_ptr() for name in names}

    @property
    def source(self) -> str:
        """The generated Triton."""
        return self.code.source

    def constant(self, value: Tensor) -> Tensor:
        """A constant as kernels read it."""
        value = value.to(self.device)
        return value.float() if value.dtype == torch.bool else value.contiguous()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See codegen.executable.Executable."""
        # Triton launches on the current device.
        here = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with self.lock, torch.no_grad(), here:
            return self.run(inputs)

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """One step: inputs copied into the bucket's, its segments, the part of its outputs that is the call's."""
        given = dict(zip(self.given, inputs, strict=True))
        stored = {name: tensor for name, tensor in given.items() if name not in self.inputs}
        count = {"N": given["tokens"].shape[0], "R": given["wanted"].shape[0]}
        # Rows that a bucket has beyond the call's are not computed by ATen: what lies there could be anything.
        sizes = count if self.mixed else {kind: bucket_size(size) for kind, size in count.items()}
        places = ((tensor.data_ptr(), tensor.shape) for tensor in stored.values())
        key = (*sizes.values(), len(given["lengths"]), *places)
        small = max(sizes.values()) <= MOST_ROWS
        bucket = self.buckets.get(key) if small else None
        if bucket is None:
            bucket = self.make_bucket(sizes, len(given["lengths"]), stored)
            if small:
                self.buckets[key] = bucket
        if small:
            self.buckets.move_to_end(key)
            while len(self.buckets) > MOST_GRAPHS:
                self.buckets.popitem(last=False)
        for name, buffer in bucket.inputs.items():
            size = len(given[name])
            buffer[:size].copy_(given[name])
            if size < len(buffer):
                buffer[size:].fill_(ABSENT.get(name, 0))
        bucket.count.update(count)
        self.run_segments(bucket, small and self.device.type == "cuda")
        parts = [out[: count[array.rows]] for out, array in zip(bucket.outputs, self.cut.outputs, strict=True)]
        # A bucket's own outputs are overwritten by its next call.
        return (parts[0].clone(), parts[1].clone()) if small else (parts[0], parts[1])

    def run_segments(self, bucket: Bucket, captured: bool) -> None:
        """Run a bucket. Its first run compiles what has not run yet, which cannot be captured."""
        for at, (_, steps) in enumerate(bucket.segments):
            graph = bucket.graphs[at] if bucket.graphs else None
            if graph is not None:
                graph.replay()
            else:
                for step in steps:
                    step()
        if captured and not bucket.graphs:
            bucket.graphs = [capture(steps) if ours else None for ours, steps in bucket.segments]
            for ours, steps in bucket.segments:
                if ours:
                    steps.clear()  # they would keep a KV state alive that has been replaced by a larger one

    def make_bucket(self, sizes: dict[str, int], slots: int, stored: dict[str, Tensor]) -> Bucket:
        """Buffers for a number of rows and results, and what is launched on them: `stored` are the states and what is
        read of them beside their tensors, by name."""
        if max(sizes.values()) > self.rows:
            self.grow(max(*sizes.values(), 2 * self.rows if self.rows else 1))
        lengths = {"N": sizes["N"], "R": sizes["R"], "S": slots}
        inputs = {
            name: torch.zeros(
                [lengths[size] if isinstance(size, str) else size for size in spec.sizes],
                dtype=spec.dtype,
                device=self.device,
            )
            for name, spec in self.inputs.items()
        }
        outputs = tuple(
            torch.empty(sizes[array.rows], array.width, dtype=array.dtype, device=self.device)
            for array in self.cut.outputs
        )
        named: dict[str, Any] = {**self.constants, **inputs, "levels": levels_of(sizes["N"])}
        named |= {array.name: out for array, out in zip(self.cut.outputs, outputs, strict=True)}
        named |= {f"rows {kind}": size for kind, size in sizes.items()}
        named |= {name: self.stored(name, self.arrays[name]) for name in self.offsets}
        named["scratch"] = self.arena[self.scratch_at * self.rows :].view(torch.float32)
        room: list[Tensor] = []
        for number, state in enumerate(self.function.states):
            tensor = stored[state.name]
            named[f"state {number}"], named[f"capacity {number}"] = tensor, tensor.shape[3]
            named |= {f"state {number} {layer}": tensor[layer] for layer in range(state.layers)}
            if state.pages is not None:
                table, counts = (stored[f"{state.name}_{name}"] for name in ("table", "counts"))
                named |= views_of(f"{state.name}_pages", stored[f"{state.name}_pages"], state.dtype)
                named[f"pages {number}"] = table.shape[3]
                named |= self.selecting(number, state, stored, sizes["N"])
                room += [named[f"scores {number}"]] if state.pages.selection is not None else []
                for layer in range(state.layers):
                    named[f"{state.name}_table {layer}"] = table[layer]
                    named[f"{state.name}_counts {layer}"] = counts[layer]
        named |= stored
        layout = {name: torch.empty_like(value) for name, value in self.lay_out(inputs).items()}
        named |= {f"layout {name}": value for name, value in layout.items()}
        bucket = Bucket(inputs, outputs, layout, room, [])
        first: list[Step] = [partial(self.refresh, layout, inputs)]
        bucket.segments.append((True, first))
        for ours, group in groupby(self.code.steps, lambda step: isinstance(step, Launch)):
            steps = [
                self.launch(one, named, sizes) if isinstance(one, Launch) else self.aten(one, named, bucket)
                for one in group
            ]
            if ours and len(bucket.segments) == 1 and len(first) == 1:
                first += steps
            else:
                bucket.segments.append((ours, steps))
        return bucket

    def selecting(self, number: int, state: KVState, stored: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
        """What kernels that choose among a state's far entries read, and room for the scores of every row."""
        if state.pages is None or state.pages.selection is None:
            return {}
        labels, channels, table = (stored[f"{state.name}_{name}"] for name in ("labels", "channels", "table"))
        units = PAGE // state.pages.selection.size
        found = views_of(f"{state.name}_labels", labels, state.dtype)
        found |= {f"{state.name}_channels {layer}": channels[layer] for layer in range(state.layers)}
        scores = torch.empty(rows * state.heads * table.shape[3] * units, dtype=torch.int32, device=self.device)
        return found | {f"scores {number}": scores}

    @property
    def rows(self) -> int:
        """How many rows the arena has room for."""
        return self.arena.numel() // max(self.bytes_per_row, 1)

    def grow(self, rows: int) -> None:
        """Make room for so many rows; what was bound to the old room goes."""
        self.buckets.clear()
        self.arena = torch.empty(self.bytes_per_row * rows, dtype=torch.uint8, device=self.device)

    def stored(self, name: str, array: Array) -> Tensor:
        """An array in the arena, [rows, width]."""
        start, size = self.offsets[name] * self.rows, array.width * array.dtype.itemsize * self.rows
        return self.arena[start : start + size].view(array.dtype).view(self.rows, array.width)

    def lay_out(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where the rows stand."""
        return lay_out(inputs["sequences"], inputs["parents"], inputs["lengths"])

    def refresh(self, layout: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        """Compute the layout of the rows that the inputs hold now."""
        for name, value in self.lay_out(inputs).items():
            layout[name].copy_(value)

    def launch(self, launch: Launch, named: dict[str, Any], sizes: dict[str, int]) -> Step:
        """One kernel on its operands."""
        printed = launch.printed
        grid = printed.grid.programs(sizes[printed.grid.rows])
        arguments = [named[name] if name in named else self.parameter(name) for name in printed.arguments]
        function = getattr(self.module, launch.function)[grid]
        # On AMD GPUs a barrier does not wait for what has been written to memory; a single wave needs none.
        warps = 1 if printed.barrier and torch.version.hip else printed.warps
        # What the source does not fuse is not fused: see device.py.
        return partial(function, *arguments, num_warps=warps, num_stages=printed.stages, enable_fp_fusion=False)

    def parameter(self, name: str) -> Tensor:
        """The parameter of "weight NAME" or "bias NAME", as the model holds it, or of "transposed NAME"."""
        if name not in self.parameters:
            form, _, path = name.partition(" ")
            held = attribute(self.function.weights, path).detach()
            self.parameters[name] = (held.mT if form == "transposed" else held).contiguous()
        return self.parameters[name]

    def aten(self, kernel: AtenKernel, named: dict[str, Any], bucket: Bucket) -> Step:
        """Nodes that ATen runs, row by row."""
        arrays: dict[str, Tensor] = {array.name: named[array.name] for array in kernel.reads}

        def array(name: str) -> Tensor:
            value = arrays[name]
            return value.reshape(1, -1) if name in self.constants else value.view(value.shape[0], -1)

        if kernel.state >= 0:
            return lambda: attend_pages(kernel, named, bucket.count["N"], array)
        return lambda: run_rows(kernel, self.function.weights, bucket.count[kernel.rows], array, bucket.loose)


def bucket_size(count: int) -> int:
    """Powers of two up to MOST_ROWS."""
    return 1 << (count - 1).bit_length() if 0 < count <= MOST_ROWS else count


def capture(steps: list[Step]) -> torch.cuda.CUDAGraph:
    """Steps as a CUDA graph; they must have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for step in steps:
            step()
    return graph


def check_device(device: torch.device) -> None:
    """LoweringError unless Triton runs on the device here."""
    import triton

    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise LoweringError(
            "Triton runs on a GPU",
            expected="parameters on a CUDA or ROCm device",
            found=f"parameters on {device}",
            where="lowering to Triton",
            remedy='model.to("cuda"), or set TRITON_INTERPRET=1 before Python starts to interpret kernels on the CPU',
        )

