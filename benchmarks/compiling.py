"""How long compiling takes, and what it leaves in memory: SmolLM2-135M-Instruct, and its shape with other depths.

Capture with layers that are alike traced once, beside every layer traced; passes; lowering with an empty cache of
compiled code (cold) and with a filled one (warm). Memory is that of a process of its own, which loads, compiles and
releases the model's parameters, as its growth over what it was before loading.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

import graft
from benchmarks.record import save
from benchmarks.systems import wide_console
from examples.smollm2 import load
from graft.codegen.release import trim
from graft.compiler.capture import traced
from graft.compiler.repeats import Repeats

DEPTHS = (15, 30, 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", default="compiling", help="name of the record under benchmarks/results")
    parser.add_argument("--memory", action="store_true", help="only print what one process grows by")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.memory:
        print(json.dumps(memory(dtype)))
        return
    console = wide_console()
    command = [sys.executable, "-m", "benchmarks.compiling", "--memory", "--dtype", arguments.dtype]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    held = json.loads(output.splitlines()[-1])
    model, _ = load(dtype)
    graft.compile(model)  # what torch sets up once in a process is not the model's
    models = {"SmolLM2-135M, 30 layers": lambda: model}
    models |= {f"its shape, {depth} layers": lambda depth=depth: random_model(model, depth) for depth in DEPTHS}
    results = {name: measure(make(), arguments.repeats) for name, make in models.items()}
    table = Table(title=f"seconds, {arguments.dtype}, medians of {arguments.repeats}")
    for heading in ("model", *next(iter(results.values()))):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, figures in results.items():
        cells = (f"{figure:.2f}" if isinstance(figure, float) else str(figure) for figure in figures.values())
        table.add_row(name, *cells)
    console.print(table)
    console.print("\n".join(f"{name}: {figure}" for name, figure in held.items()))
    record = {"dtype": arguments.dtype, "repeats": arguments.repeats, "seconds": results, "memory": held}
    console.print(f"kept in benchmarks/results/{save(arguments.save, record).name}")


def random_model(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The model's shape with that many layers and random weights."""
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": layers})
    return AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()


def measure(model: PreTrainedModel, repeats: int) -> dict[str, float | int]:
    """Seconds by phase, and the lines of generated code."""
    runs = [phases(model, cold=place == 0) for place in range(repeats + 1)]
    first, again = runs[0], runs[1:]

    def middle(phase: str) -> float:
        return median(run[phase] for run in again)

    return {
        "capture": middle("capture"),
        "capture, every layer": median(seconds(lambda: every_layer(model)) for _ in range(repeats)),
        "passes": middle("passes"),
        "lowering, cold": float(first["lowering"]),
        "lowering, warm": middle("lowering"),
        "lines of C++": int(first["lines"]),
    }


def phases(model: PreTrainedModel, cold: bool) -> dict[str, float]:
    """Seconds of one compilation by phase; a cold one finds no compiled code."""
    marks: list[float] = []
    said: list[str] = []

    def progress(text: str) -> None:
        said.append(text)
        marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"GRAFT_CACHE": folder} if cold else {}):
        fast = graft.compile(model, progress=progress)
    end = time.perf_counter()
    lowering = marks[said.index("lowering")]
    lines = len(fast.program["forward"].source.splitlines())
    return {"capture": marks[1] - marks[0], "passes": lowering - marks[1], "lowering": end - lowering, "lines": lines}


def every_layer(model: PreTrainedModel) -> None:
    """Capture without taking layers for alike."""
    with torch.no_grad():
        traced(model, Repeats(model, []))


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory(dtype: torch.dtype) -> dict[str, float]:
    """Growth of this process in MB: by loading the model alone, and with it compiled and released in its place. The
    tokenizer, and what loading and compiling anything imports and leaves behind, is there before."""
    model, tokenizer = load(dtype)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    del model
    trim()
    imported = resident()
    graft.compile(random_model(load(dtype)[0], 2))
    trim()
    before = resident()
    model = load(dtype)[0]
    trim()
    loaded = resident()
    fast = graft.compile(model, release=True)
    held = {
        "parameters": parameters,
        "left behind by compiling anything": before - imported,
        "model loaded": loaded - before,
        "compiled and released": resident() - before,
        "compiled and released, times the parameters": (resident() - before) / parameters,
    }
    assert fast.released_bytes and tokenizer
    return {name: round(figure / 1e6, 1) if figure > 1e3 else round(figure, 3) for name, figure in held.items()}


def resident() -> int:
    """Bytes of memory that the process holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
