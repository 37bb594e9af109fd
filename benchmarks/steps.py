"""A step of graft beside what the machine allows, and the prefill of a long prompt beside other systems.

The floor of a step is max(bytes / bandwidth, FLOPs / peak): bytes of weights, keys and values, and FLOPs of matrix
products and attention, from compiler/cost.py. Activations are left out, which stay in cache. Bandwidth and peak are
medians of probes (benchmarks/probes.cpp) that run before every timed step, with as many threads, and are raised to what
a step reached should one reach more. Steps are chains with all logits wanted, as in verification; their time is that of
Decoder.forward, argmax and bookkeeping not included.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import graft
from benchmarks.llama import PeerError
from benchmarks.record import save, version
from benchmarks.systems import Graft, LlamaCpp, System, Transformers, turn, wide_console
from examples.smollm2 import load
from graft.codegen.cpp.build import build
from graft.codegen.cpp.executable import CppExecutable
from graft.codegen.cpp.isa import Isa
from graft.codegen.cpp.library import headers
from graft.compiler.cost import Cost, Estimate, Workload, function_cost
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.run import PROMPT_ROWS

DTYPES = ("bfloat16", "float32")
ROWS = (1, 2, 4, 8, 12, 16, 17, 24, 32)
CONTEXTS = (256, 1024)
PROMPT = 1000
LINE, READERS = 64, 8
"""Bytes read at a time, and how many sums take turns, in probes.cpp."""
READ_BYTES = 512 * 2**20
AHEAD = (0, 1024, 4096, 16384, 65536)
"""Bytes between a line read and the line asked for; how far is best depends on the machine."""
PEAK_ROUNDS = 400_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=30, help="timed steps of every size, and probes before them")
    parser.add_argument("--prefills", type=int, default=7, help="timed prefills of every system")
    parser.add_argument("--save", default="steps", help="name of the record under benchmarks/results")
    arguments = parser.parse_args()
    console = wide_console()
    results = {}
    for dtype in arguments.dtype:
        console.print(f"loading and compiling SmolLM2-135M-Instruct in {dtype}, {torch.get_num_threads()} threads")
        model, _ = load(getattr(torch, dtype))
        model.generation_config.eos_token_id = None
        own = Graft(graft.compile(model))
        machine, steps = measure(own.fast.decoder, dtype, arguments.repeats)
        prefill = prefills(own, model, arguments.prefills, console)
        floor = prefill_floor(function_cost(own.fast.decoder.function), machine)
        results[dtype] = {"machine": machine, "steps": steps, "prefill": prefill, "prefill_floor_ms": round(floor, 1)}
        for table in tables(dtype, results[dtype]):
            console.print(table)
    peers = {"peers": {"llama-cpp-python": version("llama-cpp-python")}}
    path = save(arguments.save, {"repeats": arguments.repeats, **peers, "results": results})
    console.print(f"kept in benchmarks/results/{path.name}")


class Probes:
    """Bandwidth and arithmetic of this machine, measured by code built as an executable's is."""

    def __init__(self, isa: Isa, threads: int) -> None:
        """Raises LoweringError where there is no compiler, PeerError where memory does not suffice."""
        source = (Path(__file__).parent / "probes.cpp").read_text(encoding="utf-8")
        self.library = ctypes.CDLL(str(build(source, headers(), isa)))
        self.library.probe_open.restype = ctypes.c_void_p
        self.library.probe_open.argtypes = [ctypes.c_int, ctypes.c_int64]
        self.library.probe_close.argtypes = [ctypes.c_void_p]
        self.library.probe_read.restype = self.library.probe_peak.restype = ctypes.c_double
        self.library.probe_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        self.library.probe_peak.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p]
        each = -(-max(READ_BYTES, 4 * last_level_cache()) // (LINE * threads * READERS)) * READERS
        self.lines = threads * each
        self.probe = self.library.probe_open(threads, each)
        if not self.probe:
            raise PeerError("there is no memory for the bandwidth probe", expected=f"{self.lines * LINE} bytes")
        self.ahead = max(AHEAD, key=lambda ahead: median(self.bandwidth(ahead) for _ in range(5)))

    def bandwidth(self, ahead: int | None = None) -> float:
        """Bytes per second of reading once through more than any cache holds."""
        total = ctypes.c_uint64()
        seconds = self.library.probe_read(self.probe, self.ahead if ahead is None else ahead, ctypes.byref(total))
        if total.value != 16 * self.lines:
            raise PeerError("the bandwidth probe did not read everything", expected=16 * self.lines, found=total.value)
        return self.lines * LINE / seconds

    def peak(self, dtype: str) -> float:
        """FLOPs per second of the instruction that multiplies in this dtype."""
        sink = ctypes.c_float()
        return float(self.library.probe_peak(self.probe, dtype == "bfloat16", PEAK_ROUNDS, ctypes.byref(sink)))

    def close(self) -> None:
        """Give back threads and memory."""
        self.library.probe_close(self.probe)


def last_level_cache() -> int:
    """Bytes of the largest cache that the system tells of; 0 where it tells of none."""
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        found.append(int(text.rstrip("KMG")) * scale)
    return max(found)


def measure(decoder: Decoder, dtype: str, repeats: int) -> tuple[dict, list[dict]]:
    """What the machine gives, and every step's time beside its floor."""
    executable = decoder.executable
    if not isinstance(executable, CppExecutable):
        raise PeerError("steps are measured of compiled code", found=type(executable).__name__)
    probes = Probes(executable.isa, executable.threads)
    cost = function_cost(decoder.function)
    reads: list[float] = []
    peaks: list[float] = []
    rows = []
    for context in CONTEXTS:
        times: dict[int, list[float]] = {count: [] for count in ROWS}
        slot = filled_slot(decoder, context)
        for _ in range(repeats):
            for count in ROWS:
                reads.append(probes.bandwidth())
                peaks.append(probes.peak(dtype))
                # The executable's threads fell asleep meanwhile; between the steps of a text they stay awake.
                step(decoder, slot, 1, context)
                times[count].append(step(decoder, slot, count, context))
        decoder.close(slot)
        rows += [row(cost.at(workload(count, context)), count, context, times[count]) for count in ROWS]
    probes.close()
    reached = max(one["gigabytes"] / one["ms"]["median"] * 1e3 for one in rows)
    computed = max(one["gigaflops"] / one["ms"]["median"] * 1e3 for one in rows)
    bandwidth, peak = median(reads) / 1e9, median(peaks) / 1e9
    machine = {
        "isa": executable.isa.name,
        "threads": executable.threads,
        "read_bytes": probes.lines * LINE,
        "last_level_cache_bytes": last_level_cache(),
        "prefetch_ahead_bytes": probes.ahead,
        "gigabytes_per_second": spread(reads, 1e9)
        | {"reached": round(reached, 2), "used": round(max(bandwidth, reached), 2)},
        "gigaflops_per_second": spread(peaks, 1e9)
        | {"reached": round(computed, 1), "used": round(max(peak, computed), 1)},
    }
    for one in rows:
        memory, arithmetic = floors(one["gigabytes"], one["gigaflops"], machine)
        one["floor_ms"], one["bound_by"] = max((memory, "memory"), (arithmetic, "arithmetic"))
        one["times_the_floor"] = round(one["ms"]["median"] / one["floor_ms"], 3)
        one["floor_ms"] = round(one["floor_ms"], 3)
    return machine, rows


def filled_slot(decoder: Decoder, context: int) -> int:
    """A slot that holds so many tokens."""
    slot = decoder.open()
    for start in range(0, context, PROMPT_ROWS):
        count = min(PROMPT_ROWS, context - start)
        decoder.forward(chain(slot, count, start, want_all=False))
        decoder.commit(slot, range(count))
    return slot


def chain(slot: int, count: int, position: int, want_all: bool) -> Rows:
    """Consecutive tokens; which ones they are does not matter for the time."""
    rows = Rows()
    rows.add_chain(slot, [100 + 7 * i % 4000 for i in range(count)], position, want_all=want_all)
    return rows


def step(decoder: Decoder, slot: int, count: int, context: int) -> float:
    """Seconds of one step, which is rolled back."""
    rows = chain(slot, count, context, want_all=True)
    start = time.perf_counter()
    decoder.forward(rows)
    seconds = time.perf_counter() - start
    decoder.rollback(slot)
    return seconds


def workload(count: int, context: int) -> Workload:
    """The sizes of a step: the rows of a chain attend to half of the chain on average."""
    return Workload(rows=count, context=context + (count + 1) // 2, wanted=count)


def row(estimate: Estimate, count: int, context: int, times: Sequence[float]) -> dict:
    """What is known of a step before it is compared."""
    return {
        "rows": count,
        "context": context,
        "ms": spread(times, 1e-3),
        "gigabytes": (estimate.weights + estimate.kv) / 1e9,
        "gigaflops": estimate.products / 1e9,
    }


def floors(gigabytes: float, gigaflops: float, machine: dict) -> tuple[float, float]:
    """Milliseconds that memory and arithmetic take at least."""
    speeds = machine["gigabytes_per_second"]["used"], machine["gigaflops_per_second"]["used"]
    return 1e3 * gigabytes / speeds[0], 1e3 * gigaflops / speeds[1]


def prefill_floor(cost: Cost, machine: dict) -> float:
    """Milliseconds that the calls of a prompt take at least."""
    total = 0.0
    for start in range(0, PROMPT, PROMPT_ROWS):
        count = min(PROMPT_ROWS, PROMPT - start)
        estimate = cost.at(Workload(rows=count, context=start + (count + 1) // 2))
        total += max(floors((estimate.weights + estimate.kv) / 1e9, estimate.products / 1e9, machine))
    return total


def prefills(own: Graft, model: PreTrainedModel, repeats: int, console: Console) -> dict[str, dict]:
    """Milliseconds until the first token after a long prompt, the systems taking turns."""
    systems: dict[str, System] = {"graft": own, "transformers": Transformers(model)}
    try:
        systems["llama.cpp"] = LlamaCpp(model, PROMPT + 1, by_prefill=True)
    except ImportError:
        console.print("llama.cpp is left out: llama-cpp-python is not installed (pip install -e '.[bench-peers]')")
    ids = [100 + 7 * i % 4000 for i in range(PROMPT)]
    times: dict[str, list[float]] = {name: [] for name in systems}
    for system in systems.values():
        turn(system, ids, 1)
    for number in range(repeats):
        for name in list(systems)[:: -1 if number % 2 else 1]:
            times[name].append(turn(systems[name], ids, 1).prefill)
    return {name: {"ms": spread(times[name], 1e-3), "notes": systems[name].notes} for name in systems}


def spread(values: Sequence[float], unit: float) -> dict[str, float]:
    """Least, quartiles and greatest, in a unit."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    found = {"least": min(values), "low": low, "median": middle, "high": high, "greatest": max(values)}
    return {key: round(value / unit, 3) for key, value in found.items()}


def tables(dtype: str, result: dict) -> list[Table]:
    """Steps, and prefills."""
    machine = result["machine"]
    bandwidth, peak = machine["gigabytes_per_second"], machine["gigaflops_per_second"]
    steps = Table(title=f"a step, {dtype}, {bandwidth['used']:.1f} GB/s, {peak['used']:.0f} GFLOP/s ({machine['isa']})")
    for heading in ("context", "rows", "ms", "quartiles", "floor, ms", "times the floor", "bound by"):
        steps.add_column(heading, justify="right")
    for one in result["steps"]:
        ms = one["ms"]
        figures = [f"{ms['median']:.2f}", f"{ms['low']:.2f} to {ms['high']:.2f}", f"{one['floor_ms']:.2f}"]
        ratio = f"{one['times_the_floor']:.2f}"
        steps.add_row(str(one["context"]), str(one["rows"]), *figures, ratio, one["bound_by"])
    prompts = Table(title=f"prefill of {PROMPT} tokens, {dtype}; floor {result['prefill_floor_ms']:.0f} ms")
    for heading in ("system", "ms", "quartiles", "tokens/s"):
        prompts.add_column(heading, justify="left" if heading == "system" else "right")
    for name, one in result["prefill"].items():
        ms = one["ms"]
        figures = [f"{ms['median']:.0f}", f"{ms['low']:.0f} to {ms['high']:.0f}", f"{1e3 * PROMPT / ms['median']:.0f}"]
        prompts.add_row(name, *figures)
    return [steps, prompts]


if __name__ == "__main__":
    main()
