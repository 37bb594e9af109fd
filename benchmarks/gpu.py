"""graft's Triton kernels on a GPU: every kernel against float64, then the time of a step beside transformers.

A step has T rows behind 512 committed tokens of one sequence. "of copy" is the share of the memory's speed that reading
the parameters once per step comes to; the speed is that of a large copy, bytes read and written. All times are medians
over runs that were waited for one by one, in bfloat16. Random weights have the shape of Llama-3-8B: time does not
depend on their values.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache

from benchmarks.record import save
from examples.smollm2 import load
from graft.codegen.triton.executable import TritonExecutable
from graft.codegen.triton.library import Launch
from graft.compiler.capture import capture
from graft.compiler.passing import View
from graft.compiler.plan import Plan
from graft.compiler.program import DENSE, Function, Program
from graft.compiling import pipeline

ROWS = (1, 4, 8, 16, 32)
CONTEXT = 512
CAPACITY = 1024
RUNS = 30
TOLERANCE = 4.0
"""A kernel's value may be so many times as far from float64 as ATen's in the model's dtype, and one rounding more."""
LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="T of the steps to time")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes long")
    parser.add_argument("--save", default="gpu", help="name of the record under benchmarks/results")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    if not torch.cuda.is_available():
        console.print("there is no GPU here, so there is nothing to measure")
        sys.exit(1)
    speed = copy_speed()
    console.print(f"{torch.cuda.get_device_name()}: copies {speed / 1e9:.0f} GB/s")
    results: dict[str, Any] = {}
    for name in arguments.models:
        results[name] = measure(name, arguments.rows, speed, not arguments.no_compile, console)
        torch.cuda.empty_cache()
    console.print(table(results))
    device = {"name": torch.cuda.get_device_name(), "copy_gb_per_s": round(speed / 1e9, 1)}
    path = save(arguments.save, {"device": device, "context": CONTEXT, "results": results})
    console.print(f"kept in benchmarks/results/{path.name}")
    wrong = [kernel for result in results.values() for kernel in result["wrong"]]
    if wrong:
        console.print(f"wrong: {', '.join(wrong)}")
        sys.exit(1)


def smollm2(layers: int | None) -> PreTrainedModel:
    """SmolLM2-135M-Instruct, whole: it is small enough for float64."""
    model, _ = load(torch.bfloat16)
    return model.to("cuda")


def llama_8b(layers: int | None) -> PreTrainedModel:
    """A random Llama-3-8B, of so many layers."""
    config = LlamaConfig(**(LLAMA | ({"num_hidden_layers": layers} if layers else {})))
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


MODELS: dict[str, Callable[[int | None], PreTrainedModel]] = {"SmolLM2-135M": smollm2, "Llama-3-8B, random": llama_8b}


def copy_speed() -> float:
    """Bytes per second of a copy of 2 GiB, those read and those written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def seconds(run: Callable[[], object]) -> float:
    """The median time of a run on the device, after some that are not counted."""
    times = []
    for _ in range(RUNS + 5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[5:])


def flat_function(model: PreTrainedModel) -> Function:
    """`forward` on flat rows, after the usual passes."""
    captured = capture(model)
    program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
    for one in pipeline(Plan()):
        one.run(View(program, one.pass_name()))
    return program["forward"]


def inputs_of(function: Function, rows: int, committed: int, capacity: int) -> tuple[list[Tensor], list[Tensor]]:
    """A chain of rows behind committed tokens whose keys and values are random, and the states that hold those."""
    generator = torch.Generator("cuda").manual_seed(1)
    count = torch.arange(rows, device="cuda")
    tokens = torch.randint(3, 1000, (rows,), generator=generator, device="cuda")
    states = [
        torch.randn(
            (s.layers, 1, s.heads, capacity, s.key_dim + s.value_dim), generator=generator, device="cuda"
        ).to(s.dtype)
        for s in function.states
    ]
    lengths = torch.tensor([committed], device="cuda")
    return [tokens, committed + count, count * 0, count - 1, lengths, count], states


# Every kernel against float64.


class Evaluated(fx.Interpreter):
    """Runs a function's nodes by their reference meaning and keeps their values; in float64 throughout if asked to."""

    def __init__(self, module: fx.GraphModule, double: bool) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.double = double

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        dtype = kwargs.get("dtype")
        if self.double and isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            kwargs = {**kwargs, "dtype": torch.float64}
        return super().call_function(target, args, kwargs)


def values(function: Function, inputs: list[Tensor], states: list[Tensor], double: bool) -> dict[str, Tensor]:
    """The value of every node, by name."""
    weights = copy.deepcopy(function.weights).double() if double else function.weights
    states = [state.double() if double else state.clone() for state in states]
    evaluated = Evaluated(fx.GraphModule(weights, copy.deepcopy(function.graph)), double)
    evaluated.run(*inputs, *states)
    return {node.name: rows_first(node, value) for node, value in evaluated.env.items() if isinstance(value, Tensor)}


def rows_first(node: fx.Node, value: Tensor) -> Tensor:
    """A value as kernels lay it out: the dim of rows, the only dynamic one, before all others."""
    dynamic = [axis for axis, size in enumerate(node.meta["val"].shape) if not isinstance(size, int)]
    return value.movedim(dynamic[0], 0) if dynamic else value


def check(function: Function, rows: int) -> tuple[int, list[str]]:
    """How many values of kernels were looked at, and which are further from float64 than they may be."""
    inputs, states = inputs_of(function, rows, CONTEXT, CAPACITY)
    executable = TritonExecutable(function)
    exact = values(executable.cut.function, inputs, states, True)
    usual = values(executable.cut.function, inputs, states, False)
    looked, wrong = 0, []
    for name, ours in stored_values(executable, inputs, states):
        if name not in exact or exact[name].numel() != ours.numel():
            continue
        looked += 1
        truth = exact[name].reshape(-1).double()
        own, theirs = ((x.reshape(-1).double() - truth).abs().max() for x in (ours, usual[name]))
        rounding = torch.finfo(ours.dtype).eps if ours.dtype.is_floating_point else 0.0
        if not own <= TOLERANCE * theirs + rounding * truth.abs().max():
            wrong.append(f"{name} ({float(own):.1e} against {float(theirs):.1e})")
    return looked, wrong


def stored_values(executable: TritonExecutable, inputs: list[Tensor], states: list[Tensor]) -> list[tuple[str, Tensor]]:
    """The arrays that kernels write, copied as soon as they are written: others take their place later."""
    given = dict(zip(("tokens", "positions", "sequences", "parents", "lengths", "wanted"), inputs, strict=True))
    sizes = {"N": len(inputs[0]), "R": len(inputs[5])}
    with torch.no_grad():
        bucket = executable.make_bucket(sizes, len(inputs[4]), tuple(states))
        for name, buffer in bucket.inputs.items():
            buffer.copy_(given[name])
        bucket.count.update(sizes)
        refresh, *steps = [step for _, segment in bucket.segments for step in segment]
        refresh()
        found: dict[str, Tensor] = {}
        own = {array.name: out for array, out in zip(executable.cut.outputs, bucket.outputs, strict=True)}
        for at, (step, part) in enumerate(zip(steps, executable.code.steps, strict=True)):
            step()
            following = executable.code.steps[at + 1 : at + 2]
            kernel = part.kernel if isinstance(part, Launch) else part
            if following and isinstance(following[0], Launch) and following[0].kernel is kernel:
                continue  # the first part of a kernel of two
            for array in kernel.arrays:
                if array.rows and array.name not in found and array.name not in given:
                    where = own[array.name] if array.name in own else executable.stored(array.name, array)
                    found[array.name] = where[: sizes[array.rows]].clone()
    return [*found.items()]


# Times.


def measure(name: str, rows: list[int], speed: float, compiled: bool, console: Console) -> dict[str, Any]:
    """Check the kernels, on few layers where the model is large, then time the steps of every system."""
    console.print(f"{name}: checking kernels")
    looked, wrong = check(flat_function(MODELS[name](2)), 5)
    console.print(f"{name}: {looked} values of kernels checked, {len(wrong)} wrong")
    torch.cuda.empty_cache()
    model = MODELS[name](None)
    read = sum(parameter.nbytes for parameter in model.parameters())
    read -= 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
    steps: dict[str, dict[int, float]] = {}
    function = flat_function(model)
    executable = TritonExecutable(function)
    for count in rows:
        inputs, states = inputs_of(function, count, CONTEXT, CAPACITY)
        steps.setdefault("graft", {})[count] = seconds(lambda: executable(*inputs, *states))  # noqa: B023
    console.print(f"{name}: graft timed")
    steps["transformers"] = {count: seconds(eager_step(model, count)) for count in rows}
    console.print(f"{name}: transformers timed")
    if compiled:
        steps["transformers, max-autotune"] = {count: seconds(compiled_step(model, count)) for count in rows}
    return {
        "checked": looked,
        "wrong": wrong,
        "parameter_bytes_per_step": read,
        "ms": {system: {str(t): round(1e3 * took, 3) for t, took in found.items()} for system, found in steps.items()},
        "of_copy": {
            system: {str(t): round(read / took / speed, 3) for t, took in found.items()}
            for system, found in steps.items()
        },
    }


def eager_step(model: PreTrainedModel, rows: int) -> Callable[[], object]:
    """transformers on a growing cache, cut back after every step."""
    ids = torch.randint(3, 1000, (1, CONTEXT), device="cuda")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)

    @torch.no_grad()
    def step() -> object:
        logits = model(ids[:, :rows], past_key_values=cache).logits
        cache.crop(-rows)
        return logits

    return step


def compiled_step(model: PreTrainedModel, rows: int) -> Callable[[], object]:
    """transformers on a static cache, compiled for this number of rows. Steps stand where the first one stood, so that
    all see the same context; what they compute there does not matter to the time."""
    torch.compiler.reset()
    ids = torch.randint(3, 1000, (1, rows), device="cuda")
    positions = torch.arange(CONTEXT, CONTEXT + rows, device="cuda")
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    forward = torch.compile(model.forward, mode="max-autotune", dynamic=False)
    with torch.no_grad():
        model(torch.randint(3, 1000, (1, CONTEXT), device="cuda"), past_key_values=cache)
    lengths = [layer.cumulative_length.clone() for layer in cache.layers if hasattr(layer, "cumulative_length")]

    @torch.no_grad()
    def step() -> object:
        for layer, length in zip(cache.layers, lengths, strict=False):
            layer.cumulative_length.copy_(length)
        torch.compiler.cudagraph_mark_step_begin()
        return forward(ids, past_key_values=cache, position_ids=positions[None]).logits

    return step


def table(results: dict[str, Any]) -> Table:
    """One line for each model and system."""
    counts = [*next(iter(next(iter(results.values()))["ms"].values()))]
    found = Table(title=f"a step of T rows behind {CONTEXT} tokens: ms (share of copy speed)")
    for heading in ("model", "system", *(f"T = {count}" for count in counts)):
        found.add_column(heading, justify="right" if heading.startswith("T") else "left")
    for model, result in results.items():
        for system, times in result["ms"].items():
            shares = result["of_copy"][system]
            found.add_row(model, system, *(f"{times[t]:.2f} ({100 * shares[t]:.0f} %)" for t in counts))
    return found


if __name__ == "__main__":
    main()
