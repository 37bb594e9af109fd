"""Skipped and dropped feed-forwards of SmolLM2-135M-Instruct: what they cost in likelihood, and what a step saves.

Likelihood is that of prompts, as text. Times are of steps of one token behind the first half of a prompt, the model and
its changed copies taking turns at every token; bytes are those of weights that such a step reads, as the executable
counted them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from math import exp
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import graft
from benchmarks.record import add_prompt_options, load_prompts, save
from examples.smollm2 import load
from graft.calibration.measuring import run_on, tidy
from graft.codegen.executable import Executable
from graft.codegen.lowering import lower
from graft.compiler.cost import Workload, function_cost
from graft.compiler.passing import Pass
from graft.compiler.program import Function, Program
from graft.compiler.spec import show
from graft.passes.dead_code import DeadCode
from graft.passes.kv_cache import KVCache
from graft.passes.merge_linears import MergeLinears

COUNTS = (1, 2, 3, 5, 8)
"""Feed-forwards that are dropped."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_prompt_options(parser)
    parser.set_defaults(per_category=1)
    parser.add_argument("--tokens", type=int, default=96, help="of each prompt")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2], help="feed-forwards to skip")
    parser.add_argument("--width", type=int, default=4, help="blocks that are tried at each drop behind the first")
    parser.add_argument("--drops", type=Path, help="a file of the search for drops: read if it is there, else written")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--save", default="skip", help="name of the record under benchmarks/results")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    model, tokenizer = load(getattr(torch, arguments.dtype))
    prompts = load_prompts(arguments.prompts, arguments.per_category)
    texts = [tokenizer(prompt.text)["input_ids"][: arguments.tokens] for prompt in prompts]

    def say(text: str) -> None:
        console.print(f"measuring {text}")

    skips = graft.calibrate_skip_ffn(model, texts, rates=arguments.rates, progress=say)
    if arguments.drops and arguments.drops.is_file():
        drops = graft.DropCalibration.load(arguments.drops, model)
    else:
        drops = graft.calibrate_drops(model, texts, count=COUNTS[-1], width=arguments.width, progress=say)
        if arguments.drops:
            drops.save(arguments.drops)
    changes: list[tuple[Pass, ...]] = [(), *((one.change,) for one in skips.proposals)]
    changes += [drops.passes(count) for count in COUNTS]
    steps = timed(tidy(model), changes, texts)
    full = steps[0]
    costs = [(0.0, skips.nll), *((one.kl, one.nll) for one in skips.proposals)]
    costs += [(drops.best[count - 1].kl, drops.best[count - 1].nll) for count in COUNTS]
    shares = [0.0, *(one.skipped for one in skips.proposals), *(count / len(skips.cosines) for count in COUNTS)]
    rows = [
        {
            "change": ", ".join(map(show, change)) or "none",
            "feed_forwards_left_out": round(share, 4),
            "perplexity": round(exp(nll), 3),
            "kl": round(kl, 4),
            **step,
            "of_bytes": round(step["weights_read"] / full["weights_read"], 4),
            "of_time": round(step["milliseconds"] / full["milliseconds"], 4),
        }
        for change, share, (kl, nll), step in zip(changes, shares, costs, steps, strict=True)
    ]
    console.print(table(rows))
    record = {
        "dtype": arguments.dtype,
        "texts": len(texts),
        "tokens": skips.tokens,
        "cosines": skips.cosines,
        "rows": rows,
        "drops_tried": len(drops.tried),
    }
    path = save(arguments.save, record, arguments.prompts)
    console.print(f"kept in benchmarks/results/{path.name}")


def timed(
    dense: Function, changes: Sequence[Sequence[Pass]], texts: Sequence[Sequence[int]]
) -> list[dict[str, float]]:
    """Of each changed copy the median milliseconds of a step over one token, and the bytes of weights that it read in
    the mean."""
    panels: dict[str, Tensor] = {}
    executables: list[Executable] = []
    for change in changes:
        program = Program({"forward": dense.copy()})
        for one in (*change, KVCache(), MergeLinears(), DeadCode()):
            run_on(program, one)
        with torch.no_grad():
            executables.append(lower(program["forward"], "cpp", panels))
        panels |= executables[-1].panels
    spent: list[list[float]] = [[] for _ in changes]
    skipped = [0.0 for _ in changes]
    for text in texts:
        half = len(text) // 2
        states = [opened(one, len(text) + 1) for one in executables]
        for one, state in zip(executables, states, strict=True):
            call(one, state, text[:half], 0)
            one.forget_skips()
        for place in range(half, len(text)):
            for number, (one, state) in enumerate(zip(executables, states, strict=True)):
                spent[number].append(call(one, state, text[place : place + 1], place))
        for number, one in enumerate(executables):
            skipped[number] += sum(guard.weights * guard.skipped_calls for guard in one.skips)
    work = Workload(rows=1, wanted=1, context=len(texts[0]), length=1)
    bytes_of = [function_cost(one.function).at(work).weights for one in executables]
    return [
        {
            "milliseconds": round(1e3 * median(times), 3),
            "weights_read": round(whole - less / len(times)),
        }
        for times, whole, less in zip(spent, bytes_of, skipped, strict=True)
    ]


def opened(executable: Executable, capacity: int) -> list[Tensor]:
    """The function's states, empty, with one slot."""
    return [
        torch.zeros(s.layers, 1, s.heads, capacity, s.key_dim + s.value_dim, dtype=s.dtype)
        for s in executable.function.states
    ]


def call(executable: Executable, states: Sequence[Tensor], tokens: Sequence[int], length: int) -> float:
    """Seconds of a call over tokens behind `length` of them."""
    count = torch.arange(len(tokens))
    inputs = [torch.tensor(tokens), length + count, count * 0, count - 1, torch.tensor([length]), count[-1:]]
    with torch.inference_mode():
        start = time.perf_counter()
        executable(*inputs, *states)
        return time.perf_counter() - start


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line for each change."""
    found = Table("change", "left out", "perplexity", "KL", "ms a step", "weights", "of time", "of bytes")
    for row in rows:
        found.add_row(
            row["change"],
            f"{row['feed_forwards_left_out']:.1%}",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.3f}",
            f"{row['milliseconds']:.2f}",
            f"{row['weights_read'] / 1e6:.1f} MB",
            f"{row['of_time']:.3f}",
            f"{row['of_bytes']:.3f}",
        )
    return found


if __name__ == "__main__":
    main()
