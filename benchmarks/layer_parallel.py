"""Layers of SmolLM2-135M-Instruct in groups: how often a grouped draft's best token is the model's, and its time.

Agreement is measured at every token of the model's own greedy answers; no draft reads its own tokens. Times are of one
call over one row and over eight, with 256 tokens of context, the sequential and the grouped function taking turns.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import graft
from benchmarks.record import Prompt, add_prompt_options, load_prompts, save
from examples.smollm2 import load
from graft.calibration.measuring import predicted, run_on, tidy
from graft.compiler.program import Function, Program
from graft.compiler.spec import show
from graft.passes.add_draft import AddDraft
from graft.passes.kv_cache import KVCache
from graft.passes.merge_linears import MergeLinears

CONTEXT = 256
TIMED = (
    graft.LayerParallel(2),
    graft.LayerParallel(4),
    graft.LayerParallel(2, kind="layer"),
    graft.LayerParallel(4, kind="layer"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_prompt_options(parser)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="longest prompt taken")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--runs", type=int, default=30, help="calls of each function that are timed")
    parser.add_argument("--pairs", action="store_true", help="measure every pair of neighbours alone, too")
    parser.add_argument("--save", default="layer_parallel", help="name of the record under benchmarks/results")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    model, tokenizer = load(getattr(torch, arguments.dtype))
    prompts = load_prompts(arguments.prompts, arguments.per_category)
    texts, lengths = answers(model, tokenizer, prompts, arguments.tokens, arguments.prompt_tokens)
    groupings = graft.calibrate_layer_parallel(
        model,
        texts,
        pairs=arguments.pairs,
        uncounted=[length - 1 for length in lengths],
        progress=lambda text: console.print(f"measuring {text}"),
    )
    agreement = {show(one.change): round(one.agreement, 4) for one in groupings}
    times = timed(tidy(model), arguments.runs)
    console.print(table(agreement, times))
    record = {
        "dtype": arguments.dtype,
        "texts": len(texts),
        "tokens": sum(map(len, texts)) - sum(lengths),
        "context_of_timed_calls": CONTEXT,
        "agreement": agreement,
        "milliseconds": times,
    }
    path = save(arguments.save, record, arguments.prompts)
    console.print(f"kept in benchmarks/results/{path.name}")


def answers(
    model: PreTrainedModel, tokenizer: Any, prompts: list[Prompt], count: int, longest: int
) -> tuple[list[list[int]], list[int]]:
    """Token ids of prompt and greedy answer, and the prompts' lengths."""
    fast, texts, lengths = graft.compile(model), [], []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt.text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        if ids.shape[1] <= longest:
            texts.append(fast.generate(ids, max_new_tokens=count, do_sample=False)[0].tolist())
            lengths.append(ids.shape[1])
    return texts, lengths


def timed(dense: Function, runs: int) -> dict[str, dict[str, float]]:
    """Function -> milliseconds of a call over 1 and 8 rows, measured and predicted."""
    program = Program({"forward": dense.copy()})
    for number, change in enumerate(TIMED):
        run_on(program, AddDraft((change,), f"grouped_{number}"))
    for one in (KVCache(), MergeLinears()):
        run_on(program, one)
    names = {"forward": "sequential"} | {f"grouped_{number}": show(change) for number, change in enumerate(TIMED)}
    panels: dict[str, torch.Tensor] = {}
    found: dict[str, dict[str, float]] = {label: {} for label in names.values()}
    executables = {}
    for name, label in names.items():
        function = program[name]
        prediction = predicted(function, panels, keep=executables)
        found[label] |= {f"rows {rows}, predicted": 1e3 * prediction.seconds(rows, CONTEXT) for rows in (1, 8)}
    for rows in (1, 8):
        spent: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(runs):
            for name in names:
                spent[name].append(seconds(executables[name], program[name], rows))
        for name, label in names.items():
            found[label][f"rows {rows}"] = 1e3 * median(spent[name])
    return {label: {key: round(value, 3) for key, value in sorted(row.items())} for label, row in found.items()}


def seconds(executable, function: Function, rows: int) -> float:  # type: ignore[no-untyped-def]
    """Of one call over a chain."""
    count = torch.arange(rows)
    inputs = (count * 0 + 1, CONTEXT + count, count * 0, count - 1, torch.tensor([CONTEXT]), count)
    states = [
        torch.zeros(s.layers, 1, s.heads, CONTEXT + rows, s.key_dim + s.value_dim, dtype=s.dtype)
        for s in function.states
    ]
    with torch.inference_mode():
        start = time.perf_counter()
        executable(*inputs, *states)
        return time.perf_counter() - start


def table(agreement: dict[str, float], times: dict[str, dict[str, float]]) -> Table:
    """Groupings by agreement, with times where they were taken."""
    found = Table("grouping", "agreement", "ms, 1 row", "ms, 8 rows")
    rows = {"sequential": 1.0, **agreement}
    for name, share in rows.items():
        figures = times.get(name, {})
        found.add_row(name, f"{share:.3f}", *(f"{figures[key]:.2f}" if figures else "" for key in ("rows 1", "rows 8")))
    return found


if __name__ == "__main__":
    main()
